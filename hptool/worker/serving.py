"""One rank of a serving run: from the process group to what its points took.

A point is answered over and over: first until the answers take one time, then as often as was ordered. Where a point
does not fit, all ranks have to know before one of them waits for the others: what can be said before anything is
computed is agreed upon here. A rank that finds out later dies of it, and the supervisor starts all anew (`served`).
"""

import gc
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from hptool import timing
from hptool.base_config import BaseConfig
from hptool.measurement import FailureKind, Percentiles, PointFailure, ServedPoint, ServingMeasurement
from hptool.serving_orders import PointOrder, ServingOrders
from hptool.units import GIB
from hptool.worker import kernels, outcome, served, weights
from hptool.worker.generation import Generator
from hptool.worker.nodes import Place
from hptool.worker.processes import Heartbeats, limit_memory
from hptool.worker.rank import attempt, device_name, fullest_memory_gib, join, refusals_by_name, versions_of

_MS_PER_S = 1000.0

#: What a measurement tells of a device's memory beside each point's peak.
_DEVICE_MEMORY = ("max_reserved_gib", "device_used_gib", "device_memory_gib")

#: What runs, as a measurement calls it.
ENGINE = "megatron-core static, hptool's loop"


def serve_rank(orders: ServingOrders, config: BaseConfig, place: Place, heartbeats: Heartbeats) -> int:
    """Serves all points, and leaves a measurement or a failure; answers the exit code of the process."""
    return attempt(lambda: _serve(orders, config, place, heartbeats), place)


def _serve(orders: ServingOrders, config: BaseConfig, place: Place, heartbeats: Heartbeats) -> None:
    device = join(config, place)
    if place.memory_gib is not None and device.type == "cpu":
        limit_memory(place.memory_gib)
    with refusals_by_name(place, heartbeats):
        generator = Generator(config, device, beat=lambda: heartbeats.beat(place.local_rank))
        if orders.checkpoint is not None:
            weights.load(Path(orders.checkpoint), generator.chunk)
        _Server(orders, config, place, heartbeats, generator, device).run()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


class _Server:
    """One rank's view of the run; all ranks go through the same, and only the first one writes."""

    def __init__(  # noqa: PLR0917 (what a rank is made of)
        self,
        orders: ServingOrders,
        config: BaseConfig,
        place: Place,
        heartbeats: Heartbeats,
        generator: Generator,
        device: torch.device,
    ) -> None:
        self._orders = orders
        self._config = config
        self._place = place
        self._heartbeats = heartbeats
        self._generator = generator
        self._device = device
        self._graphs = orders.cuda_graphs
        self._points: list[ServedPoint] = []
        self._failures: list[PointFailure] = []
        self._startup_s: float | None = None
        self._memory: dict[str, float] = {}

    def run(self) -> None:
        """All points that are open, one after the other."""
        self._take_up()
        while (point := self._next()) is not None:
            self._say(f"{point.name}: begins")
            found = self._point(point)
            if isinstance(found, ServedPoint):
                self._points.append(found)
                self._say(f"{point.name}: {found.latency_ms.p50:.4g} ms, {found.tokens_per_s:.4g} tokens/s")
            else:
                self._failures.append(found)
                self._say(f"{point.name}: {found.kind}: {found.message}")
            self._write(found)
        if self._is_first:
            served.end(self._place.directory)

    @property
    def _is_first(self) -> bool:
        return self._place.rank == 0

    def _take_up(self) -> None:
        """What ranks before these have measured, where they died of a point."""
        kept: list[Any] = [None]
        if self._is_first:
            measured = served.read(self._place.directory)
            failures = {failure.name: failure for failure in served.failures_of(self._place.directory)}
            if measured is not None:
                failures = {failure.name: failure for failure in measured.failures} | failures
            kept = [(measured, list(failures.values()))]
        torch.distributed.broadcast_object_list(kept, src=0)
        (found,) = kept
        measured, self._failures = found
        if measured is not None:
            self._points, self._startup_s = list(measured.points), measured.startup_s
            self._graphs = self._graphs and measured.cuda_graphs
            kept_gib = {name: getattr(measured, name) for name in _DEVICE_MEMORY}
            self._memory = {name: gib for name, gib in kept_gib.items() if gib is not None}

    def _next(self) -> PointOrder | None:
        """The point whose turn it is; None where all are done or the time is over, of which the first rank decides."""
        left = served.open_points(self._orders, self._points, self._failures)
        limit, elapsed = self._orders.max_seconds, time.monotonic() - self._heartbeats.started
        is_late = limit is not None and elapsed > limit and bool(self._points or self._failures)  # one point has to be
        if self._is_first and left and not is_late:
            served.begin_point(self._place.directory, left[0])  # before another rank can die of it
        late = torch.tensor([int(is_late)], device=self._device)
        torch.distributed.broadcast(late, src=0)
        if not left or not late:
            return left[0] if left else None
        self._say(f"not begun after {limit} s: {', '.join(point.name for point in left)}")
        return None

    def _point(self, point: PointOrder) -> ServedPoint | PointFailure:
        generator = self._generator
        _forget_memory(self._device)
        message = ""
        try:
            generator.open(point.batch, point.input_len, point.output_len)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not outcome.is_memory_error(error):
                raise
            message = str(error)
        try:
            if self._any(bool(message)):
                text = message or "the cache of keys and values does not fit on another rank"
                return served.failure_of(point, FailureKind.OOM, text)
            return self._measure(point)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            # Alone it can go on. With others it cannot know where they are: they may wait for it.
            if self._place.world_size > 1 or not outcome.is_memory_error(error):
                raise
            return served.failure_of(point, FailureKind.OOM, str(error))
        finally:
            generator.close()

    def _measure(self, point: PointOrder) -> ServedPoint:
        prompts = self._prompts(point)
        first_s: list[float] = []
        all_s: list[float] = []

        def answer() -> None:
            answers = self._generator.answer(prompts, point.output_len)
            slowest = torch.tensor([answers.first_s, answers.all_s], dtype=torch.float64, device=self._device)
            torch.distributed.all_reduce(slowest, op=torch.distributed.ReduceOp.MAX)
            for times, time_s in zip((first_s, all_s), slowest.tolist(), strict=True):
                times.append(time_s)
            if self._startup_s is None:
                self._startup_s = time.monotonic() - self._heartbeats.started - all_s[0]
            self._heartbeats.finish_step(self._place.local_rank)

        answer()
        if self._graphs and point.output_len > 1:
            self._record()
            first_s.clear()
            all_s.clear()
            answer()
        # The rule leaves out half of the passes at most, so this ends.
        while len(all_s) - (warmups := max(1, timing.warmup_steps(all_s))) < self._orders.repeats:
            answer()
        found = _served(point, (first_s, all_s), warmups, self._config.gpus, self._peak_gib())
        self._memory = _greater(self._memory, fullest_memory_gib(self._device))
        return found

    def _record(self) -> None:
        """Has the decoding recorded as CUDA graphs; where one rank cannot, none of them uses any from now on."""
        problem = ""
        try:
            self._generator.record()
        except RuntimeError as error:
            if outcome.is_memory_error(error):
                raise
            problem = str(error)
        if self._any(bool(problem)):
            self._graphs = False
            self._generator.forget_records()
            self._say(f"CUDA graphs cannot be recorded, going on without: {problem or 'on another rank'}")

    def _prompts(self, point: PointOrder) -> torch.Tensor:
        """Tokens of the vocabulary, the same on all ranks."""
        drawn = torch.Generator().manual_seed(self._config.model.seed)
        shape = (point.batch, point.input_len)
        return torch.randint(0, self._config.shape.vocab_size, shape, generator=drawn).to(self._device)

    def _any(self, mine: bool) -> bool:  # noqa: FBT001 (a flag is what it is about)
        """It is so on some rank."""
        flag = torch.tensor([int(mine)], device=self._device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def _peak_gib(self) -> float:
        """Of this point, on the fullest rank."""
        own = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _peak_resident()
        peak = torch.tensor([own], dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
        return float(peak) / GIB

    def _write(self, found: ServedPoint | PointFailure) -> None:
        if not self._is_first:
            return
        directory = self._place.directory
        outcome.write_measurement(directory, self._measurement())
        served.end_point(directory)
        rate = found.tokens_per_s if isinstance(found, ServedPoint) else 0.0
        served.tell_progress(directory, len(self._points) + len(self._failures), len(self._orders.points), rate)

    def _measurement(self) -> ServingMeasurement:
        order = {point.name: i for i, point in enumerate(self._orders.points)}
        config = served.serving_config(self._config)
        memory = {name: gib for name, gib in self._memory.items() if name in _DEVICE_MEMORY}
        return ServingMeasurement(
            points=tuple(sorted(self._points, key=lambda point: order[point.name])),
            failures=tuple(sorted(self._failures, key=lambda failure: order[failure.name])),
            skipped=served.skipped(self._orders, self._points, self._failures),
            engine=ENGINE,
            cuda_graphs=self._graphs,
            gpus=config.gpus,
            startup_s=self._startup_s or 0.0,
            memory_kind="max allocated" if self._device.type == "cuda" else "max resident",
            **memory,
            num_parameters=config.shape.num_parameters,
            device=device_name(self._device),
            precision=config.precision,
            kernels=kernels.serving_names(config),
            versions=versions_of(self._device),
        )

    def _say(self, message: str) -> None:
        if self._is_first:
            print(message, flush=True)  # noqa: T201 (the log)


def _served(
    point: PointOrder, times_s: tuple[Sequence[float], Sequence[float]], warmups: int, gpus: int, peak_gib: float
) -> ServedPoint:
    """What the passes say of a point: the seconds to the first tokens and to all tokens, of each of them."""
    first_s, all_s = times_s
    later = point.output_len - 1
    token_s = [(whole - first) / later if later else 0.0 for first, whole in zip(first_s, all_s, strict=True)]
    timed = all_s[warmups:]
    low_s, high_s = timing.median_interval(timed)
    latency_s = median(timed)
    rate = point.batch * point.output_len / latency_s
    return ServedPoint(
        batch=point.batch,
        input_len=point.input_len,
        output_len=point.output_len,
        repeats=len(timed),
        warmups=warmups,
        ttft_ms=_percentiles(first_s[warmups:]),
        tpot_ms=_percentiles(token_s[warmups:]),
        latency_ms=_percentiles(timed),
        latency_low_ms=low_s * _MS_PER_S,
        latency_high_ms=high_s * _MS_PER_S,
        tokens_per_s=rate,
        tokens_per_s_per_gpu=rate / gpus,
        tokens_per_s_per_user=point.output_len / latency_s,
        peak_memory_gib=peak_gib,
        is_steady=timing.is_steady(all_s),
    )


def _percentiles(times_s: Sequence[float]) -> Percentiles:
    """In milliseconds; between two of the times in proportion. All requests of a batch share a time."""
    p50, p95, p99 = (float(x) * _MS_PER_S for x in np.percentile(times_s, (50, 95, 99)))
    return Percentiles(p50=p50, p95=max(p50, p95), p99=max(p50, p95, p99))


def _greater(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {name: max(gib, one.get(name, 0.0)) for name, gib in other.items()}


def _forget_memory(device: torch.device) -> None:
    """What a point before took is given back, and is not this one's peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak resident size; see proc(5)
    except OSError:
        return  # the peak is then that of the run so far


def _peak_resident() -> int:
    """Bytes, since the last `_forget_memory`."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
