"""Runs tests of Triton kernels in Triton's interpreter, in fp32, on the CPU.

Triton decides on import whether kernels are interpreted. So that no other test sees interpreted kernels, a test file
runs parts of itself in a pytest of their own with TRITON_INTERPRET=1, where the rest of the file becomes visible.
"""

import os
import subprocess
import sys
from contextlib import suppress


def run_interpreted(file):
    """Run the tests of `file` that are there in the interpreter; fail as they do."""
    options = ["-p", "no:xdist", "-p", "no:cacheprovider", "-x"]
    command = [sys.executable, "-m", "pytest", *options, file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:]


def patch_the_language_once_a_launch():
    """Spare the interpreter half of its time.

    It gives `triton.language` interpreted functions before a launch, and the same anew whenever a kernel calls a
    function, be it `tl.sum`: those of a module that it has been through in a launch are there until the next. Names of
    a Triton that has others are left alone: it takes longer.
    """
    from triton.runtime import interpreter

    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    languages, empty = (interpreter.tl, interpreter.tl.core), interpreter._LangPatchScope
    of_function, done = {}, set()

    def launched(self, *arguments, **options):
        done.clear()
        return launch(self, *arguments, **options)

    def patched(function):
        if function not in of_function:
            seen = function.__globals__.values()
            of_function[function] = frozenset(
                i for i, language in enumerate(languages) if any(x is language for x in seen)
            )
        if of_function[function] <= done:
            return empty()
        scope = patch(function)
        done.update(of_function[function])
        return scope

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launched, patched


if os.environ.get("TRITON_INTERPRET") == "1":
    with suppress(ImportError, AttributeError):
        patch_the_language_once_a_launch()
