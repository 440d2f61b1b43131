"""What a search will cost before its first job, what it has cost, and what a full grid would. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hptool.candidates import IntColumn
from hptool.course import Course
from hptool.facts import Cluster
from hptool.predict.parts import Column
from hptool.strategy import InOrder
from hptool.units import SECONDS_PER_HOUR

#: A local run imports torch and megatron-core and forks its ranks: 5 to 12 seconds on a few cores.
LOCAL_OVERHEAD_S = 8.0

#: What a run costs besides its steps inside an allocation that is there: a fork, a process group, the model's weights.
_NEXT_RUN_S = 3.0

#: Allocations are kept for the next run only where that saves this share of the GPU hours, because runs in one
#: allocation wait for each other.
_WORTH_PACKING = 0.1

#: Layouts that a search by expectation times before it stops: the median over published grids is three, and some are
#: timed twice.
_USUAL_LAYOUTS = 4

#: Runs at once where each of them teaches the search something about the next.
_USUAL_PARALLEL = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """How runs get onto nodes: the way of submission, how many at once (None: the launcher knows), the start's cost."""

    submit: str
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
    """What a search may cost, by predicted step times.

    `layouts` first timings at most; `gpu_hours` and `wall_s` with the longer timings of finalists and the runs at
    scale, without queueing. `usual_gpu_hours` is where the search stops by itself. `grid_gpu_hours` is what timing
    each of the `grid_layouts` in full would cost.
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


def estimate(
    course: Course,
    ranking: IntColumn,
    *,
    gpus_per_node: int,
    overhead_s: float,
    minutes: float,
    parallel: int,
    packed: bool,
) -> Estimate:
    """What the search may cost if it takes the layouts in this order; `minutes` is the limit of one job."""
    first = ranking[: course.layouts].tolist()
    runs = [(row, course.stages[0], int(course.nodes[row])) for row in first]
    usual = runs[:_USUAL_LAYOUTS]
    # A leader and a rival are timed longer, in every later stage.
    finalists = [(row, steps, int(course.nodes[row])) for steps in course.stages[1:] for row in first[:2]]
    scaled = [
        (row, course.stages[-1], course.verify_nodes) for row in first[: course.verify_top] if course.verify_nodes
    ]
    runs, usual = [*runs, *finalists, *scaled], [*usual, *finalists, *scaled]

    def gpu_s(chosen: Sequence[tuple[int, int, int]]) -> float:
        seen: set[int] = set()
        total = 0.0
        for row, steps, nodes in chosen:
            again = packed and nodes in seen
            seen.add(nodes)
            held_s = run_s(course, row, steps, nodes, _NEXT_RUN_S if again else overhead_s)
            total += held_s * nodes * gpus_per_node
        return total

    everything_s: Column = overhead_s + course.stages[-1] * course.landscape.run.step_time_s
    grid = float(np.sum(everything_s * course.nodes)) * gpus_per_node
    wall_s = sum(run_s(course, *run, _NEXT_RUN_S if packed else overhead_s) for run in runs) / max(1, parallel)
    sizes = Counter(nodes for _, _, nodes in runs)
    asked = [
        Asked(jobs=1 if packed else count, nodes=nodes, gpus=nodes * gpus_per_node, minutes=minutes)
        for nodes, count in sorted(sizes.items())
    ]
    return Estimate(
        layouts=len(first),
        gpu_hours=gpu_s(runs) / SECONDS_PER_HOUR,
        usual_gpu_hours=gpu_s(usual) / SECONDS_PER_HOUR,
        wall_s=wall_s,
        grid_layouts=len(ranking),
        grid_gpu_hours=grid / SECONDS_PER_HOUR,
        asked=asked,
    )


def worth_packing(one_by_one: Estimate, packed: Estimate) -> bool:
    """Keeping an allocation for the next run costs clearly less."""
    return packed.usual_gpu_hours < (1 - _WORTH_PACKING) * one_by_one.usual_gpu_hours


def choose(
    course: Course, ranking: IntColumn, cluster: Cluster, *, submit: str | None, parallel: int | None, minutes: float
) -> tuple[Dispatch, Estimate]:
    """How to submit (the cheaper way, where none is asked for) and what that may cost."""
    slurm = cluster.scheduler == "slurm"
    overhead_s = cluster.slurm.job_overhead_s if slurm else LOCAL_OVERHEAD_S
    learns = not isinstance(course.strategy, InOrder)
    if parallel is None and slurm and learns:
        parallel = min(_USUAL_PARALLEL, cluster.slurm.array_parallelism)
    at_once = parallel or (cluster.slurm.array_parallelism if slurm else 1)

    def expected(*, packed: bool) -> Estimate:
        return estimate(
            course,
            ranking,
            gpus_per_node=cluster.gpus_per_node,
            overhead_s=overhead_s,
            minutes=minutes,
            parallel=at_once,
            packed=packed,
        )

    single = "array" if slurm else "separate"
    if submit is None:
        submit = "packed" if worth_packing(expected(packed=False), expected(packed=True)) else single
    dispatch = Dispatch(submit=submit, parallel=parallel, overhead_s=overhead_s)
    return dispatch, expected(packed=submit in ("packed", "hyperqueue"))
