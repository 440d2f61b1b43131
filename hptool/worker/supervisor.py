"""A node's supervisor: forks the node's ranks, watches them, and ends them all when one goes wrong.

Importing this module loads neither torch nor Megatron-core; `run_node` does, once for all ranks of the node.
"""

import contextlib
import logging
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TypeAlias

from hptool import files
from hptool.base_config import BaseConfig
from hptool.errors import InputError
from hptool.measurement import Failure, FailureKind
from hptool.secrets import redact
from hptool.serving_orders import ServingOrders
from hptool.units import GIB, SECONDS_PER_MINUTE
from hptool.worker import outcome, processes, served, serving_command
from hptool.worker.installed import COMPILER_VARIABLE
from hptool.worker.nodes import Meeting, Node, Place, listen, this_node
from hptool.worker.orders import Orders
from hptool.worker.refusals import refuse_impossible, refuse_missing_framework, refuse_unservable

_LOG = logging.getLogger(__name__)

#: What a rank does from its start to its exit code.
RunRank: TypeAlias = Callable[[BaseConfig, Place, processes.Heartbeats], int]

_POLL_S = 0.02

#: How long ranks may differ in leaving: interpreters and communicators take their time to go.
_LEAVING_S = 10.0

#: How long ranks that are to stop may take to end their step and to write a checkpoint; Slurm kills after 30 seconds.
STOPPING_S = 25.0

#: How long a rank that SIGTERM ended waits for the supervisor's own: schedulers send it to all, in any order.
_CANCEL_S = 1.0

#: For the ranks to write their stacks before they are killed.
_STACKS_S = 1.0

#: How long killed ranks may take to go.
_END_S = 30.0

#: Bytes at the end of a log that hold a dying rank's last words; the stacks of its threads come after them.
_LOG_END = 20_000

#: Part of a rank's memory limit beyond which a SIGKILL was for memory.
_NEARLY_ALL = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeJob:
    """What one node has to run, and its limits.

    `memory_gib_per_rank` is a hard limit, for CPU ranks. When the process `owner_pid` is gone, so is the run.
    `hang_s` is how long no rank may finish a microbatch once the first step is done. `environment` is set before
    anything is loaded. With `orders` the ranks train for real: a first SIGTERM or SIGINT then asks them to write a
    checkpoint and end. With `benchmark_s` they measure their devices for so many seconds instead (`microbenchmarks`).
    With neither, and with a `serving.json` beside the config, they serve the model instead of training it.
    """

    config_path: str
    run_directory: str
    max_minutes: float
    memory_gib_per_rank: float | None = None
    owner_pid: int | None = None
    hang_s: float = 300.0
    environment: Mapping[str, str] = field(default_factory=dict)
    orders: Orders | None = None
    benchmark_s: float | None = None


class RunFailedError(RuntimeError):
    """The run gave no measurement; what went wrong first is `failure`, and in `failure-rankN.json`."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.kind}: {failure.message}")
        self.failure = failure


def run_node(job: NodeJob) -> None:
    """Runs this node's ranks to the end of the training.

    Returns when `measurement.json` is there. Raises RunFailedError or InputError with a failure recorded; SystemExit
    (143, 130) without one when the run was cancelled by SIGTERM or SIGINT, or its owner is gone.
    """
    os.environ.update(job.environment)
    directory = Path(job.run_directory)
    try:
        config = files.read(Path(job.config_path), BaseConfig)
        serving = serving_of(job)
        if serving is None:
            refuse_impossible(config, job.config_path)
        else:
            refuse_unservable(config, serving, job.config_path)
        node = this_node(config.trainer.num_nodes)
    except InputError as error:
        with contextlib.suppress(OSError):  # it is said again below
            served.clear(directory)  # on every node, but all come to this same end
        _record(directory, outcome.failure_of(error, 0, None))
        raise InputError(*map(redact, error.problems)) from None  # a scheduler's log may be read by others
    run_ranks(config, job, node)


def serving_of(job: NodeJob) -> ServingOrders | None:
    """What the job is to serve, if that is what it does; InputError where what lies beside its config is none."""
    other = job.orders is not None or job.benchmark_s is not None
    return None if other else served.read_orders(Path(job.config_path))


def run_ranks(config: BaseConfig, job: NodeJob, node: Node, tell: Callable[[], None] = lambda: None) -> None:
    """As `run_node`, of a config that has been read; `tell` is called several times a second.

    InputError where torch or Megatron-core is missing.
    """
    directory = Path(job.run_directory)
    devices = config.trainer.devices
    serving = serving_of(job)
    watch = _Watch(
        directory=directory,
        job=job,
        first_rank=node.index * devices,
        heartbeats=processes.Heartbeats(devices),
        serving=serving,
    )
    with _cancelled_by_signals(watch):
        try:
            if node.index == 0:
                served.clear(directory)
            if serving is not None and serving.engine == "command":
                if node.index == 0:
                    serving_command.serve(serving, config, job, tell)
                return
            run_rank = load_framework(config.trainer.accelerator, job.orders, serving)
            if job.benchmark_s is not None:
                from hptool.worker.microbenchmarks import measure_rank  # noqa: PLC0415 (imports torch)

                run_rank = partial(measure_rank, job.benchmark_s)
        except InputError as error:
            _record(directory, outcome.failure_of(error, watch.first_rank, None))
            raise
        except OSError as error:
            raise RunFailedError(_record(directory, outcome.failure_of(error, watch.first_rank, None))) from error
        try:
            failure = _train(watch, run_rank, config, node, tell)
            while failure is not None and _is_only_a_points(watch, failure, node):
                failure = _train(watch, run_rank, config, node, tell)
            watch.end_ranks()
            if failure is not None and not outcome.is_measured(directory):  # it may have finished while it was ended
                raise RunFailedError(_record(directory, failure))
            if watch.stop_signal is not None:
                raise SystemExit(128 + watch.stop_signal)
        finally:
            watch.end_ranks()


def load_framework(accelerator: str, orders: Orders | None = None, serving: ServingOrders | None = None) -> RunRank:
    """`rank.run_rank`, with torch and Megatron-core behind it ready for `accelerator`; CUDA stays untouched.

    With orders, what trains for real; with those of a serving run, what serves.

    Everything here must be safe to do before a fork: no thread is started and no device is opened.
    """
    refuse_missing_framework()
    if accelerator == "cpu":
        os.environ.update(
            CUDA_VISIBLE_DEVICES="",  # ranks on the CPU must not open a GPU that happens to be there
            OMP_NUM_THREADS="1",  # a rank is a core; read by OpenMP when torch is loaded
        )
        from hptool.worker import cpu  # noqa: PLC0415 (imports torch)

        cpu.stand_in_for_cuda()
    if os.environ.get(COMPILER_VARIABLE) == "off":
        os.environ["TORCH_COMPILE_DISABLE"] = "1"  # of Megatron's fused functions too; read when torch is loaded
    # Megatron's overlaps rely on kernels being queued in the order of their launch; read when CUDA starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with warnings.catch_warnings():
        # What runs instead is known: it is the reason for attention.py, and the measurement names it.
        warnings.filterwarnings("ignore", message=".*not installed.*")
        from hptool.worker.rank import run_rank  # noqa: PLC0415 (imports torch and megatron)

        if orders is not None:
            from hptool.worker.trainer import train_rank  # noqa: PLC0415 (as above)

            return partial(train_rank, orders)
        if serving is not None:
            from hptool.worker.serving import serve_rank  # noqa: PLC0415 (as above)

            return partial(serve_rank, serving)
    return run_rank


def _is_only_a_points(watch: "_Watch", failure: Failure, node: Node) -> bool:
    """Notes that a point has ended the ranks; true where others, which are still to be forked, can do what is left.

    Only what runs out of memory says nothing of other points. On several nodes the run ends with it: their
    supervisors cannot agree upon another start.
    """
    orders, directory = watch.serving, watch.directory
    if orders is None or watch.is_over() or node.index > 0 or failure.kind is FailureKind.LOST:
        return False
    point = served.point_under_way(directory, orders)
    if point is None:
        return False
    left = served.note_failure(directory, orders, served.failure_of(point, failure.kind, failure.message))
    if failure.kind is not FailureKind.OOM or node.count > 1 or not left:
        return False
    _LOG.warning("%s is out of memory: going on with %s", point.name, ", ".join(other.name for other in left))
    watch.begin_again()
    return True


def _record(directory: Path, failure: Failure) -> Failure:
    """As `outcome.record_failure`; where that cannot write, it is said, and what was to be written is the answer."""
    try:
        return outcome.record_failure(directory, failure)
    except (OSError, InputError) as error:
        _LOG.error("cannot write how this run ended, which was %s: %s (%s)", failure.kind, failure.message, error)
        return failure


def _train(
    watch: "_Watch", run_rank: RunRank, config: BaseConfig, node: Node, tell: Callable[[], None]
) -> Failure | None:
    """Starts the ranks and waits for their end; a disk or a kernel that takes no more is a failure like others."""
    try:
        _fork_ranks(watch, run_rank, config, node)
        return watch.until_done(tell)
    except OSError as error:
        return outcome.failure_of(error, watch.first_rank, None)


def _fork_ranks(watch: "_Watch", run_rank: RunRank, config: BaseConfig, node: Node) -> None:
    listener = listen() if node.count == 1 else None
    port = listener.getsockname()[1] if listener else node.port
    if config.trainer.accelerator == "cpu" and node.count == 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo asks for the address of the host's name
    meeting = Meeting(host=node.first_host, port=port, listener=listener.fileno() if listener else None)
    for local_rank in range(config.trainer.devices):
        rank = watch.first_rank + local_rank
        log = outcome.log_path(watch.directory, rank)
        watch.log_starts[rank] = log.stat().st_size if log.exists() else 0
        place = Place(
            rank=rank,
            local_rank=local_rank,
            world_size=config.gpus,
            directory=watch.directory,
            log=log,
            meeting=meeting,
            memory_gib=watch.job.memory_gib_per_rank,
        )
        child = processes.fork_rank(partial(run_rank, config, place, watch.heartbeats), log=log)
        watch.ranks[child] = rank
    if listener:
        listener.close()


@dataclass(slots=True, kw_only=True)
class _Watch:
    """The node's ranks while they run: `ranks` holds those alive, by process.

    `log_starts` is where this attempt begins in each rank's log; an earlier one's words must not explain its end.
    `serving` is what they serve, if they do.
    """

    directory: Path
    job: NodeJob
    first_rank: int
    heartbeats: processes.Heartbeats
    ranks: dict[int, int] = field(default_factory=dict)
    log_starts: dict[int, int] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    oom_kills: int = field(default_factory=processes.oom_kills)
    first_left: float | None = None
    stop_signal: int | None = None
    stop_until: float = math.inf
    serving: ServingOrders | None = None

    def begin_again(self) -> None:
        """Forgets the ranks, which it ends, and how they did; their time goes on."""
        self._kill_ranks()
        outcome.clear_failure(self.directory)
        self.heartbeats = processes.Heartbeats(self.heartbeats.ranks)
        self.oom_kills = processes.oom_kills()
        self.first_left = None

    def is_over(self) -> bool:
        """The ranks have done what they were started for; whatever goes wrong afterwards does not matter."""
        over = outcome.is_measured if self.serving is None else served.is_over
        return over(self.directory)

    def stop(self, signum: int) -> None:
        """Asks the ranks to end by themselves; SystemExit where they would not, or have been asked before."""
        if self.job.orders is None or not self.ranks or self.stop_signal is not None:
            raise SystemExit(128 + signum)
        self.stop_signal, self.stop_until = signum, time.monotonic() + STOPPING_S
        self.heartbeats.ask_to_stop()
        _LOG.warning("asked to stop: up to %g s for a checkpoint; a second signal does not wait", STOPPING_S)

    def until_done(self, tell: Callable[[], None]) -> Failure | None:
        """Waits until all ranks have left or one thing is wrong; None where the measurement is there."""
        owner = processes.Process(self.job.owner_pid) if self.job.owner_pid is not None else None
        seen, moved = self.heartbeats.snapshot(), time.monotonic()
        while self.ranks:
            time.sleep(_POLL_S)
            tell()
            if (failure := self._reap()) is not None:
                return failure
            if owner is not None and owner.is_gone():
                _LOG.warning("the process that owns this run is gone: ending it")
                raise SystemExit(128 + signal.SIGTERM)
            now = time.monotonic()
            if now > self.stop_until:
                raise SystemExit(128 + (self.stop_signal or signal.SIGTERM))
            if (snapshot := self.heartbeats.snapshot()) != seen:
                seen, moved = snapshot, now
            if self.first_left is not None and now - self.first_left > _LEAVING_S:
                break
            if now - self.started > self.job.max_minutes * SECONDS_PER_MINUTE:
                return self._stuck(FailureKind.TIMEOUT, f"not done after {self.job.max_minutes:g} minutes")
            if now - moved > self.job.hang_s and self.heartbeats.steps(0) > 0:
                return self._stuck(FailureKind.HANG, f"no rank has finished a microbatch for {self.job.hang_s:g} s")
        # Other nodes than the first rank's may see its file late. But no rank leaves in peace before it is there.
        left_in_peace = not self.ranks and self.first_rank > 0
        if left_in_peace or self.is_over():
            return None
        running = f" while ranks {sorted(self.ranks.values())} still ran" if self.ranks else ""
        return self._failure(FailureKind.CRASH, f"ranks left without a measurement{running}", self.first_rank)

    def end_ranks(self) -> None:
        """Kills the ranks that are still there, and waits for their end. Signals no longer disturb."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)
        self._kill_ranks()

    def _kill_ranks(self) -> None:
        for child in self.ranks:
            processes.send(child, signal.SIGKILL)
        # A process that a driver holds cannot be waited for; the scheduler has to deal with it.
        deadline = time.monotonic() + _END_S
        while self.ranks and time.monotonic() < deadline:
            for child in list(self.ranks):
                if os.waitpid(child, os.WNOHANG)[0]:
                    del self.ranks[child]
            time.sleep(_POLL_S / 10)

    def _reap(self) -> Failure | None:
        """Takes note of ranks that have left; a failure where one did not leave by itself and in peace."""
        for child, rank in list(self.ranks.items()):
            pid, status, usage = os.wait4(child, os.WNOHANG)
            if pid == 0:
                continue
            del self.ranks[child]
            code = os.waitstatus_to_exitcode(status)
            if code == 0 or self.is_over():
                self.first_left = self.first_left or time.monotonic()
            elif code == processes.CANNOT_WRITE:
                kind = self._kind_of_log(rank)
                kind = FailureKind.LOST if kind is FailureKind.CRASH else kind
                return self._failure(kind, f"rank {rank} could not write how it ended; its log may tell", rank)
            elif code > 0:
                return self._failure(self._kind_of_log(rank), f"rank {rank} ended with exit code {code}", rank)
            else:
                return self._killed(rank, signal.Signals(-code), usage.ru_maxrss * 1024)
        return None

    def _killed(self, rank: int, signum: signal.Signals, peak_bytes: int) -> Failure:
        if signum == signal.SIGTERM:
            time.sleep(_CANCEL_S)  # our own SIGTERM may be on its way; its handler ends this
        limit = self.job.memory_gib_per_rank
        for_memory = signum == signal.SIGKILL and (
            processes.oom_kills() > self.oom_kills or (limit is not None and peak_bytes > _NEARLY_ALL * limit * GIB)
        )
        kind = FailureKind.OOM if for_memory else self._kind_of_log(rank)
        peak = f", at {peak_bytes / GIB:.2f} GiB resident" if kind is FailureKind.OOM else ""
        return self._failure(kind, f"rank {rank} was killed by {signum.name}{peak}", rank)

    def _kind_of_log(self, rank: int) -> FailureKind:
        """A C++ library that finds no memory ends the process, and says so in the log only."""
        try:
            written = outcome.log_path(self.directory, rank).read_bytes()[self.log_starts[rank] :]
        except OSError:
            return FailureKind.CRASH
        end = written[-_LOG_END:].decode(errors="replace")
        return FailureKind.OOM if outcome.speaks_of_memory(end) else FailureKind.CRASH

    def _stuck(self, kind: FailureKind, message: str) -> Failure | None:
        """A failure that blames the rank that is furthest behind, with everyone's stacks in their logs."""
        if self.is_over():
            return None  # only the leaving is stuck
        for child in self.ranks:
            processes.send(child, processes.SHOW_STACKS)
        time.sleep(_STACKS_S)
        pairs = list(zip(self.heartbeats.snapshot()[::2], self.heartbeats.snapshot()[1::2], strict=True))
        behind = min(range(len(pairs)), key=lambda i: pairs[i])
        done = min(steps for _, steps in pairs)
        text = f"{message} ({done} steps finished); the stacks of all threads are in the logs"
        return self._failure(kind, text, self.first_rank + behind)

    def _failure(self, kind: FailureKind, message: str, rank: int) -> Failure:
        return Failure(kind=kind, message=message, rank=rank, log_path=str(outcome.log_path(self.directory, rank)))


@contextlib.contextmanager
def _cancelled_by_signals(watch: _Watch) -> Iterator[None]:
    """Within, SIGTERM and SIGINT raise SystemExit with the shell's exit code for them, at once or when all is saved."""

    def cancel(signum: int, _frame: FrameType | None) -> None:
        watch.stop(signum)

    previous = {signum: signal.signal(signum, cancel) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
