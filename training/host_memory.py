"""How much memory of the host is left before the system ends processes.

In: what Linux says of the machine and of this process's control group (a container's limit, SLURM's). Out: bytes.
"""

from __future__ import annotations

from pathlib import Path

# Of a control group: folder, limit, use, and in memory.stat the files in memory that are dropped when it is short.
VERSION_2 = ("", "memory.max", "memory.current", "inactive_file")
VERSION_1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take; None where the system does not say. `root` has proc and sys in it."""
    known = [_of_machine(root)]
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            known.append(_of_group(root, path, *(VERSION_1 if controllers else VERSION_2)))
    found = [value for value in known if value is not None]
    return min(found) if found else None


def _of_machine(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _of_group(root: Path, path: str, controller: str, limit: str, used: str, files: str) -> int | None:
    """Of the group at `path` and those it is in; None without a limit. A container may see its own as the topmost."""
    top = root / "sys/fs/cgroup" / controller
    own = top / path.strip("/")
    known = []
    for folder in [own, *own.parents]:
        try:
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free = int((folder / limit).read_text()) - int((folder / used).read_text())
            known.append(max(0, free + int(stat.get(files, 0))))
        except (OSError, ValueError):  # not there, or "max"
            pass
        if folder == top:
            break
    return min(known) if known else None
