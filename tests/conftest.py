"""What tests share: published data, and configs of a tiny model."""

import csv
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hptool import catalogue, files
from hptool.base_config import BaseConfig
from hptool.candidates import Layout
from hptool.facts import Cluster
from hptool.presets import Site
from hptool.scaling import FLOP_PER_PARAMETER_TOKEN, SeedRuns

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C and a closed terminal are heard here and in what tests start, also where pytest was started deaf to them.

    As a shell starts what runs in the background, or nohup anything.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in zip((signal.SIGINT, signal.SIGHUP), before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def published() -> Path:
    """`training.csv` of published runs: the whole table where it is at hand, else the committed part of it."""
    whole = ROOT.parent / "shared" / "truth" / "training.csv"
    return whole if whole.is_file() else ROOT / "tests" / "data" / "korthikanti.csv"


@pytest.fixture(scope="session")
def chinchilla() -> SeedRuns:
    """The 245 runs that Epoch's replication read off figure 4 of Hoffmann et al. 2022."""
    whole = ROOT.parent / "shared" / "scaling" / "chinchilla_points.csv"
    path = whole if whole.is_file() else ROOT / "tests" / "data" / "chinchilla_points.csv"
    rows = list(csv.DictReader(path.read_text().splitlines()))
    parameters, flop, loss = (
        np.array([float(row[name]) for row in rows]) for name in ("Model Size", "Training FLOP", "loss")
    )
    return SeedRuns(
        source=path.name,
        parameters=parameters,
        tokens=flop / (FLOP_PER_PARAMETER_TOKEN * parameters),
        loss=loss,
        line=np.arange(len(rows)) + 2,
    )


@pytest.fixture(scope="session")
def local() -> Cluster:
    """The profile of two CPU ranks."""
    return files.read_cluster("local")


@pytest.fixture(scope="session")
def dgx_a100() -> Cluster:
    """The profile of 128 nodes of 8 A100 80GB."""
    return files.read_cluster("dgx-a100")


def preset_config(name: str, cluster: Cluster, nodes: int, **overrides: Any) -> BaseConfig:
    """The config of `gpt3/NAME`, or of `family/size`; overrides are given with `__` for the dots."""
    model = name if "/" in name else f"gpt3/{name}"
    site = Site(cluster=cluster, num_nodes=nodes)
    text = catalogue.config_text(catalogue.preset(model), site, Layout())
    words = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    return files.parse(files.apply_overrides(files.parse_yaml(text, name), words, "override"), BaseConfig, name)
