"""One process at a time, whoever comes, is killed or removes the lock, and no file left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from data.host_lock import host_lock, lock_path

ROOT = Path(__file__).resolve().parents[2]

# Adds one to a number in a file, slowly enough for another process to be in between, if one can be.
COUNT = """
import sys, time
from pathlib import Path
from data.host_lock import host_lock
folder, file = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(40):
    with host_lock(folder):
        number = int(file.read_text())
        time.sleep(0.001)
        file.write_text(str(number + 1))
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of this test and of the processes that it starts."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_lock_is_a_file_only_while_it_is_held(temporary: Path, tmp_path: Path) -> None:
    for number in range(3):
        with host_lock(tmp_path / f"{number}"):
            assert len(list(temporary.iterdir())) == 1
    with pytest.raises(KeyError), host_lock(tmp_path):
        raise KeyError
    assert not list(temporary.iterdir())


def test_processes_that_come_and_go_are_never_in_it_together(temporary: Path, tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    command = [sys.executable, "-c", COUNT, str(tmp_path / "shards"), str(tmp_path / "number")]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "number").read_text() == "120"
    assert not list(temporary.iterdir())


def test_the_lock_of_a_killed_process_hinders_nobody_and_goes_with_the_next(temporary: Path, tmp_path: Path) -> None:
    code = "import sys, os, signal; from pathlib import Path; from data.host_lock import host_lock\n"
    code += "with host_lock(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "shards")], cwd=ROOT, check=False)
    assert list(temporary.iterdir()) == [lock_path(tmp_path / "shards")]
    waits: list[bool] = []
    with host_lock(tmp_path / "shards", lambda: waits.append(True)):
        pass
    assert not waits
    assert not list(temporary.iterdir())


def test_a_lock_that_was_removed_while_it_was_held_is_not_another_ones(temporary: Path, tmp_path: Path) -> None:
    with host_lock(tmp_path):
        lock_path(tmp_path).unlink()  # something that cleans the temporary folder
        other = lock_path(tmp_path)
        other.touch()
    assert other.exists()


def test_a_folder_has_one_lock_by_all_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shards").mkdir()
    os.symlink("shards", tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    names = [Path("shards"), Path("link"), tmp_path / "shards", Path("link/../shards")]
    assert len({lock_path(name) for name in names}) == 1
    assert lock_path(tmp_path / "other") != lock_path(tmp_path / "shards")
