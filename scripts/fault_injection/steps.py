"""Steps that go wrong, and services and settings around them: no number, no memory, wandb, another configuration."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from scripts.fault_injection.bench import STEPS, Bench, Row, records

SPOKEN_FOR = """
from types import SimpleNamespace
torch.cuda.get_device_properties = lambda device: SimpleNamespace(total_memory=700_000)
def full(): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 ...")
_inject(13, full)
"""


def numbers(bench: Bench, times: int) -> list[Row]:
    """Gradients that are no number, once and for good; and one that is far too large."""
    poison = """
_total_norm = torch.nn.utils.get_total_norm
calls = iter(range(1, 10**6))
def total_norm(gradients):
    if next(calls) in STEPS:
        for gradient in gradients: gradient.mul_(float("nan"))
    return _total_norm(gradients)
torch.nn.utils.get_total_norm = total_norm
"""
    run_dir = bench.run_dir("nan")
    status = bench.finish(run_dir, inject=poison.replace("STEPS", "{13}"))
    found = records(run_dir)
    finite = all(r.get("train/loss") is not None for r in found[1:]) and found[-1]["train/skipped_steps"] == 1
    rows = [Row("NaN in the gradient", "at step 13", 1, "one step", "train/skipped_steps = 1", status == 0 and finite)]
    run_dir = bench.run_dir("spike")
    spike = poison.replace("STEPS", "{30}").replace('float("nan")', "1e3")
    status = bench.finish(run_dir, "training.skip_window=16", inject=spike)
    skipped = [record["step"] for record in records(run_dir)[1:] if record["train/skipped_steps"] == 1]
    passed = status == 0 and skipped == list(range(30, STEPS + 1))
    rows.append(Row("spike of the gradient", "× 1,000 at step 30", 1, "one step", "train/skipped_steps = 1", passed))
    run_dir = bench.run_dir("nan-for-good")
    status = bench.finish(run_dir, "training.skip_limit=4", inject=poison.replace("STEPS", "range(13, 999)"))
    message = bench.said(r"error: the run diverged[^)]*\)")
    passed = status == 1 and bench.finish(run_dir, "training.skip_limit=4") == 0 and bench.same(run_dir)
    rows.append(Row("NaN from a step on", "from step 13, limit 4", 1, "steps from 11 on, made again", message, passed))
    return rows


def memory(bench: Bench, times: int) -> Row:
    """The device has no memory left in a step: CUDA's allocator says it, or is spoken for where there is none."""
    run_dir = bench.run_dir("memory")
    if bench.device == "cuda":
        how, exhaust = (
            "an allocation of 1 TB in step 14",
            "_inject(13, lambda: torch.empty(10**12, dtype=torch.uint8, device='cuda'))",
        )
        advice = "would hold: look at what else takes its memory"  # the run itself is tiny
    else:
        how, exhaust, advice = "raised in step 14", SPOKEN_FOR, "what fits is"
    status = bench.finish(run_dir, inject=exhaust)
    message = bench.said(r"error: CUDA out of memory[^\n]*")
    passed = status == 1 and advice in message and bench.finish(run_dir) == 0 and bench.same(run_dir)
    return Row("out of memory", how, 1, "3 steps, made again", message, passed)


def wandb(bench: Bench, times: int) -> list[Row]:
    """Weights & Biases is out of reach, its process dies, it takes five seconds a record; and a resume that rewinds."""
    rows = []
    offline = "logging.wandb.mode=offline"
    kill = """
import glob
def kill():
    for name in glob.glob("/proc/[0-9]*/cmdline"):
        with open(name) as file, open(name.replace("cmdline", "stat")) as stat:
            if "wandb-core" in file.read() and stat.read().rpartition(")")[2].split()[1] == str(os.getpid()):
                os.kill(int(name.split("/")[2]), signal.SIGKILL)
_inject(13, kill)
"""
    away = "os.environ.update(WANDB_BASE_URL='http://127.0.0.1:9', WANDB_API_KEY='0' * 40)"
    slow = """
from training import tracking
tracking.FINISH_TIMEOUT_SECONDS = 1
import wandb
wandb.Run.log = lambda *arguments, **options: time.sleep(5)
"""
    for fault, how, mode, inject in (
        ("wandb out of reach", "a closed port as its address", "logging.wandb.mode=online", away),
        ("wandb killed", "SIGKILL of wandb-core before step 14", offline, kill),
        ("wandb slow", "five seconds a record, of 60", offline, slow),
    ):
        run_dir = bench.run_dir(fault.replace(" ", "-"))
        begun = time.monotonic()
        status = bench.finish(run_dir, mode, inject=inject)
        passed = status == 0 and bench.same(run_dir) and time.monotonic() - begun < 60
        message = bench.said(r"wandb: (?!run )[^\n]*")
        rows.append(Row(fault, how, 1, "nothing", message, passed and message != ""))
    run_dir = bench.run_dir("wandb-rewound")
    bench.finish(run_dir, offline, inject="_inject(13, lambda: os.kill(os.getpid(), signal.SIGKILL))")
    status = bench.finish(run_dir, offline)
    files = list(run_dir.glob("wandb/offline-run-*/*.wandb"))
    steps = _steps_in(files[0]) if len(files) == 1 else []
    passed = status == 0 and bench.same(run_dir) and steps == [record["step"] for record in records(run_dir)]
    lost = f"nothing: one wandb run, steps 0 to {steps[-1] if steps else '?'} once each"
    rows.append(Row("killed, with wandb offline", "before step 14, continued at 10", 1, lost, "", passed))
    return rows


def _steps_in(file: Path) -> list[int]:
    """The steps of the history in a file of wandb."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    entries = [json.loads(line) for line in lines]
    return [entry["history"]["item"]["step"] for entry in entries if entry["type"] == "history"]


def changed(bench: Bench, times: int) -> list[Row]:
    """Another configuration on resume, of the three kinds: it may, it must not, it wants a flag."""
    base = bench.run_dir("unchanged")
    bench.finish(base, f"training.stop_at={STEPS // 2}")
    rows = []
    for change, flag, statuses in (
        ("training.micro_batch_size=4", None, [0]),
        ("model.norm=pre", "checkpoint.allow_changes=[model.norm]", [2, 2]),
        ("optimizer.lr=1e-4", "checkpoint.allow_changes=[optimizer.lr]", [2, 0]),
    ):
        run_dir = bench.run_dir(change.partition("=")[0])
        shutil.copytree(base, run_dir)
        got = [bench.finish(run_dir, change)]
        message = bench.said(r"error: [^\n]*\n[^\n]*\n[^\n]*") or bench.said(r"continuing [^\n]*")
        if flag:
            got.append(bench.finish(run_dir, change, flag))
        how = f"{change}: status {got[0]}" + (f"; with {flag}: {got[1]}" if flag else "")
        rows.append(Row("changed configuration", how, 1, "nothing", message, got == statuses))
    return rows
