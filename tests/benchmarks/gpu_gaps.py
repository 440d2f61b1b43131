"""When the GPU idles while hptool's worker trains, how many kernels it is given, and which of them take the time.

    python -m tests.benchmarks.gpu_gaps --output results/gpu-gaps

For each model of `gpu_speed`, in its fastest layout (of the record in `../speed`, else the best predicted one): the
worker's own `Training` under torch.profiler for three steps. The profiler slows the host down, so the share in which no
kernel runs is taken of the steps that were timed before it was on; that under the profiler is given beside it.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from hptool.base_config import BaseConfig
from hptool.candidates import Layout
from hptool.timed_runs import timed_run
from hptool.units import GIB
from tests.benchmarks.gpu_speed import best_layout, ratio
from tests.gpu import runs
from tests.gpu.command import Given, command
from tests.gpu.device import one_gpu
from tests.gpu.models import GPT2, MAX_MINUTES, TINY_GPT2, TINY_UTILISED, UTILISED, Model, plan_of
from tests.gpu.record import Record, read_record

#: Steps before the profiler is on: the first ones warm up, the last ones are timed without it. And steps under it.
_BEFORE, _WARM, _PROFILED = 6, 3, 3

_TOP_KERNELS = 10

#: What one model takes: imports, a start as in `gpu_speed`, nine steps of up to two seconds, and reading the trace.
_MODEL_S = 50.0

#: Categories of a trace (torch.profiler's chrome traces, by Kineto): what the device does, and how it is told.
_DEVICE_WORK = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_HOST_CALLS = frozenset({"cuda_runtime", "cuda_driver"})
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What a trace says of so many steps. Seconds of device time in which anything ran, each instant counted once."""

    busy_s: float
    kernels: int
    launches: int
    launch_s: float
    top: Sequence[tuple[str, float, int]]  # name, seconds, times


def read_trace(events: Iterable[Mapping[str, Any]], device_work: frozenset[str] = _DEVICE_WORK) -> Trace:
    """Adds up a chrome trace's events, whose `ts` and `dur` are microseconds."""
    intervals: list[tuple[float, float]] = []
    by_name: defaultdict[str, list[float]] = defaultdict(list)
    launches: list[float] = []
    for event in events:
        category = str(event.get("cat", "")).lower()
        if event.get("ph") != "X":
            continue
        if category in device_work:
            start, length = float(event["ts"]), float(event["dur"])
            intervals.append((start, start + length))
            by_name[str(event["name"])].append(length)
        elif category in _HOST_CALLS and str(event["name"]).startswith(_LAUNCHES):
            launches.append(float(event["dur"]))
    seconds = sorted(((name, sum(times) / 1e6, len(times)) for name, times in by_name.items()), key=lambda x: -x[1])
    return Trace(
        busy_s=union(intervals) / 1e6,
        kernels=len(intervals),
        launches=len(launches),
        launch_s=sum(launches) / 1e6,
        top=seconds[:_TOP_KERNELS],
    )


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of what intervals cover together; overlaps count once."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


def profile(config: BaseConfig, directory: Path, steps: tuple[int, int, int]) -> dict[str, Any]:
    """The finding for one config, by training it in this process, which has no torch yet and becomes a rank on its own.

    `steps` are those before the profiler, those of them that warm up, and those under it.
    """
    import torch  # noqa: PLC0415 (heavy)
    from torch.profiler import ProfilerActivity  # noqa: PLC0415 (heavy)
    from torch.profiler import profile as profiled  # noqa: PLC0415 (heavy)

    from hptool.worker.nodes import Meeting, Place, listen  # noqa: PLC0415 (with the framework)
    from hptool.worker.rank import join  # noqa: PLC0415 (imports torch and megatron)
    from hptool.worker.training import Training  # noqa: PLC0415 (as above)

    # Here and not in the parent: what collects a trace does not bear a fork.
    runs.load(config.trainer.accelerator)
    before, warm, under = steps
    listener = listen()
    meeting = Meeting(host="127.0.0.1", port=listener.getsockname()[1], listener=listener.fileno())
    device = join(config, Place(rank=0, local_rank=0, world_size=1, directory=directory, meeting=meeting))
    on_gpu = device.type == "cuda"
    training = Training(config, device, beat=lambda: None)
    plain_s = [training.step(step).time_s for step in range(before)][warm:]
    # Without the CPU's operators, whose recording would slow the host far more; a CPU has nothing else to show.
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with profiled(activities=activities) as profiler:
        profiled_s = [training.step(before + step).time_s for step in range(under)]
    path = directory / f"trace-{os.getpid()}.json"
    profiler.export_chrome_trace(str(path))
    document = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    trace = read_trace(document["traceEvents"], _DEVICE_WORK if on_gpu else frozenset({"cpu_op"}))
    return finding_of(trace, plain_s, profiled_s) | (_memory(torch, device) if on_gpu else {})


def finding_of(trace: Trace, plain_s: Sequence[float], profiled_s: Sequence[float]) -> dict[str, Any]:
    """What a trace of steps that took `profiled_s`, and `plain_s` without the profiler, comes to.

    RuntimeError where nothing ran by it: then it is the trace that is wrong.
    """
    if not trace.kernels:
        raise RuntimeError("the trace has no kernels")
    steps, step_s = len(profiled_s), median(plain_s)
    busy_s = trace.busy_s / steps
    return {
        "outcome": "ok",
        "step_time_s": step_s,
        "profiled_step_time_s": median(profiled_s),
        "busy_s": busy_s,
        "idle_share": max(0.0, 1 - busy_s / step_s),
        "idle_share_profiled": max(0.0, 1 - trace.busy_s / sum(profiled_s)),
        "kernels_a_step": trace.kernels / steps,
        "launches_a_step": trace.launches / steps,
        "host_us_a_launch": 1e6 * trace.launch_s / trace.launches if trace.launches else None,
        "top_kernels": [
            {"name": name[:160], "share": seconds / trace.busy_s, "times_a_step": times / steps}
            for name, seconds, times in trace.top
        ],
    }


def _memory(torch: Any, device: Any) -> dict[str, float]:
    free, total = torch.cuda.mem_get_info(device)
    return {
        "max_allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "max_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        "device_used_gib": (total - free) / GIB,
    }


def layout_of(model: Model, speed: Mapping[str, Any]) -> str | None:
    """The fastest layout that the record of `gpu_speed` has of a model."""
    compared = ratio(speed, model.name)
    if compared is not None:
        return f"tp1-pp1-mbs{compared[1].rpartition('mbs')[2]}"
    return best_layout(speed.get(f"utilisation {model.name}") or {})


def measure(given: Given, record: Record) -> None:
    """Profile each model that has not been profiled in its fastest layout."""
    speed = read_record(given.output.parent / "speed").get("findings", {})
    models = (TINY_GPT2, *TINY_UTILISED) if given.tiny else (GPT2, *UTILISED)
    steps = (2, 1, 1) if given.tiny else (_BEFORE, _WARM, _PROFILED)
    for model in models[: 1 if given.tiny else None]:
        name, known = layout_of(model, speed), record.findings.get(model.name, {})
        if known.get("outcome") == "ok" and name in (None, known.get("layout")):
            continue
        if not given.tiny and not given.clock.has(_MODEL_S):
            record.leave(model.name)
            continue
        plan = plan_of(model, one_gpu(given.device))
        best = plan.candidates.layouts.row(int(plan.predictions.ranking()[0]))
        layout = Layout.parse(name) if name is not None else best
        config = timed_run(plan.config, layout, nodes=1, steps=sum(steps), max_minutes=MAX_MINUTES)
        work, limit_s = partial(profile, config, given.output, steps), max(1.0, given.clock.left_s)
        try:
            found = runs.answer_of(work, log=given.output / f"{model.name}.log", limit_s=limit_s)
        except RuntimeError as error:
            (record.complain if given.clock.has(1.0) else record.leave)(f"{model.name}: {error}")
            continue
        record.find(model.name, found | {"layout": name or layout.name})
        for line in printed(model.name, record.findings[model.name]):
            print(line, flush=True)


def printed(name: str, found: Mapping[str, Any]) -> list[str]:
    """A finding as lines."""
    host_us = found["host_us_a_launch"]
    lines = [
        f"{name} ({found['layout']}): idle {found['idle_share']:.1%} of {found['step_time_s']:.4f} s "
        f"({found['idle_share_profiled']:.1%} under the profiler), {found['kernels_a_step']:,.0f} kernels a step"
        + (f", {host_us:.1f} us of the host a launch" if host_us is not None else "")
    ]
    return lines + [
        f"  {kernel['share']:6.1%} {kernel['times_a_step']:8.0f}x {kernel['name'][:100]}"
        for kernel in found["top_kernels"]
    ]


main = command(measure)

if __name__ == "__main__":
    main()
