"""Fixtures of the worker's tests; what they are made of is in `runs.py`."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hptool.worker import supervisor
from tests.worker.runs import Launcher

_BEFORE = dict(os.environ)
# Before any test's module is read: one that imports Megatron-core first would have it compile its functions in each of
# the ranks that are forked from this process.
supervisor.load_framework("cpu")
_CHANGED = {name for name in os.environ if os.environ[name] != _BEFORE.get(name)}


@pytest.fixture(scope="session", autouse=True)
def framework() -> Iterator[None]:
    """Megatron-core and torch are in this process, ready for the CPU; what that set in the environment ends with it."""
    yield
    for name in _CHANGED:
        os.environ.pop(name)
    os.environ.update({name: _BEFORE[name] for name in _CHANGED if name in _BEFORE})


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    """Starts runs under this test's directory."""
    return Launcher(tmp_path)
