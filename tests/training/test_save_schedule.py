"""When saves begin, and when training waits for one: scenarios of steps and writes, played without either."""

from functools import partial
from unittest.mock import ANY

import pytest

from training.save_schedule import SaveSchedule, steps_of_write


def play(every, writes, steps, *, loaded=0, put_off=(), **options):
    """What the trainer and the saver do with a schedule up to step `steps`, from a checkpoint of step `loaded` on.

    `writes`: steps that each write takes, the last one for all further ones. After the steps `put_off` none begins.
    Returns the steps after which saves begin, those after which training waits for a write, and what was said.
    """
    schedule = SaveSchedule(every, **{"permanent_every": None, "asynchronous": True, **options})
    schedule.begun = written = loaded
    writing, due, saves, waits, said = None, False, [], [], []

    def end_write(step):
        nonlocal writing, written
        if writing is None:
            return
        (written, takes), writing = writing, None
        if step < written + takes:
            waits.append(step)
        if schedule.lead:
            said.append(schedule.learn(steps_of_write(takes, step - written, step - written)))

    for step in range(loaded + 1, steps + 1):
        assert step - written <= every or put_off, "a kill now loses too much"
        due |= schedule.is_due(step)
        if due and step not in put_off:
            end_write(step)
            schedule.begun, due, writing = step, False, (step, writes[min(len(saves), len(writes) - 1)])
            saves.append(step)
            if not schedule.asynchronous:
                written, writing = step, None
        if writing is not None and schedule.is_at_bound(step, written):
            end_write(step)
    return saves, waits, [sentence for sentence in said if sentence]


SCENARIOS = {
    "a tenth ahead": (partial(play, 1000, [50], 3000), [900, 1800, 2700], []),
    "as long as it has": (partial(play, 1000, [99], 3000), [900, 1800, 2700], []),
    "no step to spare": (partial(play, 1000, [100], 3000), [900, 1700, 2500], []),
    "too long once": (partial(play, 1000, [250], 3500), [900, 1600, 2300, 3000], [1000]),
    "the slowest counts": (partial(play, 1000, [50, 250, 50], 3500), [900, 1800, 2500, 3200], [1900]),
    "slow once, forgotten": (partial(play, 1000, [250, 50], 5500), [900, 1600, 2300, 3000, 3700, 4600, 5500], [1000]),
    "half at the most": (partial(play, 1000, [499], 2500), [900, 1400, 1900, 2400], [1000]),
    "longer than that": (partial(play, 1000, [700], 2000), [900, 1400, 1900], [1000, 1900]),
    "least with a lead": (partial(play, 10, [3], 27), [9, 15, 21, 27], [10]),
    "none": (partial(play, 9, [3], 27), [9, 18, 27], [9, 18, 27]),
    "each step": (partial(play, 1, [1], 3), [1, 2, 3], [1, 2, 3]),
    "permanent ones": (partial(play, 1000, [50], 4000, permanent_every=1500), [900, 1500, 2400, 3000, 3900], []),
    "permanent alone": (partial(play, 1000, [50], 1000, permanent_every=300), [300, 600, 900], []),
    "permanent, slower": (partial(play, 1000, [350], 1000, permanent_every=300), [300, 600, 900], [600, 900]),
    "continued": (partial(play, 1000, [50], 3100, loaded=1234), [2134, 3034], []),
    "waiting": (partial(play, 1000, [0], 3000, asynchronous=False), [1000, 2000, 3000], []),
    "waiting, continued": (partial(play, 1000, [0], 2500, asynchronous=False, loaded=900), [1000, 2000], []),
    "waiting, less than ten": (partial(play, 4, [0], 9, asynchronous=False, permanent_every=3), [3, 4, 6, 8, 9], []),
    "put off": (partial(play, 1000, [50], 2000, put_off=range(850, 1004)), [1004, 1904], [1004]),
    "put off a little": (partial(play, 1000, [50], 1900, put_off=range(850, 930)), [930, 1830], []),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_saves_begin_so_far_ahead_as_writes_take_and_training_waits_at_the_bound(scenario):
    played, expected_saves, expected_waits = SCENARIOS[scenario]
    assert played() == (expected_saves, expected_waits, ANY)


def test_a_write_that_takes_more_than_half_of_the_interval_is_said_once_with_the_remedy():
    assert play(1000, [499], 9000)[2] == []
    (sentence,) = play(1000, [700, 800], 9000)[2]
    assert sentence == (
        "warning: a checkpoint takes 701 steps to be written, and checkpoint.every=1000 leaves at most 500: training "
        "waits for the rest of each; it would not with checkpoint.every=1410 or more"
    )
    saves, waits, said = play(1410, [700], 9000)
    assert (waits, said) == ([saves[0] + 141], []), "the remedy is one"


def test_where_writes_begin_to_be_waited_for_saves_come_at_multiples_again():
    schedule = SaveSchedule(1000, None, asynchronous=True)
    schedule.begun = 900
    assert (schedule.lead, schedule.is_due(1000)) == (100, False)
    schedule.asynchronous = False
    assert (schedule.lead, schedule.is_due(1000), schedule.is_due(1800)) == (0, True, False)


def test_the_steps_of_a_write_are_rounded_up_and_one_more():
    assert steps_of_write(12.0, 100, 50.0) == 25
    assert steps_of_write(12.1, 100, 50.0) == 26
    assert steps_of_write(0.0, 100, 50.0) == 1
    assert steps_of_write(12.0, 0, 0.0) == 0, "no step was done beside it"


def test_a_write_of_unknown_length_teaches_nothing():
    schedule = SaveSchedule(100, None, asynchronous=True)
    for steps in (45, 0, 0, 0, 0):
        schedule.learn(steps)
    assert schedule.lead == 50
