"""What is left of the host's memory, from the files of a made-up system."""

import pytest
import torch

import training.host_copy
from training.host_copy import HostCopy
from training.host_memory import available_memory

GIGABYTE = 10**9


def system(root, meminfo=None, cgroup=None, groups=()):
    (root / "proc/self").mkdir(parents=True)
    if meminfo is not None:
        (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:  {meminfo} kB\n")
    if cgroup is not None:
        (root / "proc/self/cgroup").write_text(cgroup)
    for folder, files in groups:
        (root / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (root / "sys/fs/cgroup" / folder / name).write_text(content)
    return root


def version_2(limit, used, files=0):
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{used}\n",
        "memory.stat": f"anon 1\ninactive_file {files}\n",
    }


def test_of_the_machine(tmp_path):
    assert available_memory(system(tmp_path, meminfo=2000)) == 2000 * 1024


def test_a_limit_of_the_control_group_or_of_one_around_it_counts(tmp_path):
    groups = [("a/b", version_2("max", 5)), ("a", version_2(9000, 4000, 500)), ("", {})]
    assert available_memory(system(tmp_path, meminfo=2000, cgroup="0::/a/b\n", groups=groups)) == 5500


def test_a_container_that_sees_its_own_group_as_the_topmost(tmp_path):
    groups = [("", version_2(9000, 4000))]
    assert available_memory(system(tmp_path, meminfo=2000, cgroup="0::/not/seen\n", groups=groups)) == 5000


def test_of_version_1(tmp_path):
    files = {"memory.limit_in_bytes": "900", "memory.usage_in_bytes": "1000", "memory.stat": "total_inactive_file 300"}
    cgroup = "5:cpu,cpuacct:/x\n4:memory:/job\n0::/\n"
    assert available_memory(system(tmp_path, meminfo=2000, cgroup=cgroup, groups=[("memory/job", files)])) == 200


def test_a_system_that_does_not_say(tmp_path):
    assert available_memory(tmp_path) is None


def test_here():
    assert available_memory() > 10**6


class Registering:
    """Of libcudart, what page-locks."""

    def cudaHostRegister(self, pointer, size, flags):
        return 0

    cudaHostUnregister = staticmethod(lambda pointer: 0)


@pytest.mark.parametrize(("free", "enough"), [(3 * GIGABYTE, True), (2 * GIGABYTE, False), (None, True)])
def test_copies_leave_some_of_it(free, enough, monkeypatch):
    monkeypatch.setattr(training.host_copy, "available_memory", lambda: free)
    monkeypatch.setattr(torch.cuda, "cudart", Registering)
    copying = HostCopy({"model": {"weight": torch.ones(1000, 3)}}, torch.device("cpu"))
    copying._stream = object()  # as if it were for a GPU
    if enough:
        copying.prepare()
        assert len(copying._locked) == 1
    else:
        with pytest.raises(MemoryError, match=r"0\.0 GB leave less than 2\.1 GB of host memory: 2\.0 GB are free"):
            copying.prepare()
        assert not copying._locked
