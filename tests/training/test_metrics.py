"""`metrics.jsonl` survives kills and rewinds; progress lines and forecasts say what happened."""

import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from training.metrics import (
    Console,
    MetricsLog,
    TrainingClock,
    format_count,
    format_duration,
    progress_line,
    read_metrics,
)

ROOT = Path(__file__).resolve().parents[2]


def strict(line: str) -> dict:
    """Parse as a parser would that knows nothing but the JSON standard."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return json.loads(line, parse_constant=refuse)


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def strict_steps(path: Path) -> list[int]:
    return [strict(line)["step"] for line in path.read_text().splitlines()]


def test_a_record_is_one_line_with_the_values_given(tmp_path):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    returned = log.append(10, 320, {"train/loss": 4.5, "train/lr": 1e-3})
    assert returned == {"step": 10, "tokens": 320, "train/loss": 4.5, "train/lr": 1e-3}
    assert [strict(line) for line in log.path.read_text().splitlines()] == [returned]
    assert read_metrics(log.path) == [returned]


def test_values_that_are_not_finite_become_null_and_read_back_as_nan(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, 8, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0})
    assert strict(log.path.read_text()) == {"step": 1, "tokens": 8, "a": None, "b": None, "c": None, "d": 0.0}
    (record,) = read_metrics(log.path)
    assert [math.isnan(record[key]) for key in "abcd"] == [True, True, True, False]


def test_a_step_cannot_stand_twice(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(3, 8, {"train/loss": 1.0})
    for step in (3, 2):
        with pytest.raises(ValueError, match=f"Step {step} cannot follow step 3"):
            log.append(step, 8, {"train/loss": 1.0})
    reopened = MetricsLog(log.path)
    with pytest.raises(ValueError, match="cannot follow"):
        reopened.append(3, 8, {})


def test_every_ended_line_parses_after_sigkill_and_the_log_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = f"""
import itertools
from training.metrics import MetricsLog
log = MetricsLog({str(path)!r})
for step in itertools.count():
    log.append(step, step, {{f"validation/domain_{{i}}/loss": 1 / 3 for i in range(50)}})
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 30
    while not (path.exists() and path.stat().st_size > 200_000):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    ended = path.read_text().rpartition("\n")[0].splitlines()
    written = [strict(line)["step"] for line in ended]
    assert written == list(range(len(written)))
    log = MetricsLog(path)
    log.append(log.last_step + 1, 0, {})
    everything = [strict(line)["step"] for line in path.read_text().splitlines()]
    assert everything == list(range(log.last_step + 1))
    assert len(everything) > len(written)


def test_a_torn_last_line_is_removed_when_the_log_is_opened(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "tokens": 8}\n{"step": 2, "tok')
    log = MetricsLog(path)
    log.append(2, 16, {"train/loss": 2.0})
    assert [strict(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_whole_record_that_lacks_only_its_line_end_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "tokens": 8}\n{"step": 2, "tokens": 16}')
    MetricsLog(path).append(3, 24, {})
    assert steps(path) == [1, 2, 3]


def test_rewind_keeps_what_the_checkpoint_knows_and_each_step_stands_once(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(0, 50, 10):
        log.append(step, step, {"train/loss": math.nan if step == 10 else 1.0})
    log.rewind(25)
    assert steps(log.path) == [0, 10, 20]
    log.append(30, 30, {"train/loss": 2.0})
    assert steps(log.path) == [0, 10, 20, 30]
    assert strict(log.path.read_text().splitlines()[1])["train/loss"] is None
    log.rewind(-1)
    assert log.path.read_text() == ""
    log.append(0, 0, {})


def test_a_kill_during_rewind_leaves_the_old_log_whole(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(3):
        log.append(step, step, {})

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        log.rewind(0)
    assert steps(log.path) == [0, 1, 2]


def test_a_damaged_line_is_named_and_skipped_but_a_line_being_written_is_not_damage(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "tokens": 8}\nnonsense\n[1]\n{"tokens": 3}\n{"step": 2, "a": "x"}\n{"step": 5, "a": 1}\n{"st'
    )
    told: list[str] = []
    assert [record["step"] for record in read_metrics(path, told.append)] == [1, 5]
    assert [sentence.split(" is not")[0] for sentence in told] == [f"{path}, line {n}" for n in (2, 3, 4, 5)]


def test_a_progress_line_shows_what_the_record_holds_in_human_numbers():
    stream = io.StringIO()
    record = {
        "step": 120,
        "tokens": 1,
        "train/loss": 5.21344,
        "train/lr": 3e-4,
        "train/grad_norm": 1.2,
        "throughput/tokens_per_second": 12345.0,
        "throughput/mfu": 0.412,
        "memory/peak_gb": 3.2,
        "time/elapsed_seconds": 3780.0,
        "validation/mean/loss": 5.4,
    }
    Console(2000, stream=stream).progress(record, remaining=65.0)
    assert stream.getvalue() == (
        "step   120/2,000 | loss  5.2134 | lr 3.00e-04 | grad norm  1.200 | 12.3 k tok/s | MFU 41.2 % |  3.20 GB"
        " | 1 h 03 min elapsed | 1 min 05 s left | validation 5.4000\n"
    )
    assert "skipped" not in progress_line(record | {"train/skipped_steps": 0.0}, 2000)
    skipped = progress_line(record | {"train/skipped_steps": 3.0}, 2000, 65.0)
    assert skipped.endswith("left | 3 skipped | validation 5.4000")


def test_a_progress_line_of_step_0_holds_only_validation():
    stream = io.StringIO()
    Console(50, stream=stream).progress(
        {"step": 0, "tokens": 0, "validation/mean/loss": 9.0, "validation/c4/loss": 9.0}
    )
    assert stream.getvalue() == "step  0/50 | validation 9.0000\n"


def test_other_ranks_print_nothing(capsys):
    console = Console(10, enabled=False)
    console.say("hello")
    console.progress({"step": 1, "tokens": 2})
    assert capsys.readouterr().out == ""


def test_pauses_are_no_time_in_steps_and_one_inside_another_counts_once():
    time_now = 0.0
    clock = TrainingClock(0, now=lambda: time_now)
    time_now += 4.0
    with clock.paused():
        time_now += 100.0
        assert clock.stepping == 4.0
        with clock.paused():
            time_now += 100.0
        time_now += 100.0
        assert clock.stepping == 4.0
    time_now += 2.0
    assert clock.stepping == clock.lap(1) == 6.0


def test_the_forecast_leaves_out_first_steps_and_evaluation():
    time_now = 0.0
    clock = TrainingClock(100, warmup_steps=2, now=lambda: time_now)
    time_now += 60.0  # compiling
    assert clock.lap(101) == 60.0
    time_now += 30.0
    assert clock.lap(102) == 30.0
    assert clock.remaining(10) is None
    with clock.paused():
        time_now += 500.0
    time_now += 20.0
    assert clock.lap(112) == 2.0
    assert clock.remaining(10) == 20.0
    with clock.paused():
        time_now += 500.0
    assert clock.remaining(0) == 0.0
    assert clock.elapsed == 60 + 30 + 500 + 20 + 500
    with pytest.raises(ValueError, match="at least one"):
        clock.lap(112)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7.5, "7.50"), (950, "950"), (999.7, "1.00 k"), (12345, "12.3 k"), (1.2e6, "1.20 M"), (4e11, "400 B"),
     (math.nan, "nan")],
)  # fmt: skip
def test_counts_have_three_digits_and_a_unit(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (3599.7, "1 h 00 min"), (3780, "1 h 03 min"),
     (86399, "1 d 00 h"), (187200, "2 d 04 h")],
)  # fmt: skip
def test_durations_show_two_units_that_never_overflow(seconds, text):
    assert format_duration(seconds) == text


def test_a_full_disk_keeps_records_until_there_is_room_and_leaves_no_half_line(tmp_path, capsys):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, 10, {"train/loss": 5.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 10, hard))  # ten bytes of the next line
        for step in (2, 3):
            log.append(step, 10, {"train/loss": 5.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert [record["step"] for record in read_metrics(log.path)] == [1]
    assert log.path.read_bytes().endswith(b"\n")
    assert capsys.readouterr().err.count(f"warning: {log.path} cannot be written") == 1
    log.append(4, 10, {"train/loss": 5.0})
    log.close()
    assert [record["step"] for record in read_metrics(log.path)] == [1, 2, 3, 4]


class FullDisk(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


def test_output_that_goes_to_a_full_disk_ends_nothing(tmp_path, monkeypatch):
    Console(60, stream=FullDisk()).say("step 1")
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with monkeypatch.context() as full:
        full.setattr(sys, "stderr", FullDisk())
        full.setattr(log, "_file", SimpleNamespace(write=FullDisk().write, fileno=log._file.fileno))
        log.append(1, 1, {})
    log.append(2, 2, {})
    assert [record["step"] for record in read_metrics(log.path)] == [1, 2]


def test_a_log_that_can_no_longer_be_written_nor_cut_is_two_warnings_and_no_error(tmp_path, monkeypatch, capsys):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, 10, {})
    file = log._file

    def half(line):
        return file.write(line[:5])

    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as immutable:
        immutable.setattr(os, "ftruncate", refused)
        immutable.setattr(log, "_file", SimpleNamespace(write=half, fileno=file.fileno, close=refused))
        log.append(2, 20, {})
        log.append(3, 30, {})
        log.close()
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {log.path} cannot be written (No space left on device): its records are kept and tried again with "
        "the next",
        f"warning: {log.path} lacks its last records (2), which cannot be written: make room or give access there",
    ]
    log.close()  # where it can be written again
    assert strict_steps(log.path) == [1, 2, 3]


@pytest.mark.parametrize("lost", ["removed", "folder moved", "replaced"])
def test_a_log_that_is_gone_from_its_path_is_written_again_with_all_records(lost, tmp_path, capsys):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.append(1, 10, {})
    if lost == "folder moved":
        log.path.parent.rename(tmp_path / "elsewhere")
    else:
        log.path.unlink()
    if lost == "replaced":
        log.path.write_text("nonsense")
    log.append(2, 20, {})
    log.append(3, 30, {})
    log.close()
    assert strict_steps(log.path) == [1, 2, 3]
    assert capsys.readouterr().err == (
        f"warning: {log.path} was removed, moved or replaced: it is written again, with all records so far\n"
    )


def test_a_log_that_is_gone_and_cannot_be_written_again_is_a_warning_until_it_can(tmp_path, capsys):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.append(1, 10, {})
    log.path.parent.rename(tmp_path / "elsewhere")
    log.path.parent.write_text("a file in place of the folder")
    log.append(2, 20, {})
    assert f"warning: {log.path} cannot be written (" in capsys.readouterr().err
    log.path.parent.unlink()
    log.append(3, 30, {})
    assert strict_steps(log.path) == [1, 2, 3]
