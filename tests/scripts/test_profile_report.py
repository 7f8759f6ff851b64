"""Traces of steps: what a run writes, and how a trace becomes tables and a picture."""

import gzip
import json

import pytest

from scripts.profile_report import main
from scripts.training_benchmark import trace
from tests.shards import tiny_config
from training.trainer import train


def event(name, begin, duration, category="kernel"):
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": duration}


@pytest.fixture
def written(tmp_path):
    """1.0 ms of kernels, two of them side by side, in a span of 1.2 ms."""
    events = [
        event("aten::mm", 0, 5000, "cpu_op"),
        event("nvjet_tst_128x256", 1000, 400),
        event("nvjet_tst_128x256", 1400, 200),
        event("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", 1500, 300),
        event("Memcpy DtoD (Device -> Device)", 2000, 200, "gpu_memcpy"),
    ]
    path = tmp_path / "step-3-rank-0.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return path


def test_kernels_are_summed_by_kind_and_overlaps_counted_once(written):
    profile = trace.read(written)
    assert profile.kinds() == pytest.approx(
        {"matrix products": 0.6, "sequence attention": 0.3, "copies and fills": 0.2}, rel=1e-9
    )
    assert profile.span == pytest.approx(1.2)
    assert profile.busy == pytest.approx(1.0)
    assert profile.kernels["nvjet_tst_128x256"] == (2, pytest.approx(0.6))


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("triton_red_fused__to_copy_add_mul_5", "compiled element-wise"),
        ("slots_vector", "depth backward, slots"),
        ("forward_tensor", "depth forward"),
        ("ncclDevKernel_AllGather_RING_LL", "communication"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdam>", "optimizer and clipping"),
        ("kernel_cutlass_kernel_quackgemm_dactGemmDGatedSm90_object_at__TiledMMA", "products with SwiGLU"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<...>", "copies of weights and gradients"),
        ("something_new", "other"),
    ],
)
def test_kinds_of_kernels(kernel, kind):
    assert trace.kind(kernel) == kind


def test_the_report_shows_labels_side_by_side_and_draws(written, tmp_path, capsys):
    assert main([f"OLMo2={written}", f"MoDA={written}", "--picture", str(tmp_path / "profile.png")]) == 0
    shown = capsys.readouterr().out
    assert "| ms | OLMo2 | MoDA |" in shown
    assert "| matrix products | 0.6 | 0.6 |" in shown
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_trace_of_a_gpu_is_refused(shards, tmp_path, capsys):
    config = tiny_config(shards, tmp_path / "run")
    config.training.stop_at, config.evaluation.every = 4, 0
    config.logging.profile.steps = [3]
    train(config)
    folder = tmp_path / "run" / "profile"
    assert [path.name for path in folder.iterdir()] == ["step-3-rank-0.json.gz"]
    names = {
        e.get("name")
        for e in json.loads(gzip.decompress((folder / "step-3-rank-0.json.gz").read_bytes()))["traceEvents"]
    }
    assert {"aten::mm", "_AttendBackward"} & names, "the trace holds the operations of the step"
    assert main([str(folder / "step-3-rank-0.json.gz")]) == 2
    assert "holds no kernels of a GPU" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing.json.gz")]) == 2
    assert "cannot be read as a trace" in capsys.readouterr().err
