"""Fixtures of the worker's tests; what they are made of is in `runs.py`."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hptool.worker import supervisor
from tests.worker.runs import Launcher


@pytest.fixture(scope="session", autouse=True)
def framework() -> Iterator[None]:
    """Megatron-core and torch, imported into this process and ready for the CPU."""
    before = dict(os.environ)
    supervisor.load_framework("cpu")
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    """Starts runs under this test's directory."""
    return Launcher(tmp_path)
