"""Swarms of tiny runs side by side on this machine, by HyperQueue: as many at once as have cores for their ranks.

The optional package `hyperqueue` brings a server and a worker that live within this process and end with it. It starts
runs and says which failed; that one has begun or ended, or is to be cancelled, is told by files.
"""

import contextlib
import importlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from hptool.errors import InputError, LaunchError
from hptool.facts import Cluster
from hptool.launch.jobs import JobState, JobStatus, Run, Started, blocked, node_job
from hptool.measurement import FailureKind
from hptool.worker import processes
from hptool.worker.supervisor import NodeJob, run_node

#: How long a cancelled run may take to end its ranks, before it is killed; and how long its end may take to be known.
_OBEY_S = 10.0
_CANCEL_S = 20.0
_WAIT_S = 0.1


class HyperQueueLauncher:
    """Runs of one node as tasks of a HyperQueue, which starts with the first of them.

    InputError where the package is missing, or the cluster is none of CPU ranks on the node that this process is on.
    """

    poll_s = 0.2

    def __init__(self, cluster: Cluster, folder: Path, *, cores: int | None = None) -> None:
        self._hyperqueue = _package()
        _refuse_elsewhere(cluster)
        self._cluster = cluster
        self._folder = folder.absolute()
        self._cores = max(cores or len(os.sched_getaffinity(0)), cluster.gpus_per_node)
        self.slots: int | None = self._cores // cluster.gpus_per_node
        self._server: Any = None
        self._client: Any = None
        self._tasks: dict[str, int] = {}  # HyperQueue's ids, by ours

    def submit(self, runs: Sequence[Run], started: Started) -> None:
        """As `Launcher.submit`; InputError for a run of several nodes."""
        for run in runs:
            if run.nodes != 1:
                raise InputError(f"--submit hyperqueue: {run.name} needs {run.nodes} nodes, allowed is 1")
        hyperqueue = self._hyperqueue
        client = self._start()  # not where signals are blocked: neither it nor the runs would ever hear them
        for run in runs:
            job_id = f"hq-{self._folder.name}-{len(self._tasks) + 1}"
            files = self._folder / job_id
            files.mkdir(parents=True)
            job = replace(node_job(run, self._cluster, os.getpid()), environment=dict(self._cluster.environment))
            task = hyperqueue.Job(name=run.name, max_fails=None)
            log = str(self.log_path(job_id))
            request = hyperqueue.ffi.protocol.ResourceRequest(cpus=self._cluster.gpus_per_node)
            task.function(carry_out, args=(str(files), job), stdout=log, stderr=log, resources=request)
            with blocked(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self._tasks[job_id] = client.submit(task).id
                started(run, job_id)

    def status(self, job_ids: Sequence[str]) -> dict[str, JobStatus]:
        """As `Launcher.status`; a job of another process is lost, for it ended with that process."""
        mine = {job_id: self._tasks[job_id] for job_id in job_ids if job_id in self._tasks}
        failed = self._client.connection.get_failed_tasks(list(mine.values())) if mine else {}
        gone = JobStatus(state=JobState.LOST, detail="its search is gone and took it along", meaning=FailureKind.LOST)
        return {i: self._status(i, failed.get(mine[i], {})) if i in mine else gone for i in job_ids}

    def _status(self, job_id: str, failures: dict[int, Any]) -> JobStatus:
        files = self._folder / job_id
        for failure in failures.values():
            detail = (failure.error.strip().splitlines() or ["its process failed"])[-1]
            meaning = FailureKind.LOST if (files / "cancel").exists() else FailureKind.CRASH
            return JobStatus(state=JobState.ENDED, detail=detail, meaning=meaning)
        if (files / "ended").exists():
            return JobStatus(state=JobState.ENDED, detail="its processes ended without an outcome")
        if (files / "begun").exists():
            return JobStatus(state=JobState.RUNNING)
        if (files / "cancel").exists():  # as its process will see before it begins
            return JobStatus(state=JobState.LOST, detail="cancelled before its turn", meaning=FailureKind.LOST)
        return JobStatus(state=JobState.PENDING, detail="waits for cores")

    def cancel(self, job_ids: Sequence[str]) -> None:
        """As `Launcher.cancel`."""
        mine = [job_id for job_id in job_ids if job_id in self._tasks]
        for job_id in mine:
            (self._folder / job_id / "cancel").touch()
        begun = time.monotonic()
        signum = signal.SIGTERM
        while left := [i for i, status in self.status(mine).items() if status.state is JobState.RUNNING]:
            waited_s = time.monotonic() - begun
            if waited_s > _CANCEL_S:
                raise LaunchError(f"runs {', '.join(left)} did not end {_CANCEL_S:g} s after they were cancelled")
            if waited_s > _OBEY_S:
                signum = signal.SIGKILL  # which takes the ranks along
            for job_id in left:
                process = (self._folder / job_id / "begun").read_text(encoding="ascii")
                if process:  # else it is about to write it
                    processes.send(int(process), signum)
            time.sleep(_WAIT_S)

    def find(self, tokens: Sequence[str]) -> dict[str, str]:
        """As `Launcher.find`; the runs end with the process that started them."""
        del tokens
        return {}

    def log_path(self, job_id: str) -> Path:
        """As `Launcher.log_path`."""
        return self._folder / job_id / "run.log"

    def close(self) -> None:
        """As `Launcher.close`."""
        if self._server is not None:
            self._server.stop()  # which kills what still runs
            self._server = None
            self._tasks.clear()

    def _start(self) -> Any:
        """The client of a server with one worker on this machine."""
        if self._server is None:
            place = str(self._folder / "server")
            with _silent():  # the server introduces itself, but stdout is for results
                worker = self._hyperqueue.cluster.WorkerConfig(cores=self._cores)
                self._server = self._hyperqueue.LocalCluster(place, worker)
            python = self._hyperqueue.client.PythonEnv(python_bin=sys.executable)
            self._client = self._server.client(python_env=python)
        return self._client


def carry_out(files: str, job: NodeJob) -> None:
    """A task's process: the run, unless it was cancelled by now."""
    (Path(files) / "begun").write_text(str(os.getpid()), encoding="ascii")
    try:
        if not (Path(files) / "cancel").exists():
            run_node(job)
    finally:
        (Path(files) / "ended").touch()


def _package() -> ModuleType:
    try:
        return importlib.import_module("hyperqueue")
    except ImportError as error:
        raise InputError("--submit hyperqueue: needs HyperQueue: pip install 'hptool[hyperqueue]'") from error


def _refuse_elsewhere(cluster: Cluster) -> None:
    if cluster.gpu.device != "cpu":
        raise InputError(
            f"--submit hyperqueue: {cluster.name} has GPUs of the kind {cluster.gpu.name}, allowed is cpu: "
            "runs side by side would share them"
        )
    if cluster.scheduler != "local" and os.environ.get("SLURM_JOB_NUM_NODES") != "1":
        raise InputError(
            f"--submit hyperqueue: {cluster.name} has scheduler: {cluster.scheduler}, allowed is local, or to start "
            "hptool itself in an allocation of one node"
        )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Within, nothing that this process writes to its standard output is heard."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
