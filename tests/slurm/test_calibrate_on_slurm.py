"""A calibration as a job on a real Slurm, over two nodes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hptool import files
from hptool.facts import GpuSpec
from tests.searches import finish, processes_of
from tests.slurm.conftest import DevSlurm

pytestmark = pytest.mark.slurm


def test_two_nodes_are_measured_and_their_network_too(slurm: DevSlurm, tmp_path: Path) -> None:
    # Long enough for the links, which come after the first layer.
    words = ["--cluster", "dev-slurm", "--nodes", "2", "--max-minutes", "1.5", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hptool", "calibrate", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True,
    )  # fmt: skip
    out, err = finish(process, timeout_s=420)
    assert process.returncode == 0, err
    answer = json.loads(out)
    assert answer["nodes"] == 2
    spec = files.read(tmp_path / "cluster" / "gpus" / "cpu.yaml", GpuSpec)
    assert spec.measured is not None
    assert spec.measured.cluster == "dev-slurm"
    assert spec.measured.links == ("intra_node", "inter_node")
    across = {point.kind for point in spec.measured.points if point.sizes.get("across")}
    assert {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"} <= across
    assert 0 < spec.inter_node.bandwidth_gb_per_s < 1000
    assert not (tmp_path / "results").exists()
    assert slurm.command("squeue", "--me", "-h") == ""
    assert processes_of(tmp_path) == []
