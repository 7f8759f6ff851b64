"""Runs tests of Triton kernels in Triton's interpreter, in fp32, on the CPU.

Triton decides on import whether kernels are interpreted. So that no other test sees interpreted kernels, a test file
runs parts of itself in a pytest of their own with TRITON_INTERPRET=1, where the rest of the file becomes visible.
"""

import os
import subprocess
import sys


def run_interpreted(file, part):
    """Run the tests of `file` whose names match `part` (as in `pytest -k`); fail as they do."""
    options = ["-p", "no:xdist", "-p", "no:cacheprovider", "-x"]
    command = [sys.executable, "-m", "pytest", *options, file, "-k", part]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:]
