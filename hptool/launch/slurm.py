"""Runs as Slurm jobs: submitted, watched, cancelled, and found again by the marks that they carry."""

import contextlib
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import Any, TypeVar

from submitit.core.utils import DelayedSubmission

from hptool.errors import BusyError, LaunchError
from hptool.facts import Cluster
from hptool.launch.jobs import JobState, JobStatus, Run, Started, blocked, node_job
from hptool.launch.slurm_commands import is_over_limit, job_id_of, refusal, slurm
from hptool.launch.slurm_queue import COMMENT_LENGTH, Queue, comment
from hptool.launch.slurm_script import job_script, run_parameters, sbatch_environment, slurm_parameters
from hptool.worker.supervisor import run_node

_Argument = TypeVar("_Argument")

#: The most seconds between two looks at the jobs: files are read in between, whether Slurm is asked or not.
_LOOK_S = 2.0

#: How long cancelled jobs may take to go; sites let them tidy up for 30 s (KillWait).
_CANCEL_S = 60
_CANCEL_PAUSES_S = (0.5, 5.0)


def submit_script(script: Path, cluster: Cluster | None = None) -> str:
    """Hands a script to Slurm, with the secrets of the profile; the id of its job.

    LaunchError in Slurm's own words, BusyError where it may take the script later.
    """
    environment = sbatch_environment(cluster) if cluster is not None else None
    answer = slurm("sbatch", "--parsable", str(script), environment=environment)
    job_id = job_id_of(answer)
    if job_id is None:
        raise refusal(answer, environment or {}, str(script))
    return job_id


def is_queued(job_id: str) -> bool:
    """Slurm still means to run the job, or runs it."""
    return job_id in slurm("squeue", "--me", "-h", "-o", "%A").stdout.split()


class SlurmLauncher:
    """Runs as Slurm jobs, one `srun` each: `arrays` makes one job array of all runs of a shape, else each is its own.

    Scripts, what they call and their logs go into `folder`, which must be shared with the nodes and no other
    launcher's: files are named by job id, and ids can come round again.
    """

    slots: int | None = None

    def __init__(self, cluster: Cluster, folder: Path, *, arrays: bool) -> None:
        self.poll_s = min(_LOOK_S, cluster.slurm.poll_s)
        self._cluster = cluster
        self._folder = folder
        self._arrays = arrays
        self._queue = Queue(cluster.slurm)
        # Tokens of jobs that sbatch may have handed over although it gave no answer.
        self._doubtful: set[str] = set()

    def submit(self, runs: Sequence[Run], started: Started) -> None:
        """As `Launcher.submit`. After a BusyError the same runs may be submitted again: none runs twice."""
        for _, group in groupby(sorted(runs, key=_shape), key=_shape):
            self._submit_alike({run.token or uuid.uuid4().hex: run for run in group}, started)

    def start(
        self,
        function: Callable[[_Argument], object],
        argument: _Argument,
        *,
        name: str,
        nodes: int,
        max_minutes: float,
        token: str,
    ) -> str:
        """One job of `name` that calls `function(argument)` once on each of its nodes; its id.

        The function must be importable there, or picklable whole. Errors as of `submit`.
        """
        parameters = slurm_parameters(self._cluster, nodes=nodes, time_limit=ceil(max_minutes), name=name)
        ids: list[str] = []
        self._start(function, {token: argument}, parameters, lambda _, job_id: ids.append(job_id))
        return ids[0]

    def status(self, job_ids: Sequence[str]) -> dict[str, JobStatus]:
        """As `Launcher.status`: what Slurm said last; it is asked once in the profile's `poll_s` at most."""
        return self._queue.status(job_ids)

    def cancel(self, job_ids: Sequence[str]) -> None:
        """As `Launcher.cancel`."""
        objection = self._queue.cancel(job_ids)
        deadline = time.monotonic() + _CANCEL_S
        pause, longest = _CANCEL_PAUSES_S
        while True:
            states = self._queue.status(job_ids, at_once=True)
            left = [i for i, s in states.items() if s.state in (JobState.PENDING, JobState.RUNNING)]
            if not left:
                return
            if time.monotonic() > deadline:
                said = objection or states[left[0]].detail
                raise LaunchError(
                    f"jobs {', '.join(left)} may still run {_CANCEL_S} s after scancel{f' ({said})' if said else ''}; "
                    "see squeue --me"
                )
            time.sleep(pause)
            pause = min(longest, 1.5 * pause)
            if objection:
                objection = self._queue.cancel(left)

    def find(self, tokens: Sequence[str]) -> dict[str, str]:
        """As `Launcher.find`; BusyError where Slurm does not answer, for that is no sign that there are none."""
        return self._queue.find(tokens) if tokens else {}

    def close(self) -> None:
        """As `Launcher.close`: a job that nobody heard of is cancelled."""
        with contextlib.suppress(BusyError):
            self._settle_doubts(())

    def log_path(self, job_id: str) -> Path:
        """As `Launcher.log_path`; of a job that an earlier launcher started, in the folder beside this one."""
        name = f"{job_id}_0_log.out"
        own = self._folder / name
        return own if own.exists() else next(self._folder.parent.glob(f"*/{name}"), own)

    def _submit_alike(self, runs: Mapping[str, Run], started: Started) -> None:
        """Runs of one shape, by token."""
        parameters = run_parameters(next(iter(runs.values())), self._cluster)
        for tokens in self._batches(list(runs)):
            jobs = {token: node_job(runs[token], self._cluster, None) for token in tokens}
            self._start(run_node, jobs, parameters, lambda token, job_id: started(runs[token], job_id))

    def _batches(self, tokens: Sequence[str]) -> Iterator[Sequence[str]]:
        """Those that go into one job: as many as its comment can name."""
        batch: list[str] = []
        for token in tokens:
            if batch and (not self._arrays or len(comment([*batch, token])) > COMMENT_LENGTH):
                yield batch
                batch = []
            batch.append(token)
        if batch:
            yield batch

    def _start(
        self,
        function: Callable[[_Argument], object],
        arguments: Mapping[str, _Argument],
        parameters: Mapping[str, Any],
        told: Callable[[str, str], None],
    ) -> None:
        """One job or array with a call for each token; `told` hears the id of each."""
        for name in ("sbatch", "srun"):
            if shutil.which(name) is None:
                raise LaunchError(f"{name}: not found on this machine; run hptool where Slurm's commands are installed")
        found = self._settle_doubts(arguments)
        for token, job_id in found.items():
            told(token, job_id)
        left = {token: argument for token, argument in arguments.items() if token not in found}
        if not left:
            return
        try:
            self._sbatch(function, left, parameters, told)
        except BusyError as error:
            if not is_over_limit(str(error)) or len(left) == 1:
                raise
            # Slurm takes an array whole or not at all: half of it may still fit.
            tokens = list(left)
            for part in (tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]):
                self._start(function, {token: left[token] for token in part}, parameters, told)

    def _settle_doubts(self, wanted: Container[str]) -> dict[str, str]:
        """Jobs that came to life although sbatch gave no answer, of `wanted` tokens; the others are cancelled."""
        found = self.find(sorted(self._doubtful))
        self._doubtful.clear()
        self._queue.cancel([job_id for token, job_id in found.items() if token not in wanted])
        return {token: job_id for token, job_id in found.items() if token in wanted}

    def _sbatch(
        self,
        function: Callable[[_Argument], object],
        arguments: Mapping[str, _Argument],
        parameters: Mapping[str, Any],
        told: Callable[[str, str], None],
    ) -> None:
        tokens = list(arguments)
        first, count = tokens[0], len(tokens)
        mark = comment(tokens)
        self._folder.mkdir(parents=True, exist_ok=True)
        script = self._folder / f"{first}.sh"
        pickles = [self._folder / (f"{first}_{i}.pkl" if count > 1 else f"{first}.pkl") for i in range(count)]
        for path, argument in zip(pickles, arguments.values(), strict=True):
            DelayedSubmission(function, argument).dump(path)
        script.write_text(job_script(parameters, self._folder, name=first, count=count, comment=mark))
        environment = sbatch_environment(self._cluster)
        # No interruption between a job's start and the note of its id; what kills outright leaves it to `find`.
        with blocked(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            answer = slurm("sbatch", "--parsable", str(script), environment=environment)
            job_id = job_id_of(answer)
            if job_id is not None:
                for index, token in enumerate(tokens):
                    told(token, f"{job_id}_{index}" if count > 1 else job_id)
                return
        error = refusal(answer, environment)
        if isinstance(error, BusyError) and not is_over_limit(str(error)):
            self._doubtful.update(tokens)  # and its files stay, for it may come to life
        else:
            for path in (script, *pickles):
                path.unlink(missing_ok=True)
        raise error


def _shape(run: Run) -> tuple[int, float]:
    return run.nodes, run.max_minutes
