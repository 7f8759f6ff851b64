"""The depth kernels in Triton's interpreter, in fp32, against `moda.reference` in float64."""

import importlib.util
import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moda import kernels
from tests.moda.interpreter import run_interpreted

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

if not kernels.INTERPRETED:

    @pytest.mark.slow
    def test_in_the_interpreter():
        run_interpreted(__file__)

    def test_a_cpu_is_not_available_without_the_interpreter():
        assert not kernels.available("cpu")

else:
    from moda.kernels import depth
    from moda.kernels.depth import Configuration
    from tests.moda.kernel_cases import Case, backward_query, backward_slots, forward

    TOLERANCE = 1e-5
    VECTOR, TENSOR = Configuration(0, 4, 4, 2), Configuration(1, 16, 1, 2)
    ROWS = Configuration(1, 16, 4, 2, rows=4)
    CONFIGS = {"table": None, "vector": VECTOR, "tensor": TENSOR}
    QUERY_CONFIGS = {**CONFIGS, "rows": ROWS}  # of the backward to the queries

    # batch, time, kv_heads, group, head_dim, slots
    SHAPES = [
        (1, 1, 1, 1, 32, 1),
        (2, 2, 1, 2, 64, 7),
        (1, 65, 1, 2, 32, 7),
        (3, 2, 2, 3, 48, 33),
        (1, 2, 3, 8, 64, 33),
        (2, 1, 1, 16, 96, 7),
        (1, 5, 2, 4, 128, 17),
        (1, 3, 1, 32, 80, 2),
        (2, 3, 2, 1, 112, 16),
    ]

    @pytest.mark.parametrize("config", CONFIGS)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_forward_equals_the_reference(shape, config):
        case = Case(shape, torch.float32)
        case.check("o lse", *forward(case, CONFIGS[config]), TOLERANCE)

    def test_forward_over_no_slots_changes_nothing():
        case = Case((1, 2, 1, 2, 32, 0), torch.float32)
        got, want = forward(case)
        assert all(torch.equal(g, w.float()) for g, w in zip(got, want, strict=True))

    EXTREMES = [{"spread": 30.0}, {"dominant": 50.0}, {"spread": 0.0}]

    @pytest.mark.parametrize("config", ["vector", "tensor", "rows"])
    @pytest.mark.parametrize("extreme", EXTREMES, ids=str)
    def test_forward_and_query_hold_for_extreme_logits(extreme, config):
        case = Case((1, 6, 1, 2, 32, 5), torch.float32, **extreme)
        case.check("o lse", *forward(case, CONFIGS.get(config)), TOLERANCE)
        case.check("dq delta dk dv", *backward_query(case, QUERY_CONFIGS[config], everything=True), TOLERANCE)

    @pytest.mark.parametrize("config", QUERY_CONFIGS)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_query_gradients_equal_the_reference(shape, config):
        case = Case(shape, torch.float32)
        case.check("dq", *backward_query(case, QUERY_CONFIGS[config]), TOLERANCE)

    @pytest.mark.parametrize("config", QUERY_CONFIGS)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_query_pass_computes_delta_and_slot_gradients_and_leaves_copies(shape, config):
        case = Case(shape, torch.float32)
        case.check("dq delta dk dv", *backward_query(case, QUERY_CONFIGS[config], everything=True), TOLERANCE)

    def test_query_pass_over_no_slots_still_computes_delta():
        case = Case((1, 2, 1, 2, 32, 0), torch.float32)
        case.check("dq delta dk dv", *backward_query(case, everything=True), TOLERANCE)

    @pytest.mark.parametrize("config", CONFIGS)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_slots_pull_their_gradients_from_the_readers(shape, config):
        case = Case(shape, torch.float32, readers=5)
        case.check("dk dv", *backward_slots(case, 1, 5, CONFIGS[config]), TOLERANCE)

    @pytest.mark.parametrize("config", CONFIGS)
    @pytest.mark.parametrize("shape", SHAPES[1:5], ids=str)
    def test_slots_pulled_in_two_passes(shape, config):
        case = Case(shape, torch.float32, readers=4)
        case.check("dk dv", *backward_slots(case, 0, 4, CONFIGS[config], blocked=True), TOLERANCE)

    @pytest.mark.parametrize("config", ["vector", "tensor"])
    @pytest.mark.parametrize("extreme", EXTREMES, ids=str)
    def test_slots_hold_for_extreme_logits(extreme, config):
        case = Case((1, 6, 1, 2, 32, 3), torch.float32, readers=3, **extreme)
        case.check("dk dv", *backward_slots(case, 0, 3, CONFIGS[config]), TOLERANCE)

    @pytest.mark.parametrize("config", ["vector", "tensor"])
    def test_slots_without_readers_get_zeros(config):
        case = Case((1, 3, 1, 2, 32, 2), torch.float32, readers=2)
        got, _ = backward_slots(case, 1, 1, CONFIGS[config])
        assert not any(g.any() for g in got)

    @pytest.mark.parametrize("config", QUERY_CONFIGS)
    def test_same_bits_from_the_same_inputs(config):
        def run():
            case = Case((2, 5, 2, 2, 32, 7), torch.float32, readers=3)
            results = [
                forward(case, CONFIGS.get(config)),
                backward_query(case, QUERY_CONFIGS[config], everything=True),
                backward_slots(case, 0, 3, CONFIGS.get(config), blocked=True),
            ]
            return [t for got, _ in results for t in got]

        assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))

    @pytest.mark.parametrize("kernel", [forward, backward_query, backward_slots], ids=lambda f: f.__name__)
    def test_kernels_are_registered_with_what_they_write_to(kernel, monkeypatch):
        """What an operator writes, and nothing else, is in its schema; it traces without running."""
        name, case = f"depth_{kernel.__name__}", Case((1, 3, 2, 2, 32, 2), torch.float32, readers=2)
        launch, calls = getattr(depth, name), []
        operator = getattr(torch.ops.moda, name).default

        def recorded(*arguments, **options):
            bound = inspect.signature(launch).bind(*arguments, **options)
            bound.apply_defaults()
            calls.append([a.clone() if isinstance(a, torch.Tensor) else a for a in bound.args])
            launch(*arguments, **options)

        monkeypatch.setattr(depth, name, recorded)
        kernel(case, **({"first": 0, "last": 2} if kernel is backward_slots else {}))
        for arguments in calls:
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))

    def test_a_mode_that_watches_operators_sees_them():
        case, seen = Case((1, 3, 2, 2, 32, 2), torch.float32, readers=2), []

        class Watching(TorchDispatchMode):
            def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
                seen.append(operator)
                return operator(*args, **(kwargs or {}))

        with Watching():
            forward(case)
        assert torch.ops.moda.depth_forward.default in seen

    def test_available_in_the_interpreter():
        assert kernels.available("cpu")
