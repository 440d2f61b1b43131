"""Several nodes, each with a supervisor; here all of them are this machine."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from hptool import files
from hptool.errors import InputError
from hptool.measurement import FailureKind
from hptool.worker.nodes import this_node
from hptool.worker.supervisor import NodeJob
from tests.worker.runs import Launcher, Run, exit_code_of, fork, tiny_document

SLURM = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "localhost,node2"}


def start_nodes(directory: Path, **changes: Any) -> list[Run]:
    """Two nodes of one rank each, in one run directory, as srun would start them."""
    config = directory / "config.yaml"
    config.write_text(files.yaml_text(tiny_document(trainer__num_nodes=2, **changes)))
    job = NodeJob(config_path=str(config), run_directory=str(directory), max_minutes=1.0)

    def node(index: int) -> int:
        # Else two runs of this test at the same time would meet each other.
        job_id = str(os.getppid())
        os.environ.update(SLURM | {"SLURM_NODEID": str(index), "SLURM_JOB_ID": job_id})
        return exit_code_of(job)

    return [
        Run(directory=directory, pid=fork(lambda index=index: node(index), directory / f"node{index}.log"))  # type: ignore[misc]
        for index in range(2)
    ]


def test_two_nodes_train_as_one_process(tmp_path: Path, launcher: Launcher) -> None:
    nodes = start_nodes(tmp_path, model__pipeline_model_parallel_size=2)
    assert [node.wait() for node in nodes] == [0, 0]
    assert list(nodes[0].measurement.losses) == pytest.approx(list(launcher.run().losses), rel=1e-6)
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]


@pytest.mark.parametrize("victim", [0, 1])
def test_loss_of_one_node_is_told_once(tmp_path: Path, victim: int) -> None:
    nodes = start_nodes(tmp_path, trainer__max_steps=1_000_000)
    nodes[0].until_step(2)
    (rank,) = nodes[victim].ranks(1)
    started = time.monotonic()
    os.kill(rank, signal.SIGKILL)
    assert [node.wait() for node in nodes] == [1, 1]
    assert time.monotonic() - started < 10.0
    (failure,) = nodes[0].failures
    assert failure.kind is FailureKind.CRASH
    assert failure.rank == victim
    assert "SIGKILL" in failure.message


def place_in_slurm(monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    """Makes this process Slurm's task on the second node."""
    for key, value in (SLURM | {"SLURM_NODEID": "1", "SLURM_STEP_ID": "0"} | changes).items():
        monkeypatch.setenv(key, value)


def test_node_takes_its_place_from_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    place_in_slurm(monkeypatch, SLURM_JOB_NODELIST="gpu[003-004]")
    node = this_node(2)
    assert (node.index, node.count, node.first_host) == (1, 2, "gpu003")


def test_every_array_element_has_its_own_port(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = set()
    for job_id in range(39_990, 40_090):
        place_in_slurm(monkeypatch, SLURM_JOB_ID=str(job_id))
        ports.add(this_node(2).port)
    assert len(ports) == 100
    assert min(ports) >= 20_000
    assert max(ports) <= 59_999


def test_job_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    place_in_slurm(monkeypatch)
    with pytest.raises(InputError, match="num_nodes: 3 given, allowed is the 2 of this Slurm job"):
        this_node(3)
