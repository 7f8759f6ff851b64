"""Fixtures for all tests."""

import pytest

from tests.shards import write_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A shards directory of a few kilobytes; see tests/shards.py. Read only."""
    return write_shards(tmp_path_factory.mktemp("shards"))
