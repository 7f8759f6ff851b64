"""compute-sanitizer looks at every Triton kernel: no access outside its tensors, no race in shared memory."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = [sys.executable, str(Path(__file__).parents[2] / "scripts" / "run_kernels.py")]
CLEAN = {"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "0 hazards displayed (0 errors, 0 warnings)"}


@pytest.mark.parametrize("group", ["2", "3", "8"])
@pytest.mark.parametrize("tool", CLEAN)
def test_kernels_are_clean(tool, group):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer, of the CUDA toolkit, is not installed")
    subprocess.run([*KERNELS, "--group", group], check=True)  # what is compiled is kept
    command = [sanitizer, "--tool", tool, *KERNELS, "--group", group]
    looked = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if "Device not supported" in looked.stdout:
        pytest.skip("compute-sanitizer does not support this device or its driver")
    assert looked.returncode == 0, looked.stdout[-2000:]
    assert looked.stdout.count(": done") == 13
    assert CLEAN[tool] in looked.stdout, looked.stdout[:4000]
