"""Optional packages: found without an import, imported when first needed, checked to have what is called there.

In: a module's name and the parameters that its functions are called with. Out: why it cannot be used, or the calls.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any


class Package:
    """An optional package: the module, the file it is found by without importing anything, and what is called there."""

    def __init__(self, module: str, signatures: dict[str, str]) -> None:
        self.module, self.signatures = module, signatures

    def missing(self) -> str | None:
        """Why its functions cannot be called, None when they can; imports it, once, where it is installed."""
        return _loaded(self)[1]

    def call(self, name: str, **values: object) -> Any:
        """Call a function of it, all arguments by position: torch 2.11 does not find what an operator writes to
        otherwise."""
        function, parameters = _function(self, name)
        return function(*[values.get(parameter, default) for parameter, default in parameters])


@cache
def _function(package: Package, name: str) -> tuple[Callable[..., Any], list[tuple[str, object]]]:
    """A function, and its parameters with their defaults."""
    function = getattr(_loaded(package)[0], name)
    return function, [(parameter.name, parameter.default) for parameter in _signature(function).parameters.values()]


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(getattr(function, "_init_fn", function))  # what a custom operator was made of


@cache
def _loaded(package: Package) -> tuple[ModuleType | None, str | None]:
    top, *inner = package.module.split(".")
    spec = importlib.util.find_spec(top)
    # Looking for an inner module by its name would import the packages around it.
    places = [] if spec is None else spec.submodule_search_locations or []
    if not any(Path(place, *inner).with_suffix(".py").exists() for place in places):
        return None, f"{package.module} is not installed"
    try:
        module = importlib.import_module(package.module)
        reason = _mismatch(package, module)
    except Exception as error:  # a package built for other versions can fail in any way, and nothing needs it
        module, reason = None, f"{package.module} cannot be imported ({type(error).__name__}: {error})"
    if reason:
        warnings.warn(f"An optional kernel is installed and not used: {reason}.", stacklevel=2)
    return module, reason


def _mismatch(package: Package, module: ModuleType) -> str | None:
    """What keeps the module's functions from being called by the names of the given parameters."""
    for name, given in package.signatures.items():
        function = getattr(module, name, None)
        if function is None:
            return f"{package.module} has no {name}"
        parameters = _signature(function).parameters
        needed = {p.name for p in parameters.values() if p.default is p.empty}
        positional = {p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)}
        if not needed <= set(given.split()) <= positional:
            return f"{package.module}.{name} does not take the parameters ({', '.join(given.split())})"
    return None
