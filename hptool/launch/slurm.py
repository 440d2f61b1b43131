"""Runs as Slurm jobs.

Job states come from Slurm's queue first and from its accounting second, because submitit's own watcher asks accounting
alone and waits for ever without it.
"""

import contextlib
import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError
from submitit.slurm.slurm import _make_sbatch_string

from hptool.errors import LaunchError
from hptool.facts import Cluster
from hptool.launch.jobs import SCHEDULER_MARGIN_MINUTES, JobState, JobStatus, Run, Started, blocked, node_job
from hptool.measurement import FailureKind
from hptool.worker.supervisor import run_node

_ACTIVE = frozenset(
    "RUNNING COMPLETING CONFIGURING RESIZING SIGNALING STAGE_OUT STOPPED SUSPENDED".split()  # noqa: SIM905
)
_WAITING = frozenset("PENDING REQUEUED REQUEUE_HOLD REQUEUE_FED SPECIAL_EXIT".split())  # noqa: SIM905

#: Reasons of a pending job that will never start as it was asked for (Slurm accepts such jobs).
_NEVER = frozenset(
    "PartitionNodeLimit PartitionTimeLimit DependencyNeverSatisfied BadConstraints QOSMaxGRESPerUser "  # noqa: SIM905
    "QOSMaxNodePerJobLimit QOSMaxWallDurationPerJobLimit AssocMaxNodePerJobLimit".split()
)

#: What a final state of Slurm means where the worker could not say it itself.
_MEANING = {
    "OUT_OF_MEMORY": FailureKind.OOM,
    "TIMEOUT": FailureKind.TIMEOUT,
    "DEADLINE": FailureKind.TIMEOUT,
    "CANCELLED": FailureKind.LOST,
    "NODE_FAIL": FailureKind.LOST,
    "BOOT_FAIL": FailureKind.LOST,
    "PREEMPTED": FailureKind.LOST,
    "REVOKED": FailureKind.LOST,
}

_COMMAND_TIMEOUT_S = 30
_UNKNOWN_PATIENCE_S = 10


def slurm_parameters(cluster: Cluster, *, nodes: int, time_limit: int | str, name: str) -> dict[str, Any]:
    """What `sbatch` is asked for, in submitit's names; the limit in minutes, or as sbatch reads it."""
    options = cluster.slurm
    cpus = options.cpus_per_gpu * cluster.gpus_per_node
    environment = [f"export {key}={shlex.quote(value)}" for key, value in cluster.environment.items()]
    extra: dict[str, Any] = {
        # submitit asks for USR2 before the limit, which a short job gets at its very start; SIGCONT to the batch
        # shell does nothing.
        "signal": "B:CONT@1",
        # A run is repeated by hptool or not at all: a silent second copy would spoil the first one's files.
        "no-requeue": True,
        **options.extra_options,
    }
    parameters: dict[str, Any] = {
        "job_name": name,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "exclusive": options.exclusive or None,
        "nodes": nodes,
        # One supervisor a node; it starts the node's ranks.
        "ntasks_per_node": 1,
        "cpus_per_task": cpus,
        "gpus_per_node": cluster.gpus_per_node if cluster.gpu.device == "cuda" else None,
        "mem": f"{options.mem_gib_per_node}G" if options.mem_gib_per_node else None,
        "time": time_limit,
        "array_parallelism": options.array_parallelism,
        "stderr_to_stdout": True,
        "srun_args": [
            # A node whose supervisor gives up takes the other nodes down with it, at once.
            "--kill-on-bad-exit=1",
            # Since Slurm 22.05 srun no longer takes this from sbatch, and all ranks would share one core.
            f"--cpus-per-task={cpus}",
        ],
        "setup": [*options.setup, *environment] or None,
        "additional_parameters": extra,
    }
    # submitit would mark every job with a workload key, which sites that track those refuse.
    return {key: value for key, value in parameters.items() if value is not None} | {"wckey": None}


def run_parameters(run: Run, cluster: Cluster) -> dict[str, Any]:
    """As `slurm_parameters`, for a timed run."""
    minutes = math.ceil(run.max_minutes) + SCHEDULER_MARGIN_MINUTES
    name = f"hptool-{run.directory.parent.parent.name}"
    return slurm_parameters(cluster, nodes=run.nodes, time_limit=minutes, name=name)


def batch_script(
    parameters: Mapping[str, Any], config: Path, output: Path, python: str = sys.executable, orders: Path | None = None
) -> str:
    """A script for sbatch that trains a config as the search's own jobs do, its logs and numbers in `output`.

    With orders, as `hptool train` does.
    """
    worker = [python, "-u", "-m", "hptool.worker", str(config), "--output", str(output)]
    if orders is not None:
        worker += ["--orders", str(orders)]
    return str(_make_sbatch_string(command=shlex.join(worker), folder=output, **parameters))


def submit_script(script: Path) -> str:
    """Hands a script to Slurm; the id of its job. LaunchError in Slurm's own words."""
    answer = _slurm("sbatch", "--parsable", str(script))
    if answer.returncode:
        raise LaunchError(f"sbatch refused {script}: {_last_line(answer.stderr)}")
    return answer.stdout.strip().partition(";")[0]


def is_queued(job_id: str) -> bool:
    """Slurm still means to run the job, or runs it."""
    return job_id in _slurm("squeue", "--me", "-h", "-o", "%A").stdout.split()


class SlurmLauncher:
    """Runs as Slurm jobs: one array for all runs of a shape, one `srun` each."""

    slots: int | None = None
    poll_s = 2.0

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster = cluster
        self._folder = folder
        self._ended: dict[str, JobStatus] = {}
        self._missing_since: dict[str, float] = {}
        self._has_accounting = True

    def submit(self, runs: Sequence[Run], started: Started) -> None:
        """As `Launcher.submit`."""
        if shutil.which("sbatch") is None or shutil.which("srun") is None:
            raise LaunchError("sbatch: not found on this machine; run hptool where Slurm's commands are installed")
        for _, group in groupby(sorted(runs, key=_shape), key=_shape):
            same = list(group)
            jobs = [node_job(run, self._cluster, None) for run in same]
            executor = submitit.SlurmExecutor(self._folder)
            executor.update_parameters(**run_parameters(same[0], self._cluster))
            # No interruption between a job's start and the note of its id, or it would be nobody's.
            with blocked(signal.SIGINT, signal.SIGTERM, signal.SIGHUP), _refusals(self._folder):
                for run, job in zip(same, executor.map_array(run_node, jobs), strict=True):
                    started(run, job.job_id)

    def status(self, job_ids: Sequence[str]) -> dict[str, JobStatus]:
        """As `Launcher.status`: one `squeue` for all, `sacct` for those that the queue has forgotten."""
        ask = [i for i in job_ids if i not in self._ended]
        found = {i: self._ended[i] for i in job_ids if i in self._ended}
        if not ask:
            return found
        queue = _slurm("squeue", "--me", "-h", "-r", "-t", "all", "-o", "%i|%T|%r")
        if queue.returncode:  # the controller is away: judge nothing, the jobs go on without it
            detail = f"Slurm does not answer: {_last_line(queue.stderr)}"
            return found | dict.fromkeys(ask, JobStatus(state=JobState.PENDING, detail=detail))
        rows = [line.split("|", 2) for line in queue.stdout.splitlines() if line.count("|") >= 2]  # noqa: PLR2004
        known = {job_id: (state, reason) for job_id, state, reason in rows}
        accounted = self._accounting([i for i in ask if i not in known])
        for job_id in ask:
            state, reason = known.get(job_id) or accounted.get(job_id) or ("", "")
            status = self._judge(job_id, state, reason)
            found[job_id] = status
            if status.state in (JobState.ENDED, JobState.LOST):
                self._ended[job_id] = status
        return found

    def _judge(self, job_id: str, state: str, reason: str) -> JobStatus:
        if state in _WAITING:
            if reason in _NEVER:
                self._scancel([job_id])
                detail = f"Slurm will never start it ({reason})"
                return JobStatus(state=JobState.LOST, detail=detail, meaning=FailureKind.REJECTED)
            return JobStatus(state=JobState.PENDING, detail=reason)
        if state in _ACTIVE:
            self._missing_since.pop(job_id, None)
            return JobStatus(state=JobState.RUNNING, detail="" if state == "RUNNING" else state)
        if state:
            word = state.partition(" ")[0].rstrip("+")
            detail = f"Slurm ended job {job_id}: {state}{f' ({reason})' if reason not in ('', 'None') else ''}"
            return JobStatus(state=JobState.ENDED, detail=detail, meaning=_MEANING.get(word, FailureKind.CRASH))
        since = self._missing_since.setdefault(job_id, time.monotonic())
        if time.monotonic() - since < _UNKNOWN_PATIENCE_S:
            return JobStatus(state=JobState.RUNNING, detail="neither in squeue nor in sacct")
        detail = f"Slurm does not know job {job_id} any more"
        return JobStatus(state=JobState.LOST, detail=detail, meaning=FailureKind.LOST)

    def _accounting(self, job_ids: Sequence[str]) -> dict[str, tuple[str, str]]:
        if not job_ids or not self._has_accounting:
            return {}
        answer = _slurm("sacct", "-X", "-n", "-P", "-S", "now-30days", "-o", "JobID,State", "-j", ",".join(job_ids))
        if answer.returncode:
            self._has_accounting = "accounting storage is disabled" not in answer.stderr
            return {}
        rows = [line.split("|") for line in answer.stdout.splitlines() if line.count("|") == 1]
        # The database may still call a job running that the controller has forgotten.
        return {job_id: (state, "") for job_id, state in rows if state.split()[0] not in _ACTIVE | _WAITING}

    def cancel(self, job_ids: Sequence[str]) -> None:
        """As `Launcher.cancel`."""
        self._scancel(job_ids)
        deadline = time.monotonic() + 60
        while True:
            states = self.status(job_ids)
            left = [i for i, s in states.items() if s.state in (JobState.PENDING, JobState.RUNNING)]
            if not left:
                return
            if time.monotonic() > deadline:
                raise LaunchError(f"jobs {', '.join(left)} may still run 60 s after scancel; see squeue --me")
            time.sleep(0.5)

    def _scancel(self, job_ids: Sequence[str]) -> None:
        if job_ids:
            _slurm("scancel", *job_ids)

    def find(self, tokens: Sequence[str]) -> dict[str, str]:
        """As `Launcher.find`; local jobs end with the process that started them."""
        del tokens
        return {}

    def close(self) -> None:
        """As `Launcher.close`."""

    def log_path(self, job_id: str) -> Path:
        """As `Launcher.log_path`."""
        return self._folder / f"{job_id}_0_log.out"


def _shape(run: Run) -> tuple[int, float]:
    return run.nodes, run.max_minutes


@contextlib.contextmanager
def _refusals(folder: Path) -> Iterator[None]:
    """A refusal by sbatch as a LaunchError in Slurm's own words, without the files that submitit leaves behind then."""
    try:
        yield
    except FailedJobError as error:
        for pattern in ("*.pkl", ".submission_file_*.sh"):
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)
        said = [line.partition("sbatch: ")[2] for line in str(error).splitlines() if "sbatch: " in line]
        words = "\n".join(dict.fromkeys(said)) or _last_line(str(error))
        raise LaunchError(f"sbatch refused: {words}") from error


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(  # noqa: S603 (fixed programs, arguments are ids that Slurm gave)
            command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"{command[0]} gave no answer in {_COMMAND_TIMEOUT_S} s")
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]}: {error.strerror}")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
