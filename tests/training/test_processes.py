"""training/processes.py."""

import builtins
import os
import subprocess
import sys
from contextlib import contextmanager

from training import processes
from training.processes import alive, number_space


def test_the_living_the_dead_and_the_zombie():
    assert alive(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert alive(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet collected
    assert not alive(child.pid)
    child.wait()
    assert not alive(child.pid)
    child.stdin.close()


def test_hosts_of_the_same_name_do_not_look_for_each_others_processes(tmp_path, monkeypatch):
    spaces = []
    for boot in ("one\n", "other\n"):
        (tmp_path / "boot_id").write_text(boot)
        monkeypatch.setattr(processes, "BOOT", str(tmp_path / "boot_id"))
        assert number_space() == number_space()
        spaces.append(number_space())
    assert spaces[0] != spaces[1]
    assert not any("\n" in space for space in spaces)
    monkeypatch.setattr(processes, "BOOT", str(tmp_path / "none"))
    assert number_space()


def test_a_process_that_ends_while_it_is_looked_at_is_gone(monkeypatch):
    @contextmanager
    def opened(path, **options):
        class Gone:
            def read(self):
                raise ProcessLookupError(3, "No such process", path)

        yield Gone()

    monkeypatch.setattr(builtins, "open", opened)
    assert not alive(12345)
