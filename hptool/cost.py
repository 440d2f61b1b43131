"""What a search will cost before its first job, what it has cost, and what a full grid would. Pure."""

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hptool.candidates import IntColumn
from hptool.course import RIVALS, Course
from hptool.facts import Cluster, Submit
from hptool.launch.jobs import IDLE_S
from hptool.predict.parts import Column
from hptool.strategy import Adaptive, InOrder
from hptool.units import SECONDS_PER_HOUR, SECONDS_PER_MINUTE

#: A local run imports torch and megatron-core and forks its ranks: 5 to 12 seconds on a few cores.
LOCAL_OVERHEAD_S = 8.0

#: What a run costs besides its steps inside an allocation that is there: a fork, a process group, the model's weights.
_NEXT_RUN_S = 3.0

#: Allocations are kept for the next run only where that saves this share of the GPU hours, because runs in one
#: allocation wait for each other.
_WORTH_PACKING = 0.1

#: Layouts that the adaptive strategy times before it stops: the median over published grids.
_USUAL_LAYOUTS = 8

#: Layouts that are usually timed longer: the leader and one that its short timing does not tell from it.
_USUAL_FINALISTS = 2

#: Runs at once where each of them teaches the search something about the next.
_USUAL_PARALLEL = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """How runs get onto nodes: the way of submission, how many at once (None: the launcher knows), the start's cost."""

    submit: Submit
    parallel: int | None
    overhead_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the scheduler will be asked for: so many jobs of so many nodes for so many minutes each, at most."""

    jobs: int
    nodes: int
    gpus: int
    minutes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a search may cost, by predicted step times and without repeats, queueing or what was found before.

    `layouts` first timings at most; `gpu_hours` and `wall_s` with as many longer timings as finalists may take, and the
    runs at scale. `usual_gpu_hours` is where the search usually ends. `grid_gpu_hours` is what timing each of the
    `grid_layouts` in full would cost.
    """

    layouts: int
    gpu_hours: float
    usual_gpu_hours: float
    wall_s: float
    grid_layouts: int
    grid_gpu_hours: float
    asked: Sequence[Asked]


def step_time_s(course: Course, row: int, nodes: int) -> float:
    """What a step of a run is expected to take, before anything was learnt; at scale as on all nodes."""
    at_scale = nodes != course.nodes[row]
    predictions = course.landscape.target if at_scale else course.landscape.run
    return float(predictions.step_time_s[row])


def run_s(course: Course, row: int, steps: int, nodes: int, overhead_s: float) -> float:
    """How long a run is expected to hold its nodes."""
    return overhead_s + steps * step_time_s(course, row, nodes)


#: A run that may come: its row, its steps and its nodes.
_Run = tuple[int, int, int]


def _phases(course: Course, first: Sequence[int], finalists: int) -> list[list[_Run]]:
    """The runs of a search that times the rows `first` and so many of them longer; each phase waits for the last."""
    chosen = [first, *([first[:finalists]] * (len(course.stages) - 1))]
    phases = [
        [(row, steps, int(course.nodes[row])) for row in rows]
        for rows, steps in zip(chosen, course.stages, strict=True)
    ]
    if course.verify_nodes is not None:
        best = [row for row in first if course.scalable[row]][: course.verify_top]
        phases.append([(row, course.stages[-1], course.verify_nodes) for row in best])
    return phases


def _kept_node_s(runs: Iterable[tuple[float, int]], overhead_s: float, idle_s: float) -> tuple[float, float]:
    """Seconds times nodes, and seconds, of (seconds, nodes) one after the other in allocations that are kept.

    There is one allocation for each number of nodes, which waits `idle_s` for its next run and ends with the last.
    """
    now_s = node_s = 0.0
    ended_s: dict[int, float] = {}
    for own_s, nodes in runs:
        waited_s = now_s - ended_s[nodes] if nodes in ended_s else math.inf
        held_s = own_s + (min(_NEXT_RUN_S, overhead_s) if waited_s < idle_s else overhead_s)
        node_s += nodes * (held_s + (min(waited_s, idle_s) if nodes in ended_s else 0.0))
        now_s += held_s
        ended_s[nodes] = now_s
    return node_s + sum(nodes * min(now_s - then_s, idle_s) for nodes, then_s in ended_s.items()), now_s


def _side_by_side_s(runs: Iterable[float], parallel: int) -> float:
    """How long runs take of which so many go on at once, each starting as soon as there is room."""
    free_s = [0.0] * max(1, parallel)
    for own_s in runs:
        heapq.heapreplace(free_s, free_s[0] + own_s)
    return max(free_s)


def estimate(
    course: Course,
    ranking: Sequence[int],
    *,
    gpus_per_node: int,
    overhead_s: float,
    minutes: float,
    parallel: int,
    packed: bool,
    idle_s: float = IDLE_S,
) -> Estimate:
    """What the search may cost if it takes the layouts in this order; `minutes` is the limit of one run."""
    most_s = minutes * SECONDS_PER_MINUTE

    def own_s(run: _Run) -> float:
        return min(most_s, run_s(course, *run, 0.0))

    def held(phases: Sequence[Sequence[_Run]]) -> tuple[float, float]:
        if packed:
            return _kept_node_s(((own_s(run), run[2]) for phase in phases for run in phase), overhead_s, idle_s)
        times = [[overhead_s + own_s(run) for run in phase] for phase in phases]
        node_s = sum((overhead_s + own_s(run)) * run[2] for phase in phases for run in phase)
        return node_s, sum(_side_by_side_s(phase, parallel) for phase in times)

    first = [int(row) for row in ranking[: course.layouts]]
    most = _phases(course, first, 1 + RIVALS)
    stops = isinstance(course.strategy, Adaptive)  # the others run whatever there is
    usual = _phases(course, first[:_USUAL_LAYOUTS] if stops else first, _USUAL_FINALISTS)
    node_s, wall_s = held(most)
    usual_node_s, _ = held(usual)
    everything_s: Column = overhead_s + np.minimum(most_s, course.stages[-1] * course.landscape.run.step_time_s)
    grid_node_s = float(np.sum(everything_s * course.nodes))
    sizes = Counter(nodes for phase in most for _, _, nodes in phase)
    asked = [
        Asked(jobs=1 if packed else count, nodes=nodes, gpus=nodes * gpus_per_node, minutes=minutes)
        for nodes, count in sorted(sizes.items())
    ]
    return Estimate(
        layouts=len(first),
        gpu_hours=node_s * gpus_per_node / SECONDS_PER_HOUR,
        usual_gpu_hours=usual_node_s * gpus_per_node / SECONDS_PER_HOUR,
        wall_s=wall_s,
        grid_layouts=len(ranking),
        grid_gpu_hours=grid_node_s * gpus_per_node / SECONDS_PER_HOUR,
        asked=asked,
    )


def worth_packing(one_by_one: Estimate, packed: Estimate) -> bool:
    """Keeping an allocation for the next run costs clearly less."""
    return packed.usual_gpu_hours < (1 - _WORTH_PACKING) * one_by_one.usual_gpu_hours


def choose(
    course: Course, ranking: IntColumn, cluster: Cluster, *, submit: Submit | None, parallel: int | None, minutes: float
) -> tuple[Dispatch, Estimate]:
    """How to submit (the cheaper way, where none is asked for) and what that may cost."""
    slurm = cluster.scheduler == "slurm"
    overhead_s = cluster.slurm.job_overhead_s if slurm else LOCAL_OVERHEAD_S
    is_ordered = isinstance(course.strategy, InOrder)
    order = course.strategy.order if isinstance(course.strategy, InOrder) else ranking.tolist()
    single: Submit = "array" if slurm else "separate"

    def dispatch(way: Submit) -> Dispatch:
        at_once = parallel
        if at_once is None and slurm and way != "packed" and not is_ordered:
            at_once = min(_USUAL_PARALLEL, cluster.slurm.array_parallelism)
        return Dispatch(submit=way, parallel=at_once, overhead_s=overhead_s)

    def expected(way: Submit) -> Estimate:
        return estimate(
            course,
            order,
            gpus_per_node=cluster.gpus_per_node,
            overhead_s=overhead_s,
            minutes=minutes,
            parallel=dispatch(way).parallel or (cluster.slurm.array_parallelism if slurm else 1),
            packed=way in ("packed", "hyperqueue"),
            idle_s=IDLE_S if slurm else math.inf,
        )

    if submit is None:
        submit = "packed" if worth_packing(expected(single), expected("packed")) else single
    return dispatch(submit), expected(submit)
