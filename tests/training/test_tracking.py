"""wandb holds what `metrics.jsonl` holds: one run id over kills and resumes, each step once, and never ends a run."""

import json
import math
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest

from training.config import WandbConfig
from training.metrics import MetricsLog, read_metrics
from training.tracking import WandbTracker, previous_run_id

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = WandbConfig(mode="offline")


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch):
    """No login of the person who runs the tests, and nothing written to their home."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))


def read_offline(run_dir: Path) -> dict[str, list[dict]]:
    """Run id -> records in all offline files of a run directory together, without wandb's own `_` keys."""
    runs: dict[str, list[dict]] = {}
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        entries = [json.loads(line) for line in printed.splitlines()]
        items = [entry["history"]["item"] for entry in entries if entry["type"] == "history"]
        assert all(item["_step"] == item["step"] for item in items)
        records = [{k: math.nan if v == "NaN" else v for k, v in i.items() if not k.startswith("_")} for i in items]
        runs.setdefault(file.stem.removeprefix("run-"), []).extend(records)
    return runs


def values(step: int) -> dict[str, float]:
    return {"train/loss": 5 - step / 7, "train/lr": 1e-3, **({"validation/mean/loss": 4.0} if step % 4 == 0 else {})}


def test_wandb_is_imported_only_when_it_is_used(tmp_path):
    code = f"""
import sys
from training.config import WandbConfig
from training.tracking import WandbTracker, previous_run_id
tracker = WandbTracker(WandbConfig(mode="disabled"), "name", {str(tmp_path)!r}, {{}}, "kept")
tracker.log({{"step": 1, "tokens": 1}})
tracker.finish()
assert tracker.run_id == "kept"
assert "wandb" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert list(tmp_path.iterdir()) == []


def test_an_offline_run_holds_the_keys_steps_and_values_of_metrics_jsonl(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    tracker = WandbTracker(OFFLINE, "name", tmp_path, {"model": {"norm": "pre"}})
    for step in (0, 10, 20):
        tracker.log(log.append(step, 32 * step, values(step)))
    tracker.log(log.append(30, 960, {"train/loss": math.nan}))
    tracker.finish()
    tracker.finish()
    ((run_id, records),) = read_offline(tmp_path).items()
    assert run_id == tracker.run_id
    assert records[:-1] == read_metrics(log.path)[:-1]
    assert math.isnan(records[-1]["train/loss"])


def test_after_a_kill_and_a_resume_there_is_one_run_and_each_step_stands_once(tmp_path):
    code = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.training.test_tracking import OFFLINE, values
from training.metrics import MetricsLog
from training.tracking import WandbTracker, previous_run_id
log = MetricsLog({str(tmp_path / "metrics.jsonl")!r})
tracker = WandbTracker(OFFLINE, "name", {str(tmp_path)!r}, {{}})
for step in range(400):  # more than the 32 KB that wandb-core keeps in memory
    tracker.log(log.append(step, step, {{**values(step), "time/elapsed_seconds": 0.25}}))
print(tracker.run_id, flush=True)
time.sleep(1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    # A process of its own, as a user's is: without the wandb-core that wandb hands to children of this process.
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert killed.returncode == -9, killed.stderr
    run_id = killed.stdout.split()[-1]
    (before,) = read_offline(tmp_path).values()
    assert before[-1]["step"] > 100  # the killed attempt left steps that are after the checkpoint

    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.rewind(100)
    tracker = WandbTracker(OFFLINE, "name", tmp_path, {}, run_id, read_metrics(log.path))
    assert tracker.run_id == run_id
    for step in range(101, 110):
        tracker.log(log.append(step, step, {**values(step), "time/elapsed_seconds": 0.5}))
    tracker.finish()
    runs = read_offline(tmp_path)
    assert list(runs) == [run_id]
    assert [record["step"] for record in runs[run_id]] == list(range(110))
    assert runs[run_id] == read_metrics(log.path)


def test_jobs_of_a_multirun_get_runs_of_their_own_even_after_one_that_failed(tmp_path):
    trackers = []
    for job in ("0", "1", "2"):
        tracker = WandbTracker(OFFLINE, job, tmp_path / job, {})
        tracker.log({"step": 1, "tokens": 1, "job": float(job)})
        if job != "1":  # job 1 ends in an exception before it can finish
            tracker.finish()
        trackers.append(tracker)
    for job, tracker in zip("012", trackers, strict=True):
        assert read_offline(tmp_path / job) == {tracker.run_id: [{"step": 1, "tokens": 1, "job": float(job)}]}


def test_online_without_a_login_goes_on_offline_and_says_how_to_log_in(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    tracker = WandbTracker(WandbConfig(mode="online"), "name", tmp_path, {})
    tracker.log({"step": 1, "tokens": 8, "train/loss": 2.0})
    tracker.finish()
    first, second = capsys.readouterr().out.splitlines()
    assert "wandb login" in first
    assert "wandb sync" in second
    assert read_offline(tmp_path) == {tracker.run_id: [{"step": 1, "tokens": 8, "train/loss": 2.0}]}


class FakeRun:
    """A run of the server: remembers steps, refuses those that are not new, as wandb does."""

    def __init__(self, run_id, starting_step, fail_at=None):
        self.id, self.starting_step, self.url = run_id, starting_step, "https://wandb.test/run"
        self.dir = "/nowhere/files"
        self.fail_at = fail_at
        self.steps: list[int] = []
        self.exit_code = None

    def define_metric(self, *_, **__):
        pass

    def log(self, record, step, commit):
        if step == self.fail_at:
            raise OSError("connection\nlost")
        assert commit
        assert step >= self.starting_step, "wandb would drop this with a warning"
        self.steps.append(step)

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def server(monkeypatch):
    """A stand-in for the wandb module with a logged-in user; `server.run` is the run that `init` returns."""
    module: Any = types.ModuleType("wandb")
    module.arguments = []
    module.run = FakeRun("abc", 0)

    def init(**arguments):
        module.arguments.append(arguments)
        if arguments["mode"] == getattr(module, "broken", None):
            raise RuntimeError("no\n  route")
        return module.run

    module.init = init
    module.login = lambda prompt: True
    module.Settings = dict
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_online_resume_sends_what_the_server_lacks_and_no_step_twice(tmp_path, server):
    server.run = FakeRun("abc", starting_step=4)  # the server has steps 0 to 3, the checkpoint is at 6
    history = [{"step": step, "tokens": step} for step in range(7)]
    tracker = WandbTracker(WandbConfig(mode="online"), "name", tmp_path, {}, "abc", history)
    tracker.log({"step": 7, "tokens": 7})
    tracker.log({"step": 7, "tokens": 7})
    tracker.finish()
    assert server.run.steps == [4, 5, 6, 7]
    assert (server.arguments[0]["id"], server.arguments[0]["resume"]) == ("abc", "allow")


def test_online_resume_before_the_servers_last_step_replays_silently(tmp_path, server):
    server.run = FakeRun("abc", starting_step=9)
    history = [{"step": step, "tokens": step} for step in range(7)]
    tracker = WandbTracker(WandbConfig(mode="online"), "name", tmp_path, {}, "abc", history)
    for step in range(7, 11):
        tracker.log({"step": step, "tokens": step})
    tracker.finish()
    assert server.run.steps == [9, 10]


def test_no_connection_means_offline_in_one_line(tmp_path, server, capsys):
    server.broken = "online"
    tracker = WandbTracker(WandbConfig(mode="online"), "name", tmp_path, {})
    tracker.log({"step": 1, "tokens": 1})
    tracker.finish()
    assert [arguments["mode"] for arguments in server.arguments] == ["online", "offline"]
    assert server.run.steps == [1]
    assert "cannot go online (RuntimeError: no route)" in capsys.readouterr().out


def test_a_failure_of_wandb_is_one_line_and_the_run_goes_on(tmp_path, server, capsys):
    server.run = FakeRun("abc", 0, fail_at=2)
    tracker = WandbTracker(OFFLINE, "name", tmp_path, {})
    capsys.readouterr()
    for step in (1, 2, 3):
        tracker.log({"step": step, "tokens": step})
    tracker.finish()
    assert server.run.steps == [1]
    (line,) = capsys.readouterr().out.splitlines()
    assert "OSError: connection lost" in line
    assert tracker.run_id == "abc"


def test_a_failure_at_the_start_keeps_the_run_id_for_the_next_checkpoint(tmp_path, server, capsys):
    server.broken = "offline"
    tracker = WandbTracker(OFFLINE, "name", tmp_path, {}, "abc", [{"step": 1, "tokens": 1}])
    tracker.log({"step": 2, "tokens": 2})
    assert tracker.run_id == "abc"
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_the_environment_can_take_wandb_offline(tmp_path, server, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    WandbTracker(WandbConfig(mode="online"), "name", tmp_path, {})
    assert [arguments["mode"] for arguments in server.arguments] == [mode] * (mode == "offline")


def test_a_service_that_hangs_stops_neither_training_nor_its_end(tmp_path, server, monkeypatch, capsys):
    monkeypatch.setattr("training.tracking.FINISH_TIMEOUT_SECONDS", 0.2)
    hanging = threading.Event()
    server.run.log = lambda *arguments, **options: hanging.wait(60)
    tracker = WandbTracker(OFFLINE, "name", tmp_path, {})
    begun = time.monotonic()
    for step in range(100):
        tracker.log({"step": step, "tokens": step})
    tracker.finish()
    assert time.monotonic() - begun < 10
    assert "wandb: it does not answer" in capsys.readouterr().out
    hanging.set()


@pytest.mark.parametrize("folder", ["offline-run-20261126_230501-my-run", "run-20261126_230501-my-run"])
def test_an_id_with_dashes_is_found_whole(tmp_path, folder):
    (tmp_path / "wandb" / folder).mkdir(parents=True)
    assert previous_run_id(tmp_path) == "my-run"
