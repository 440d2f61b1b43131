"""Runs as jobs: what a launcher is asked for and what it answers."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from hptool.facts import Cluster
from hptool.measurement import FailureKind
from hptool.secrets import is_secret
from hptool.units import SECONDS_PER_MINUTE
from hptool.worker.supervisor import NodeJob


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One timed run of one layout: `nodes` whole nodes, a limit of its own, its files in `directory`.

    `name` is unique within the search. The job carries `token` as a mark by which it is found again when the process
    that submitted it died before it could note the job's id.
    """

    name: str
    directory: Path
    nodes: int
    max_minutes: float
    token: str = ""


class JobState(StrEnum):
    """Where a job stands. Pending and running may change; the others are final."""

    PENDING = "pending"
    RUNNING = "running"
    ENDED = "ended"
    LOST = "lost"  # the scheduler does not know it any more, or never will run it


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """A job's state, the scheduler's own words, and the kind of failure they mean if no outcome file is found.

    `may_run_again`: the scheduler took the job away or lost it, so that the same run may well succeed as another job.
    """

    state: JobState
    detail: str = ""
    meaning: FailureKind = FailureKind.CRASH
    may_run_again: bool = False


#: Told of a run and the id of its job.
Started = Callable[[Run, str], None]


class Launcher(Protocol):
    """The seam to a scheduler. Every call returns within a minute."""

    #: How many runs may be under way at once; None leaves it to the scheduler.
    slots: int | None
    #: Seconds between two looks at the jobs.
    poll_s: float

    def submit(self, runs: Sequence[Run], started: Started) -> None:
        """Start the runs, and tell `started` of each as soon as it has a job id.

        Raises LaunchError with the scheduler's own words, BusyError where it may take them later; runs of which
        `started` heard go on then.
        """

    def find(self, tokens: Sequence[str]) -> dict[str, str]:
        """Ids of the jobs that carry these tokens, by token; those that the scheduler still knows.

        Raises BusyError where it cannot be asked now, for that is no sign that there are none.
        """

    def status(self, job_ids: Sequence[str]) -> dict[str, JobStatus]:
        """The state of each job; where the scheduler cannot be asked now the last one known, with why in its detail."""

    def cancel(self, job_ids: Sequence[str]) -> None:
        """End the jobs; when this returns none of them runs any more, or LaunchError says which may."""

    def log_path(self, job_id: str) -> Path:
        """Where the job's own output goes, beside the logs of its ranks."""

    def close(self) -> None:
        """Nothing more will be submitted; what was kept ready for it is given back."""


#: Importing torch and megatron-core and shutting down take time that is not the run's; the scheduler's limit is the
#: run's plus this, so that the supervisor inside the job ends it first and says why.
SCHEDULER_MARGIN_MINUTES = 3

#: How long an allocation on Slurm that is kept for the next run waits for one: a hptool that died must not keep GPUs.
IDLE_S = 120.0

#: How long past its limit a running job is left to its supervisor and its scheduler before hptool cancels it.
OVERDUE_S = (SCHEDULER_MARGIN_MINUTES + 2) * SECONDS_PER_MINUTE


def node_job(run: Run, cluster: Cluster, owner_pid: int | None) -> NodeJob:
    """What each node of a run has to do; when the process `owner_pid` is gone, so is the run."""
    return NodeJob(
        config_path=str(run.directory / "config.yaml"),
        run_directory=str(run.directory),
        max_minutes=run.max_minutes,
        memory_gib_per_rank=cluster.gpu.memory_gib if cluster.gpu.device == "cpu" else None,
        owner_pid=owner_pid,
        environment=worker_environment(cluster),
    )


def worker_environment(cluster: Cluster) -> dict[str, str]:
    """What a local job has to set for itself; a Slurm job's script does it.

    This lies in files of the results directory, so secrets are not among it: `LocalLauncher` hands them on.
    """
    if cluster.scheduler != "local":
        return {}
    return {name: value for name, value in cluster.environment.items() if not is_secret(name)}


@contextlib.contextmanager
def blocked(*signals: signal.Signals) -> Iterator[None]:
    """Within, these signals wait, and processes that are started never see them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
