"""Learning-rate schedules at their corners, and the paper's."""

import itertools

import pytest

from training.config import ScheduleConfig
from training.schedule import lr_factor


def factors(steps, **fields):
    return [lr_factor(ScheduleConfig(**fields), step, steps) for step in range(steps)]


def test_the_papers_schedule_warms_up_2000_steps_and_ends_at_a_tenth():
    steps = 95_367
    config = ScheduleConfig()
    assert 3e-4 * lr_factor(config, 0, steps) == pytest.approx(1.5e-7)
    assert 3e-4 * lr_factor(config, 1999, steps) == pytest.approx(3e-4)
    assert 3e-4 * lr_factor(config, (2000 + steps) // 2 - 1, steps) == pytest.approx(1.65e-4, rel=1e-3)
    assert 3e-4 * lr_factor(config, steps - 1, steps) == pytest.approx(3e-5)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_rates_rise_to_the_peak_then_fall_to_the_final_ratio(name):
    values = factors(50, name=name, warmup_steps=10, final_lr_ratio=0.2, decay_fraction=0.3)
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(a >= b for a, b in itertools.pairwise(values[9:]))
    assert values[-1] == pytest.approx(0.2)


def test_wsd_is_constant_until_its_decay():
    values = factors(100, name="wsd", warmup_steps=5, decay_fraction=0.2)
    assert values[4:80] == [1.0] * 76
    assert values[80] < 1.0


def test_constant_stays_at_the_peak():
    assert factors(10, name="constant", warmup_steps=0) == [1.0] * 10


def test_a_warm_up_longer_than_the_run_is_cut_not_compressed():
    assert factors(5, warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
