"""Layouts that are predicted and ranked in a second, on one core.

    python -m tests.benchmarks.layouts_per_second

Distinct layouts of GPT-3 175B on 1,024 A100s (a widened space, so that there are a million), predicted in full: memory,
probability of fitting, step time, and all parts. Median of several passes after one that warms up.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np

from hptool import files
from hptool.candidates import Layouts, SearchLimits, SearchSpace, enumerate_layouts
from hptool.plan import SearchRequest, make_plan
from hptool.predict import predict, stack

PASSES = 7


def seconds(work: Callable[[], object]) -> list[float]:
    """Of each pass."""
    work()
    found = []
    for _ in range(PASSES):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return found


def main() -> None:
    """Print the rates."""
    plan = make_plan(SearchRequest(model="gpt3/175b", cluster="dgx-a100"))
    limits = files.read(files.data_directory("base_configs") / "search_space.yaml", SearchLimits)
    setting = stack([(plan.config.workload, plan.cluster, plan.framework)])

    def whole_space() -> None:
        layouts = enumerate_layouts(SearchSpace(), plan.config.workload, limits).layouts
        predict(layouts, setting).ranking()

    taken = statistics.median(seconds(whole_space))
    total = len(plan.predictions) + sum(r.count for r in plan.candidates.rejections)
    print(f"GPT-3 175B on {plan.config.gpus} A100s: {total} layouts enumerated, filtered, predicted and ranked")
    print(f"  {taken:.3f} s")

    many = _distinct(1_000_000)
    taken_s = seconds(lambda: predict(many, setting))
    rates = sorted(len(many) / s / 1e6 for s in taken_s)
    print(f"{len(many)} distinct layouts predicted with all their parts, one core")
    print(f"  {statistics.median(rates):.2f} million a second (of {PASSES} passes {rates[0]:.2f} to {rates[-1]:.2f})")


def _distinct(number: int) -> Layouts:
    """So many layouts, no two alike."""
    sizes = {
        "tp": (1, 2, 4, 8),
        "pp": (1, 2, 4, 8, 16, 32),
        "vpp": range(1, 9),
        "cp": (1, 2, 4, 8),
        "ep": (1,),
        "mbs": range(1, 17),
        "recompute": range(4),
        "recompute_num_layers": range(1, 25),
    }
    axes = np.meshgrid(*sizes.values(), indexing="ij")
    chosen = np.random.default_rng(0).permutation(axes[0].size)[:number]
    return Layouts(**{name: axis.ravel()[chosen].astype(np.int64) for name, axis in zip(sizes, axes, strict=True)})


if __name__ == "__main__":
    main()
