"""Predictions: FLOPs, memory and step time of whole tables of layouts. Pure NumPy."""

import math
from dataclasses import dataclass

import numpy as np

from hptool.candidates import BoolColumn, IntColumn, Layouts, Recompute, Workload
from hptool.facts import Cluster
from hptool.predict.flops import model_flops_per_step
from hptool.predict.memory import RELATIVE_ERROR, Memory, predict_memory
from hptool.predict.parts import Column
from hptool.predict.step_time import StepTime, predict_step_time
from hptool.units import TERA

_erf = np.vectorize(math.erf, otypes=[np.float64])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predictions:
    """What is expected of each layout of a table: memory and step time with their parts, and the rates."""

    layouts: Layouts
    memory: Memory
    step_time: StepTime
    memory_gib: Column
    p_fit: Column
    step_time_s: Column
    model_tflops_per_gpu: Column
    tokens_per_s_per_gpu: Column

    def __len__(self) -> int:
        return len(self.layouts)

    def ranking(self) -> IntColumn:
        """Rows from best to worst: by throughput times the probability of fitting, ties by the order of the table.

        Memory is no hard cut, because the fastest layouts are full ones and the estimate has an error. A layout that
        recomputes and gains nothing by it comes after all that do not (selective recomputation with a flash kernel).
        """
        worth = self.tokens_per_s_per_gpu * self.p_fit
        return np.lexsort((-worth, self._recomputes_in_vain()))

    def _recomputes_in_vain(self) -> BoolColumn:
        """Rows whose twin without recomputation is expected to be as fast and to need no more memory."""
        t = self.layouts
        cut = np.column_stack([t.tp, t.pp, t.vpp, t.cp, t.mbs])
        _, twin = np.unique(cut, axis=0, return_inverse=True)
        plain = t.recompute == Recompute.NONE
        none_s, none_gib = np.full((2, len(t)), np.inf)
        none_s[twin[plain]], none_gib[twin[plain]] = self.step_time_s[plain], self.memory_gib[plain]
        return np.asarray(~plain & (none_s[twin] <= self.step_time_s) & (none_gib[twin] <= self.memory_gib))

    @property
    def likely_to_fit(self) -> int:
        """How many rows are more likely to fit into memory than not."""
        return int(np.sum(self.p_fit >= 0.5))  # noqa: PLR2004 (more likely than not)


def predict(layouts: Layouts, work: Workload, cluster: Cluster) -> Predictions:
    """Predictions for `work` on `cluster`, row by row of `layouts`. Layouts must pass the static checks."""
    memory = predict_memory(layouts, work, cluster.gpu)
    step_time = predict_step_time(layouts, work, cluster)
    total_s, total_gib = step_time.total_s, memory.total_gib
    spare = (cluster.gpu.memory_gib - total_gib) / (RELATIVE_ERROR * total_gib)
    return Predictions(
        layouts=layouts,
        memory=memory,
        step_time=step_time,
        memory_gib=total_gib,
        p_fit=0.5 * (1 + _erf(spare / math.sqrt(2))),
        step_time_s=total_s,
        model_tflops_per_gpu=model_flops_per_step(work.shape, work.gbs) / TERA / total_s / work.gpus,
        tokens_per_s_per_gpu=work.gbs * work.shape.seq_length / total_s / work.gpus,
    )
