"""Launchers: hand runs to a scheduler, ask how they are, cancel them. Slurm and local processes, both by submitit.

Jobs are never asked for a result: the worker writes its own outcome files, and a launcher only knows whether a job
still lives.
"""

import uuid
from pathlib import Path

from hptool.facts import Cluster
from hptool.launch.jobs import OVERDUE_S, JobState, JobStatus, Launcher, Run, Started, blocked
from hptool.launch.local import LocalLauncher
from hptool.launch.slurm import (
    SlurmLauncher,
    batch_script,
    is_queued,
    run_parameters,
    slurm_parameters,
    submit_script,
)

__all__ = [
    "OVERDUE_S",
    "JobState",
    "JobStatus",
    "Launcher",
    "LocalLauncher",
    "Run",
    "SlurmLauncher",
    "Started",
    "batch_script",
    "blocked",
    "is_queued",
    "launcher",
    "run_parameters",
    "slurm_parameters",
    "submit_script",
]


def launcher(cluster: Cluster, folder: Path) -> Launcher:
    """The launcher for a cluster; submission scripts and job logs go into `folder`."""
    fresh = folder / uuid.uuid4().hex[:8]  # submitit names files by job id, and ids can come round again
    return SlurmLauncher(cluster, fresh) if cluster.scheduler == "slurm" else LocalLauncher(cluster, fresh)
