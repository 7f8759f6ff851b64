"""One of two ranks is lost, under torchrun."""

from __future__ import annotations

import re
import subprocess
import sys
import time

from scripts.fault_injection.bench import INJECT, ROOT, SETTINGS, Bench, Row, records

LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts"]
LOAD = """
from torch.distributed.checkpoint import FileSystemReader
_read = FileSystemReader.read_data
def read_data(self, *arguments):
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        time.sleep(1000)
    return _read(self, *arguments)
FileSystemReader.read_data = read_data
"""
AGAIN = """
def batch(self, position):
    if os.environ["RANK"] == "1" and position == 4 * 23:
        raise RuntimeError("as always")
    return _batch(self, position)
BatchLoader.batch = batch
"""


def ranks(bench: Bench, times: int) -> list[Row]:
    """One of two ranks is killed, sleeps, stands still, or raises; torchrun starts both again."""
    actions = {
        "killed": "os.kill(os.getpid(), signal.SIGKILL)",
        "sleeps": "time.sleep(1000)",
        "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
        "raises": "(_ for _ in ()).throw(OSError('the disk is gone'))",
    }
    rows = []
    undisturbed = _launch(bench, "rank-undisturbed", "")
    assert undisturbed.returncode == 0, f"the undisturbed run failed: {undisturbed.stderr[-2000:]}"
    expected = records(bench.run_dir("rank-undisturbed"))
    faults = {name: f"_inject(23, lambda: {action}, rank='1')" for name, action in actions.items()}
    for name, inject in {**faults, "sleeps in the load": LOAD}.items():
        run_dir = bench.run_dir(f"rank-{name.replace(' ', '-')}")
        where = "before step 24"
        if inject == LOAD:
            where = "of step 20"
            _launch(bench, run_dir.name, "", "training.stop_at=20")
        begun = time.monotonic()
        done = _launch(bench, run_dir.name, inject)
        found = re.search(r"error: ([^\n]*?);", done.stderr)
        passed = done.returncode == 0 and records(run_dir) == expected and found is not None and "rank 1" in found[1]
        traces = {file.name for file in run_dir.glob("stacks/*")}  # of all that could still write them
        passed &= traces == {"rank-0.txt", "rank-1.txt"} if "sleeps" in name else "rank-0.txt" in traces
        how = f"{where}, {time.monotonic() - begun:.0f} s with the restart"
        lost = "nothing" if inject == LOAD else "3 steps, made again"
        rows.append(Row(f"rank 1 {name}", how, 1, lost, found[1] if found else "", passed))
    done = _launch(bench, "rank-again", AGAIN, restarts=4)
    found = re.search(r"error: (3 starts in a row[^\n]*?):", done.stderr)
    passed = done.returncode == 1 and found is not None
    message = found[1] if found else ""
    rows.append(Row("rank 1 raises, always", "before step 24", 1, "3 steps, to be made again", message, passed))
    return rows


def _launch(
    bench: Bench, name: str, inject: str, *overrides: str, restarts: int = 1
) -> subprocess.CompletedProcess[str]:
    """A run on two ranks, to its end, with what it printed."""
    script = bench.folder / f"{name}.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n{INJECT}\n{inject}\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, *LAUNCHER, str(restarts), str(script), *SETTINGS, f"data.path={bench.folder / 'shards'}"]
    command += [f"run.dir={bench.run_dir(name)}", "training.hang_seconds=10", *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
