"""The tree in docs/architecture.md, against the files."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("package", ["moda", "models", "data", "training", "eval", "scripts"])
def test_every_module_has_its_place_in_the_tree(package):
    tree = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("Imports go one way")[0]
    words = set(re.findall(r"\w+", tree[tree.index(f"    {package}/") :]))
    modules = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
    modules |= {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    missing = {name for name in modules if name not in words and name.removeprefix("benchmark") not in words}
    assert not missing


@pytest.mark.parametrize("package", ["moda", "models", "data", "training", "eval", "scripts", "tests"])
def test_no_module_is_longer_than_can_be_read_at_once(package):
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / package).rglob("*.py")}
    assert {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > 500} == {}
