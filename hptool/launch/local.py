"""Runs as processes of this machine."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import submitit

from hptool.errors import LaunchError
from hptool.facts import Cluster
from hptool.launch.jobs import SCHEDULER_MARGIN_MINUTES, JobState, JobStatus, Run, Started, blocked, node_job
from hptool.measurement import FailureKind
from hptool.secrets import is_secret
from hptool.worker.supervisor import run_node

#: How long cancelled local processes may take to go, and how often they are told.
_CANCEL_S = 20
_RESEND_S = 0.2

T = TypeVar("T")


class LocalLauncher:
    """Runs as processes of this machine, one at a time, because they share its devices."""

    slots: int | None = 1
    poll_s = 0.05

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster = cluster
        self._folder = folder
        self._jobs: dict[str, submitit.Job[object]] = {}

    def submit(self, runs: Sequence[Run], started: Started) -> None:
        """As `Launcher.submit`."""
        for run in runs:
            job = node_job(run, self._cluster, os.getpid())
            minutes = run.max_minutes + SCHEDULER_MARGIN_MINUTES
            job_id = self.start(run_node, job, name=run.name, nodes=run.nodes, max_minutes=minutes, token=run.token)
            started(run, job_id)

    def start(
        self, function: Callable[[T], object], argument: T, *, name: str, nodes: int, max_minutes: float, token: str
    ) -> str:
        """Starts one process that calls `function(argument)`; the id of its job."""
        del name, nodes, token  # a local cluster has one node, and its jobs are found by nobody else
        executor = submitit.LocalExecutor(self._folder)
        executor.update_parameters(
            timeout_min=max_minutes,
            tasks_per_node=1,
            gpus_per_node=self._cluster.gpus_per_node if self._cluster.gpu.device == "cuda" else 0,
            stderr_to_stdout=True,
        )
        secrets = {name: value for name, value in self._cluster.environment.items() if is_secret(name)}
        # Deaf, so that a terminal's Ctrl-C reaches hptool alone, which ends its jobs in order.
        with blocked(signal.SIGINT), _inherited(secrets):
            job: submitit.Job[object] = executor.submit(function, argument)
        self._jobs[job.job_id] = job
        return str(job.job_id)

    def status(self, job_ids: Sequence[str]) -> dict[str, JobStatus]:
        """As `Launcher.status`; a job of another process is lost, for it ended with that process."""
        found = {}
        for job_id in job_ids:
            job = self._jobs.get(job_id)
            if job is None:
                detail = "its search is gone and took it along"
                found[job_id] = JobStatus(state=JobState.LOST, detail=detail, meaning=FailureKind.LOST)
            elif job.done():
                found[job_id] = JobStatus(state=JobState.ENDED, detail="its processes ended without an outcome")
            else:
                found[job_id] = JobStatus(state=JobState.RUNNING)
        return found

    def cancel(self, job_ids: Sequence[str]) -> None:
        """As `Launcher.cancel`."""
        mine = [self._jobs[i] for i in job_ids if i in self._jobs]
        deadline = time.monotonic() + _CANCEL_S
        while left := [job.job_id for job in mine if not job.done()]:
            if time.monotonic() > deadline:
                raise LaunchError(f"local jobs {', '.join(left)} (process ids) did not end {_CANCEL_S} s after SIGTERM")
            for job_id in left:  # again and again, because submitit swallows the signal while a job starts
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(job_id), signal.SIGTERM)  # submitit hands it on and ends after the supervisor
            time.sleep(_RESEND_S)

    def find(self, tokens: Sequence[str]) -> dict[str, str]:
        """As `Launcher.find`; local jobs end with the process that started them."""
        del tokens
        return {}

    def close(self) -> None:
        """As `Launcher.close`."""

    def log_path(self, job_id: str) -> Path:
        """As `Launcher.log_path`."""
        return self._folder / f"{job_id}_0_log.out"


@contextlib.contextmanager
def _inherited(environment: Mapping[str, str]) -> Iterator[None]:
    """Within, processes that are started have these variables: submitit would hand them on in a file."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
