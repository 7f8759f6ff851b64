"""The fused backend in Triton's interpreter, in fp32 and fp16, against the definition in float64."""

import importlib.util

import pytest
import torch

import moda
from moda import fused, kernels
from tests.moda.interpreter import run_interpreted

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

if not kernels.INTERPRETED:

    @pytest.mark.slow
    def test_in_the_interpreter():
        run_interpreted(__file__)

    def test_a_cpu_is_refused_without_the_interpreter():
        q = torch.zeros(1, 2, 1, 32)
        assert "CUDA" in str(fused.unusable(q, q, None))

else:
    from moda.kernels import fused as launches
    from tests.moda.fused_cases import DOCUMENTS, EXTREMES, SHAPES, Call

    TOLERANCE = 3e-6
    HALF_TOLERANCE = 1e-3  # that of fp16; bf16 is for a GPU, as the interpreter has no product in it
    SMALL, WIDE = launches.Tiles(16, 16, 4, 2, 2), launches.Tiles(16, 32, 4, 2, 2)  # several of them in a small case

    def tile(monkeypatch, tiles):
        monkeypatch.setattr(launches, "tiles", lambda kernel, head_dim, dtype: tiles)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_outputs_and_gradients_equal_the_definition(shape):
        call = Call(shape)
        call.check(call.run(), TOLERANCE)

    @pytest.mark.parametrize("shape", [shape for shape in SHAPES if 16 < shape[1] * shape[3] < 110], ids=str)
    def test_outputs_and_gradients_equal_the_definition_over_many_tiles(shape, monkeypatch):
        tile(monkeypatch, SMALL)
        call = Call(shape)
        call.check(call.run(), TOLERANCE)

    @pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[5] and shape[1] * shape[3] < 250], ids=str)
    def test_slots_are_products_in_fp16_and_equal_the_definition(shape, monkeypatch):
        if shape[1] * shape[3] < 110:
            tile(monkeypatch, SMALL)
        call = Call(shape, torch.float16)
        call.check(call.run(), HALF_TOLERANCE)

    @pytest.mark.parametrize("tiles", [SMALL, WIDE], ids=["small", "wide"])
    @pytest.mark.parametrize("documents", DOCUMENTS, ids=lambda d: f"{len(d) - 1} documents")
    def test_documents_do_not_see_each_other(documents, tiles, monkeypatch):
        tile(monkeypatch, tiles)
        call = Call((2, 36, 1, 1 if tiles is SMALL else 3, 32, 1), documents=documents)
        call.check(call.run(), TOLERANCE)

    @pytest.mark.parametrize(
        ("shape", "key_time"),
        [((2, 1, 1, 4, 32, 3), 37), ((1, 11, 2, 3, 32, 2), 60), ((1, 8, 1, 8, 64, 0), 9)],
        ids=str,
    )
    def test_queries_may_be_the_last_of_the_keys(shape, key_time, monkeypatch):
        tile(monkeypatch, SMALL)
        call = Call(shape, key_time=key_time)
        call.check(call.run(), TOLERANCE)

    @pytest.mark.parametrize("group", [2, 3])
    @pytest.mark.parametrize("extreme", EXTREMES, ids=str)
    def test_extreme_scores(extreme, group, monkeypatch):
        tile(monkeypatch, SMALL)
        call = Call((1, 20, 1, group, 32, 3), **extreme)
        call.check(call.run(), TOLERANCE)

    @pytest.mark.parametrize("layout", ["projection", "heads", "gaps"])
    def test_inputs_are_read_where_they_lie(layout):
        call = Call((2, 9, 2, 2, 48, 2), layout=layout)
        call.check(call.run(), TOLERANCE)

    @pytest.mark.parametrize("split", [None, 1])
    def test_layers_of_a_stream_leave_what_their_slots_pull(split):
        call = Call((2, 9, 2, 2, 32, 3))
        call.check(call.run(split), TOLERANCE)
        call.check(call.run_as_layers(split), TOLERANCE)

    def test_same_bits_from_the_same_inputs():
        first, second = (Call((1, 20, 1, 2, 32, 3), documents=[0, 13, 20]).run() for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)

    @pytest.mark.parametrize("together", [1, 2, 3, 6])
    def test_pairs_that_take_turns_are_all_gone_through(together, monkeypatch):
        tile(monkeypatch, SMALL)
        monkeypatch.setattr(launches, "taking_turns", lambda pairs, tiles, nbytes: together)
        call = Call((2, 20, 3, 2, 32, 1))
        call.check(call.run(), TOLERANCE)

    @pytest.mark.parametrize(
        ("pairs", "tiles", "nbytes", "together"),
        [
            (8, 4096, 2**24, 1),
            (8, 512, 2**22, 4),
            (8, 64, 2**23, 4),
            (8, 1, 2**10, 8),
            (6, 100, 2**21, 6),
            (7, 300, 2**22, 7),
        ],
    )
    def test_as_many_pairs_take_turns_as_fit_the_cache_and_fill_the_device(pairs, tiles, nbytes, together):
        assert launches.taking_turns(pairs, tiles, nbytes) == together

    @pytest.mark.parametrize(
        ("q", "k", "words"),
        [
            (torch.zeros(1, 2, 2, 24), torch.zeros(1, 2, 1, 24), "head_dim"),
            (torch.zeros(1, 2, 129, 32), torch.zeros(1, 2, 1, 32), "128 query heads a kv head, not 129"),
            (torch.zeros(1, 2, 1, 32, dtype=torch.float64), torch.zeros(1, 2, 1, 32), "float64"),
            (torch.zeros(1, 2, 1, 32), torch.zeros(1, 3, 1, 32), "fewer than the keys"),
        ],
    )
    def test_what_it_cannot_do_gets_a_reason(q, k, words):
        assert words in str(fused.unusable(q, k, torch.tensor([0, 2])))

    def test_it_takes_documents_and_fp32():
        q = torch.zeros(1, 2, 2, 32)
        assert fused.unusable(q, q[:, :, :1], torch.tensor([0, 2])) is None

    @pytest.mark.parametrize(
        "backends", [["fused", "fused", "reference"], ["reference", "fused", "reference"]], ids=str
    )
    def test_layers_of_a_stream_may_have_backends_whose_lse_differs_in_dtype(backends):
        def gradients(dtype, backends):
            x = torch.linspace(-2, 2, 4 * 32, dtype=torch.float64).sin().view(1, 4, 1, 32).to(dtype).requires_grad_()
            stream = moda.DepthStream(3, 1, 4, 1, 32, slots_per_layer=1, dtype=dtype, device="cpu")
            handle, total = stream.start(), 0
            for layer, backend in enumerate(backends):
                k, v, handle = stream.write(handle, layer, 0, (layer + 1) * x, x.square())
                out, handle = stream.attend(handle, layer, x + layer, k, v, backend=backend)
                total = total + out.square()
            stream.finish(handle, total).sum().backward()
            return x.grad.double()

        got, want = gradients(torch.float32, backends), gradients(torch.float64, ["reference"] * 3)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
