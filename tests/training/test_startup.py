"""Where the time before the first step goes."""

import os
import re
import subprocess
import sys
import time

import pytest

from tests.shards import tiny_config
from training.startup import FLASH_ATTENTION_CACHE, Startup, keep_compiled_kernels, process_begin
from training.trainer import train


def test_the_parts_add_up_from_the_beginning_of_the_process(monkeypatch):
    monkeypatch.setattr(Startup, "_told", False)
    times = iter([100.0, 102.0, 107.5])
    monkeypatch.setattr("training.startup.time.time", lambda: next(times))
    monkeypatch.setattr("training.startup.process_begin", lambda now: now - 3.0)
    startup = Startup()
    startup.mark("data")
    startup.mark("step")
    assert startup.line() == "first step 10.5 s after the start: start 3.0 s, data 2.0 s, step 5.5 s"


def test_a_later_job_of_a_process_begins_when_it_begins(monkeypatch):
    monkeypatch.setattr(Startup, "_told", True)
    startup = Startup()
    startup.mark("step")
    assert re.fullmatch(r"first step 0\.\d s after the start: step 0\.\d s", startup.line())


def test_a_process_knows_when_it_began():
    code = "import time; time.sleep(0.5); from training.startup import process_begin; print(process_begin(0.0))"
    before = time.time()
    began = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert before - 0.2 < began < before + 0.4


def test_where_the_system_does_not_say_it_is_now(monkeypatch):
    monkeypatch.setattr("pathlib.Path.read_text", lambda self: (_ for _ in ()).throw(OSError()))
    assert process_begin(7.0) == 7.0


def test_a_run_says_it_once(shards, tmp_path, capsys):
    config = tiny_config(shards, tmp_path / "run")
    config.training.stop_at = 2
    train(config)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("first step")]
    assert re.search(r"data \d.*, model \d.*, checkpoint \d.*, evaluation \d.*, step \d", line)


@pytest.fixture
def caches(monkeypatch, tmp_path):
    """What the environment says of compiled kernels: nothing, but for where temporary files go."""
    names = ["TRITON_CACHE_DIR", *(f"{FLASH_ATTENTION_CACHE}_{name}" for name in ("DIR", "ENABLED"))]
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return lambda: [os.environ.get(name) for name in names]


def test_kernels_are_kept_where_torchinductor_will_have_triton_keep_them(caches, tmp_path):
    keep_compiled_kernels(3)
    folder = tmp_path / f"flash_attention_cute_dsl_{os.getuid()}"
    assert caches() == [str(tmp_path / "inductor" / "triton" / "3"), str(folder), "1"]
    assert folder.stat().st_mode & 0o777 == 0o700


def test_what_is_said_of_kernels_stays(caches, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "here")
    monkeypatch.setenv(f"{FLASH_ATTENTION_CACHE}_DIR", str(tmp_path / "there"))
    monkeypatch.setenv(f"{FLASH_ATTENTION_CACHE}_ENABLED", "0")
    keep_compiled_kernels(0)
    assert caches() == ["here", str(tmp_path / "there"), "0"]


def test_kernels_that_another_user_may_have_written_are_not_loaded(caches, monkeypatch):
    monkeypatch.setattr("os.getuid", lambda: 12345)
    keep_compiled_kernels(0)
    assert caches()[2] is None


def test_a_folder_that_cannot_be_made_is_done_without(caches, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(f"{FLASH_ATTENTION_CACHE}_DIR", str(tmp_path / "file" / "folder"))
    keep_compiled_kernels(0)
    assert caches()[2] is None
