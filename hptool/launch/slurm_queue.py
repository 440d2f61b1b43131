"""What Slurm says of jobs: its queue first and its accounting second, seldom, and for all jobs at once.

submitit's own watcher asks accounting alone and waits for ever without it.
"""

import math
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from hptool.errors import BusyError
from hptool.facts import SlurmOptions
from hptool.launch.jobs import JobState, JobStatus
from hptool.launch.slurm_commands import last_line, slurm
from hptool.measurement import FailureKind

_ACTIVE = frozenset(
    "RUNNING COMPLETING CONFIGURING RESIZING SIGNALING STAGE_OUT STOPPED SUSPENDED".split()  # noqa: SIM905
)
_WAITING = frozenset("PENDING REQUEUED REQUEUE_HOLD REQUEUE_FED SPECIAL_EXIT".split())  # noqa: SIM905

#: Reasons of a pending job that will never start as it was asked for (Slurm accepts such jobs).
_NEVER = frozenset(
    "PartitionNodeLimit PartitionTimeLimit DependencyNeverSatisfied BadConstraints QOSMaxGRESPerUser "  # noqa: SIM905
    "QOSMaxNodePerJobLimit QOSMaxWallDurationPerJobLimit AssocMaxNodePerJobLimit".split()
)

#: Reasons of a pending job that Slurm took back when it could not start it on a node, and now holds for ever.
_HELD = frozenset({"launch failed requeued held", "launch_failed_requeued_held", "JobHoldMaxRequeue"})

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

#: Ends that Slurm put to a job for reasons of its own.
_TAKEN = frozenset({"NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "REVOKED"})

#: How long a job may be in neither squeue nor sacct, or taken away and not yet pending again. sacct lags by a second.
UNKNOWN_PATIENCE_S = 10

#: How a job's comment begins that holds the marks of hptool's runs; an array's holds one for each element, in order.
_MARK = "hptool:"
_TOKEN = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*")
_JOB_ID = re.compile(r"([0-9]+)(?:_([0-9]+))?")

#: Slurm refuses comments of more than 1024 characters (_validate_job_create_req in slurmctld); some for the site's own.
COMMENT_LENGTH = 900

_UNSEEN = JobStatus(state=JobState.PENDING)


def comment(tokens: Iterable[str]) -> str:
    """A job's comment, by which `Queue.find` knows it again. ValueError for a token that cannot be read back."""
    words = list(tokens)
    for token in words:
        if not _TOKEN.fullmatch(token):
            msg = f"token: {token!r} given, allowed are letters, digits and _.-"
            raise ValueError(msg)
    return _MARK + ",".join(words)


class Queue:
    """The user's jobs as Slurm last told of them; asked at most once in `poll_s` seconds."""

    def __init__(self, options: SlurmOptions) -> None:
        self._poll_s = options.poll_s
        self._requeues = options.requeue or options.extra_options.get("requeue") is True
        self._last: dict[str, JobStatus] = {}
        self._since: dict[str, float] = {}
        self._asked_at = -math.inf
        self._has_accounting = True
        self._cancelled: set[str] = set()

    def status(self, job_ids: Sequence[str], *, at_once: bool = False) -> dict[str, JobStatus]:
        """The last known state of each job, pending where Slurm was not asked since its submission. Ends are final."""
        left = [job_id for job_id in job_ids if self._is_open(job_id)]
        if left and (at_once or time.monotonic() - self._asked_at >= self._poll_s):
            self._ask(dict.fromkeys([*filter(self._is_open, self._last), *left]))
            self._asked_at = time.monotonic()
        return {job_id: self._last.get(job_id, _UNSEEN) for job_id in job_ids}

    def cancel(self, job_ids: Sequence[str]) -> str:
        """Tells Slurm to end the jobs; what it objects to."""
        if not job_ids:
            return ""
        self._cancelled.update(job_ids)
        answer = slurm("scancel", *job_ids)
        return last_line(answer.stderr) if answer.returncode else ""

    def find(self, tokens: Sequence[str]) -> dict[str, str]:
        """The newest job with each token, those that have not ended before others. BusyError without an answer."""
        wanted = set(tokens)
        answer = slurm("squeue", "--me", "-h", "-r", "-t", "all", "-o", "%i|%T|%k")
        if answer.returncode:
            raise BusyError(f"Slurm does not answer: {last_line(answer.stderr)}")
        found = _marked(answer.stdout, wanted)
        if wanted - found.keys():
            found = _marked(self._sacct("JobID,State,Comment"), wanted) | found
        return found

    def _is_open(self, job_id: str) -> bool:
        return self._last.get(job_id, _UNSEEN).state in (JobState.PENDING, JobState.RUNNING)

    def _ask(self, job_ids: Iterable[str]) -> None:
        answer = slurm("squeue", "--me", "-h", "-r", "-t", "all", "-o", "%i|%T|%r")
        if answer.returncode:  # the controller is away: judge nothing, the jobs go on without it
            detail = f"Slurm does not answer: {last_line(answer.stderr)}"
            self._last |= {i: replace(self._last.get(i, _UNSEEN), detail=detail) for i in job_ids}
            return
        rows = [line.split("|", 2) for line in answer.stdout.splitlines() if line.count("|") >= 2]  # noqa: PLR2004
        known = {job_id: (state, reason) for job_id, state, reason in rows}
        known = self._accounting([i for i in job_ids if i not in known]) | known
        for job_id in job_ids:
            self._last[job_id] = self._judge(job_id, *known.get(job_id, ("", "")))
        self.cancel([i for i in job_ids if self._last[i].state is JobState.LOST and i in known])

    def _judge(self, job_id: str, state: str, reason: str) -> JobStatus:
        word = state.partition(" ")[0].rstrip("+")
        if word in _WAITING | _ACTIVE:
            self._since.pop(job_id, None)
            return _alive(word, reason)
        if not state or (word in _TAKEN and self._requeues):
            waited = time.monotonic() - self._since.setdefault(job_id, time.monotonic())
            if waited < UNKNOWN_PATIENCE_S:
                return JobStatus(state=JobState.RUNNING, detail=state or "neither in squeue nor in sacct")
        if not state:
            detail = f"Slurm does not know job {job_id} any more"
            return JobStatus(state=JobState.LOST, detail=detail, meaning=FailureKind.LOST, may_run_again=True)
        detail = f"Slurm ended job {job_id}: {state}{f' ({reason})' if reason not in ('', 'None') else ''}"
        if word == "CANCELLED":
            detail = f"{'hptool' if job_id in self._cancelled else 'someone'} cancelled job {job_id}: {state}"
        meaning = _MEANING.get(word, FailureKind.CRASH)
        return JobStatus(state=JobState.ENDED, detail=detail, meaning=meaning, may_run_again=word in _TAKEN)

    def _accounting(self, job_ids: Sequence[str]) -> dict[str, tuple[str, str]]:
        if not job_ids:
            return {}
        answer = self._sacct("JobID,State", "-j", ",".join(job_ids))
        rows = [line.split("|") for line in answer.splitlines() if line.count("|") == 1]
        # The database may still call a job running that the controller has forgotten.
        return {job_id: (state, "") for job_id, state in rows if state.partition(" ")[0] not in _ACTIVE | _WAITING}

    def _sacct(self, columns: str, *which: str) -> str:
        """What accounting prints; nothing where there is none or it does not answer."""
        if not self._has_accounting:
            return ""
        answer = slurm("sacct", "-X", "-n", "-P", "-S", "now-30days", "-o", columns, *which)
        if answer.returncode:
            self._has_accounting = "accounting storage is disabled" not in answer.stderr
            return ""
        return answer.stdout


def _alive(state: str, reason: str) -> JobStatus:
    if state in _ACTIVE:
        return JobStatus(state=JobState.RUNNING, detail="" if state == "RUNNING" else state)
    if reason in _NEVER:
        detail = f"Slurm will never start it ({reason})"
        return JobStatus(state=JobState.LOST, detail=detail, meaning=FailureKind.REJECTED)
    if reason in _HELD:
        detail = f"Slurm could not start it and holds it ({reason})"
        return JobStatus(state=JobState.LOST, detail=detail, meaning=FailureKind.LOST, may_run_again=True)
    return JobStatus(state=JobState.PENDING, detail=reason)


def _marked(listing: str, wanted: set[str]) -> dict[str, str]:
    """Job ids by token, of lines "id|state|comment"."""
    found: dict[str, tuple[bool, int, str]] = {}
    for line in listing.splitlines():
        job_id, _, rest = line.partition("|")
        state, _, text = rest.partition("|")
        name, mark = _JOB_ID.fullmatch(job_id), text.rpartition(_MARK)
        tokens = mark[2].split(",") if mark[1] else []
        index = int(name[2] or 0) if name else len(tokens)
        if name and index < len(tokens) and tokens[index] in wanted:
            word = state.partition(" ")[0]
            row = (word in _ACTIVE | _WAITING, int(name[1]), job_id)
            found[tokens[index]] = max(row, found.get(tokens[index], row))
    return {token: job_id for token, (_, _, job_id) in found.items()}
