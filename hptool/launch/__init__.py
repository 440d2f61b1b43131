"""Launchers: hand runs to a scheduler, ask how they are, cancel them. Slurm and local processes, both by submitit.

`packed` makes either carry out many runs in one job; `hyperqueue` runs a swarm of tiny ones on this machine.

Jobs are never asked for a result: the worker writes its own outcome files, and a launcher only knows whether a job
still lives.
"""

import uuid
from pathlib import Path

from hptool.errors import InputError
from hptool.facts import Cluster, Submit
from hptool.launch.hyperqueue import HyperQueueLauncher
from hptool.launch.jobs import OVERDUE_S, SCHEDULER_MARGIN_MINUTES, JobState, JobStatus, Launcher, Run, Started, blocked
from hptool.launch.local import LocalLauncher
from hptool.launch.packed import PackedLauncher, allocated_gpu_hours, lane_minutes
from hptool.launch.slurm import SlurmLauncher, is_queued, submit_script
from hptool.launch.slurm_script import batch_script, run_parameters, slurm_parameters

__all__ = [
    "OVERDUE_S",
    "SCHEDULER_MARGIN_MINUTES",
    "HyperQueueLauncher",
    "JobState",
    "JobStatus",
    "Launcher",
    "LocalLauncher",
    "PackedLauncher",
    "Run",
    "SlurmLauncher",
    "Started",
    "Submit",
    "allocated_gpu_hours",
    "batch_script",
    "blocked",
    "is_queued",
    "lane_minutes",
    "launcher",
    "run_parameters",
    "slurm_parameters",
    "submit_script",
]


def launcher(cluster: Cluster, folder: Path, submit: Submit | None = None) -> Launcher:
    """The launcher for a cluster; submission scripts and job logs go into `folder`.

    Without `submit` an array on Slurm, and a process each on this machine. InputError for what the cluster cannot.
    """
    fresh = folder / uuid.uuid4().hex[:8]  # submitit names files by job id, and ids can come round again
    if submit == "hyperqueue":
        return HyperQueueLauncher(cluster, fresh)
    host: LocalLauncher | SlurmLauncher
    if cluster.scheduler == "slurm":
        host = SlurmLauncher(cluster, fresh, arrays=submit in (None, "array"))
    elif submit == "array":
        raise InputError(
            f"--submit: array given, allowed for {cluster.name} (scheduler: {cluster.scheduler}) is separate, packed "
            "or hyperqueue"
        )
    else:
        host = LocalLauncher(cluster, fresh)
    # A search that is resumed another way still has to know what became of the orders that it gave.
    if submit == "packed" or (folder / "packs").exists():
        return PackedLauncher(cluster, folder, host, takes_orders=submit == "packed")
    return host
