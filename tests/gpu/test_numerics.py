"""The checks of `tests.gpu.numerics` as tests: HPTOOL_GPU_TESTS=cuda python -m pytest tests/gpu."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.gpu.conftest import DEVICE
from tests.gpu.models import FAMILIES
from tests.gpu.numerics import attention_checks
from tests.gpu.record import read_record

_TINY = DEVICE == "cpu"
_TRAININGS = (
    ["training gpt3, fp32"]
    if _TINY
    else [f"training {model.name}, {precision}" for model, precision in itertools.product(FAMILIES, ("fp32", "bf16"))]
)
_SERVED = [f"serving {name}, fp32" for name in ("gpt3", "llama", "t5")[: 1 if _TINY else None]]


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the checks found, in a process of their own: a fault of a kernel must not end pytest."""
    output: Path = tmp_path_factory.mktemp("numerics")
    words = ["--output", str(output), "--device", str(DEVICE), *(["--tiny"] if _TINY else [])]
    subprocess.run([sys.executable, "-m", "tests.gpu.numerics", *words], cwd=ROOT, check=False)
    return dict(read_record(output)["findings"])


@pytest.mark.parametrize("name", [*(name for name, _ in attention_checks(tiny=_TINY)), *_TRAININGS, *_SERVED])
def test_the_device_computes_what_the_cpu_computes(findings: dict[str, Any], name: str) -> None:
    assert findings[name]["ok"], findings[name]["found"]
