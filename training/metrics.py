"""What a run says about itself: `metrics.jsonl`, progress lines, and the clock that both are timed with.

In: values of a step (losses, learning rate, throughput, ...). Out: `metrics.jsonl` with one JSON object a logged step,
and plain lines on standard output. wandb, curves and reports are all made from the records of `metrics.jsonl`.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from data.shards import write_atomically

Record = dict[str, Any]  # "step" and "tokens" are int, every other value is float


class MetricsLog:
    """An append-only `metrics.jsonl`: one object a step, steps rising, every ended line parses at any moment.

    A record is one unbuffered `write` of a whole line, so a kill loses nothing that was logged. A SIGKILL inside that
    call, where it crosses a memory page, can leave a line without its end: `read_metrics` passes over it and opening
    the log removes it. JSON has no NaN or infinity: such a value is written as `null`, which strict parsers accept and
    `read_metrics` gives back as NaN.
    """

    def __init__(self, path: str | Path) -> None:
        """Open `path` for appending, made with its folder when missing."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._end_last_line()
        records = read_metrics(self.path) if self.path.exists() else []
        self.last_step: int = records[-1]["step"] if records else -1
        self._unwritten: list[bytes] = []  # lines that the system did not take, oldest first
        self._file = self._open()

    def append(self, step: int, tokens: int, values: Mapping[str, float]) -> Record:
        """Write the record of `step` (optimizer steps done) and return it, values as floats, infinities as NaN.

        Raises ValueError when `step` is not after the last one: all values of a step are one record.
        """
        if step <= self.last_step:
            raise ValueError(f"Step {step} cannot follow step {self.last_step} in {self.path}: each step stands once.")
        finite_or_nan = {key: float(v) if math.isfinite(v) else math.nan for key, v in values.items()}
        record: Record = {"step": int(step), "tokens": int(tokens), **finite_or_nan}
        self._unwritten.append(_to_line(record))
        self._write()
        self.last_step = record["step"]
        return record

    def rewind(self, step: int) -> None:
        """Keep the records up to and including `step`, in one atomic replacement (-1 empties the log)."""
        self._file.close()
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        write_atomically(self.path, b"".join(_to_line(record) for record in kept))
        self.last_step = kept[-1]["step"] if kept else -1
        self._file = self._open()

    def set_aside(self) -> Path:
        """Keep a copy of all records so far beside the file, under a name of their last step."""
        kept = self.path.with_name(f"{self.path.stem}-to-step-{self.last_step}{self.path.suffix}")
        write_atomically(kept, self.path.read_bytes())
        return kept

    def sync(self) -> None:
        """Have what is written survive a machine that stops; from any thread."""
        with suppress(OSError, ValueError):  # records, or a file that is just replaced, are no reason to go without
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; the records are on disk already, but for those that the system still does not take."""
        self._write()
        if self._unwritten:
            lost = len(self._unwritten)
            _warn(
                f"{self.path} lacks its last records ({lost}), which cannot be written: make room or give access there"
            )
        with suppress(OSError):
            self._file.close()

    def _write(self) -> None:
        """Write what is not written yet. A failure is a warning: training goes on, the next record tries again."""
        waiting = len(self._unwritten) > 1
        try:
            self._put_back()
            while self._unwritten:
                self._cut()
                line = self._unwritten[0]
                if self._file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._size += len(line)
                self._unwritten.pop(0)
        except OSError as error:
            with suppress(OSError):
                self._cut()
            if not waiting:
                reason = error.strerror or error
                _warn(f"{self.path} cannot be written ({reason}): its records are kept and tried again with the next")

    def _cut(self) -> None:
        """Remove what a disk took of a line before it was full."""
        if os.fstat(self._file.fileno()).st_size > self._size:
            os.ftruncate(self._file.fileno(), self._size)

    def _put_back(self) -> None:
        """Make the file again where it was removed or moved: what is open still has its records."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno())):
                return
        records = os.pread(self._file.fileno(), self._size, 0)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, records)
        lost, self._file = self._file, self._open()
        lost.close()
        _warn(f"{self.path} was removed, moved or replaced: it is written again, with all records so far")

    def _open(self) -> io.FileIO:
        file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
        self._size = os.fstat(file.fileno()).st_size  # of whole lines
        return file

    def _end_last_line(self) -> None:
        content = self.path.read_bytes() if self.path.exists() else b""
        ended = content.rfind(b"\n") + 1
        if ended == len(content):
            return
        try:
            json.loads(content[ended:])
        except ValueError:
            os.truncate(self.path, ended)
        else:  # the object is whole, only its line is not
            with open(self.path, "ab") as file:
                file.write(b"\n")


def read_metrics(path: str | Path, on_damage: Callable[[str], None] = warnings.warn) -> list[Record]:
    """The records of a `metrics.jsonl`, in file order; `null` comes back as NaN.

    A line that is no record is reported to `on_damage` in one sentence and skipped. A last line without its end is a
    record being written, not damage. Raises OSError when the file cannot be read.
    """
    records: list[Record] = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(keepends=True), start=1):
        try:
            record = json.loads(line)
            record = {key: math.nan if value is None else value for key, value in record.items()}
            if not (isinstance(record["step"], int) and all(isinstance(v, int | float) for v in record.values())):
                raise ValueError
        except (ValueError, AttributeError, KeyError):
            if line.endswith(b"\n"):
                on_damage(f"{path}, line {number} is not a metrics record and was skipped: {line[:60]!r}")
        else:
            record.setdefault("tokens", 0)
            records.append(record)
    return records


def _warn(text: str) -> None:
    with suppress(OSError):  # standard error may go to the same disk
        print(f"warning: {text}", file=sys.stderr)


def _to_line(record: Record) -> bytes:
    values = {key: value if math.isfinite(value) else None for key, value in record.items()}
    return json.dumps(values, allow_nan=False).encode() + b"\n"


class TrainingClock:
    """Time spent in training steps, with evaluation, checkpoints and the first steps left out of the forecast.

    `lap` gives the seconds a step since the lap before; `remaining` forecasts from all laps but those of the first
    `warmup_steps` steps of this process, which compile, allocate and fill caches.
    """

    def __init__(
        self, step: int, *, before: float = 0.0, warmup_steps: int = 3, now: Callable[[], float] = time.perf_counter
    ) -> None:
        """Start at `step` (steps done before this process, 0 for a new run), which took `before` seconds.

        `now` returns seconds.
        """
        self._now = now
        self._before = before
        self._start = now()
        self._pause_start: float | None = None  # of a pause that lasts
        self._paused = 0.0  # seconds of all pauses that have ended
        self._lap_step, self._lap_start = step, 0.0  # the latter in seconds of `stepping`
        self._warm_step = step + warmup_steps
        self._measured_steps = 0
        self._measured_seconds = 0.0

    @property
    def elapsed(self) -> float:
        """Wall-clock seconds of all starts of the run together, pauses included."""
        return self._before + self._now() - self._start

    @property
    def stepping(self) -> float:
        """Seconds of this start, pauses left out."""
        now = self._now() if self._pause_start is None else self._pause_start
        return now - self._start - self._paused

    @property
    def paused_seconds(self) -> float:
        """Of this start, in all pauses that have ended."""
        return self._paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside (evaluation, checkpoint, plot) out of laps and forecast."""
        if self._pause_start is not None:  # a part of the pause around it
            yield
            return
        self._pause_start = self._now()
        try:
            yield
        finally:
            self._paused += self._now() - self._pause_start
            self._pause_start = None

    def lap(self, step: int, seconds: float | None = None) -> float:
        """Seconds a step since the last lap, pauses left out. Raises ValueError when no step was done since.

        `seconds`: of all these steps, where a device has measured them itself.
        """
        steps = step - self._lap_step
        if steps <= 0:
            raise ValueError(f"No step between {self._lap_step} and {step}: a lap needs at least one.")
        end = self.stepping
        seconds = end - self._lap_start if seconds is None else seconds
        if self._lap_step >= self._warm_step:
            self._measured_steps += steps
            self._measured_seconds += seconds
        self._lap_start, self._lap_step = end, step
        return seconds / steps

    def remaining(self, steps: int) -> float | None:
        """Seconds that `steps` more steps take at the measured rate; None until a lap after the first steps is done."""
        if not self._measured_steps:
            return None
        return steps * self._measured_seconds / self._measured_steps


class Console:
    """Plain progress lines, the same in a terminal and in a log file; silent on every rank but the first."""

    def __init__(self, total_steps: int, *, enabled: bool = True, stream: TextIO | None = None) -> None:
        """`total_steps`: where the run ends; `enabled`: false on all ranks but 0; `stream`: default standard output."""
        self.total_steps = total_steps
        self._enabled = enabled
        self._stream = stream

    def say(self, text: str) -> None:
        """Print one line at once; where that is impossible (a log on a full disk), training goes on without."""
        if self._enabled:
            with suppress(OSError):
                print(text, file=self._stream or sys.stdout, flush=True)

    def progress(self, record: Mapping[str, float], remaining: float | None = None) -> None:
        """Print the progress line of a record of `metrics.jsonl`; `remaining`: seconds left, where that is known."""
        self.say(progress_line(record, self.total_steps, remaining))


def progress_line(record: Mapping[str, float], total_steps: int, remaining: float | None = None) -> str:
    """One readable line of what `record` holds, columns aligned from line to line; keys it lacks leave no trace."""
    total = f"{total_steps:,}"
    parts = [f"step {record['step']:>{len(total)},}/{total}"]
    columns: list[tuple[str, Callable[[float], str]]] = [
        ("train/loss", lambda v: f"loss {v:7.4f}"),
        ("train/lr", lambda v: f"lr {v:.2e}"),
        ("train/grad_norm", lambda v: f"grad norm {v:6.3f}"),
        ("throughput/tokens_per_second", lambda v: f"{format_count(v):>6} tok/s"),
        ("throughput/mfu", lambda v: f"MFU {100 * v:4.1f} %"),
        ("memory/peak_gb", lambda v: f"{v:5.2f} GB"),
        ("time/elapsed_seconds", lambda v: f"{format_duration(v)} elapsed"),
    ]
    parts += [show(record[key]) for key, show in columns if key in record]
    if remaining is not None:
        parts.append(f"{format_duration(remaining)} left")
    # Last: most lines lack these two, and the columns before them stay aligned.
    if skipped := record.get("train/skipped_steps"):
        parts.append(f"{skipped:.0f} skipped")
    if "validation/mean/loss" in record:
        parts.append(f"validation {record['validation/mean/loss']:.4f}")
    return " | ".join(parts)


def format_count(value: float) -> str:
    """Three significant digits and a unit: 950, 12.3 k, 1.20 M, 400 B."""
    if not math.isfinite(value):
        return str(value)
    for unit in ("", " k", " M", " B"):
        if abs(value) < 999.5 or unit == " B":
            break
        value /= 1000
    digits = 0 if abs(value) >= 99.95 or (not unit and value == int(value)) else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}{unit}"


def format_duration(seconds: float) -> str:
    """The two largest units that matter: 45 s, 3 min 05 s, 1 h 03 min, 2 d 04 h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(whole / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(whole / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"
