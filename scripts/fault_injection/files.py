"""Files and disks: damaged and crafted checkpoints, a full disk, a folder that cannot be written."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.fault_injection.bench import EVERY, MARKER, STEPS, Bench, Row
from training.checkpoint import sealed


def damaged(bench: Bench, times: int) -> list[Row]:
    """The newest checkpoint of a run that is half done, damaged in five ways."""
    base = bench.run_dir("half")
    bench.finish(base, f"training.stop_at={STEPS // 2}")

    def flip(path: Path) -> None:
        file = max(path.glob("*.distcp"), key=os.path.getsize)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    def empty(path: Path) -> None:
        for file in path.iterdir():
            if file.name != MARKER:
                file.unlink()

    def other_position(path: Path) -> None:
        content = json.loads((path / MARKER).read_text())
        content["state"]["instances"] ^= 4
        (path / MARKER).write_text(json.dumps(content, indent=1))

    ways: list[tuple[str, Callable[[Path], object]]] = [
        ("flipped bit", flip),
        ("truncated file", lambda path: os.truncate(next(path.glob("*.distcp")), 100)),
        ("missing shard", lambda path: next(path.glob("*.distcp")).unlink()),
        ("marker without files", empty),
        ("flipped bit in the marker", other_position),
        ("missing marker", lambda path: (path / MARKER).unlink()),
    ]
    rows = []
    for name, damage in ways:
        run_dir = bench.run_dir(name.replace(" ", "-"))
        shutil.copytree(base, run_dir)
        damage(run_dir / "checkpoints" / f"step-{STEPS // 2}")
        passed = bench.finish(run_dir) == 0 and bench.same(run_dir)
        message = bench.said(r"warning: [^\n]*set aside[^\n]*") or bench.said(r"continuing [^\n]*")
        rows.append(Row(f"checkpoint: {name}", "in the newest one", 1, f"{EVERY} steps, made again", message, passed))
    return rows


def disk(bench: Bench, times: int) -> list[Row]:
    """Files may not grow beyond 20 kB during one save; nothing may grow; the folder of checkpoints is no folder."""
    run_dir = bench.run_dir("full")
    limit = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def full(): resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
def free(): resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
def batch(self, position):
    if position == 4 * 8: full()
    if position == 4 * 12: free()  # so few steps between checkpoints leave none beside the write of step 10
    return _batch(self, position)
BatchLoader.batch = batch
"""
    passed = bench.finish(run_dir, inject=limit) == 0 and bench.same(run_dir)
    message = bench.said(r"warning: [^\n]*could not be saved[^\n]*")
    rows = [
        Row("disk full in a save", "RLIMIT_FSIZE", 1, "nothing; one checkpoint less", message, passed and message != "")
    ]
    run_dir = bench.run_dir("full-log")
    small = limit.replace("20_000", "os.path.getsize(log) + 10").replace("log", repr(str(run_dir / "metrics.jsonl")))
    passed = bench.finish(run_dir, inject=small) == 0 and bench.same(run_dir)
    message = bench.said(r"warning: [^\n]*metrics.jsonl cannot be written[^\n]*")
    rows.append(Row("disk full in the log", "RLIMIT_FSIZE", 1, "nothing", message, passed and message != ""))
    run_dir = bench.run_dir("unwritable")
    block = "_inject(8, lambda: (os.rename(folder, folder + '.aside'), open(folder, 'w').close()))".replace(
        "folder", repr(str(run_dir / "checkpoints"))
    )
    # No write may be under way, which would make the folder again.
    status = bench.finish(run_dir, "checkpoint.asynchronous=false", inject=block)
    message = bench.said(r"error: [^\n]*could not be saved[^\n]*")
    (run_dir / "checkpoints").unlink()
    (run_dir / "checkpoints.aside").rename(run_dir / "checkpoints")
    passed = status == 1 and message != "" and bench.finish(run_dir) == 0 and bench.same(run_dir)
    rows.append(
        Row("checkpoints not writable", "a file in place of the folder", 1, "trains to the end", message, passed)
    )
    return rows


class _Payload:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.target, "w")


def crafted(bench: Bench, times: int) -> Row:
    """A checkpoint whose description runs code when it is unpickled, with checksums that fit."""
    run_dir, executed = bench.run_dir("crafted"), bench.folder / "executed"
    bench.finish(run_dir, "training.stop_at=5")
    path = run_dir / "checkpoints" / "step-5"
    content = pickle.dumps(_Payload(str(executed)))
    (path / ".metadata").write_bytes(content)
    marker = json.loads((path / MARKER).read_text())
    marker["bytes"][".metadata"] = len(content)
    marker["sha256"][".metadata"] = hashlib.sha256(content).hexdigest()
    (path / MARKER).write_text(json.dumps(sealed(marker)))
    status = bench.finish(run_dir)
    message = bench.said(r"error: [^\n]*is not loaded[^\n]*")
    passed = status == 2 and message != "" and not executed.exists()
    return Row("checkpoint: crafted pickle", "in its .metadata", 1, "nothing is executed", message, passed)
