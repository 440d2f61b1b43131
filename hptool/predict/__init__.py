"""Predictions: FLOPs, memory and step time of whole tables of layouts. Pure NumPy."""

import math
from dataclasses import dataclass, fields

import numpy as np

from hptool.candidates import BoolColumn, IntColumn, Layouts, Recompute
from hptool.predict.memory import Memory, predict_memory
from hptool.predict.parallel import Table
from hptool.predict.parts import Column, join, take
from hptool.predict.setting import Setting, stack
from hptool.predict.step_time import StepTime, predict_step_time
from hptool.units import GIB, TERA

__all__ = ["Predictions", "predict", "stack"]

#: Standard deviations on either side of the middle between which 80 % of a normal distribution lie.
INTERVAL_DEVIATIONS = 1.2816

#: Rows of a table that are predicted at once: their columns stay in a core's cache.
BLOCK_ROWS = 65536


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predictions:
    """What is expected of each layout of a table: memory and step time with their parts, and the rates.

    `memory_gib` is all that a rank takes of its device. `step_time_error` is a relative standard deviation.
    """

    layouts: Layouts
    memory: Memory
    step_time: StepTime
    memory_gib: Column
    p_fit: Column
    step_time_s: Column
    model_tflops_per_gpu: Column
    tokens_per_s_per_gpu: Column
    step_time_error: Column

    def __len__(self) -> int:
        return len(self.layouts)

    def select(self, index: IntColumn) -> "Predictions":
        """The rows at `index`, in that order."""
        return take(self, index)

    def ranking(self) -> IntColumn:
        """Rows in the order in which they are worth a run, ties by the order of the table.

        First the one of the highest expected throughput, then by what a run is expected to gain over it. Memory is
        no hard cut, because the fastest layouts are full ones and the estimate has an error. A layout that
        recomputes and gains nothing by it comes after all that do not (selective recomputation with a flash kernel).
        """
        if not len(self):
            return np.empty(0, dtype=np.int64)
        expected = self.tokens_per_s_per_gpu * self.p_fit
        best = int(np.argmax(np.where(self.recomputes_in_vain(), 0.0, expected)))
        gain = self.p_fit * expected_gain(
            self.tokens_per_s_per_gpu, self.step_time_error, self.tokens_per_s_per_gpu[best]
        )
        gain[best] = np.inf
        return np.lexsort((-expected, -gain, self.recomputes_in_vain()))

    def recomputes_in_vain(self) -> BoolColumn:
        """Rows whose twin without recomputation is expected to be as fast and to need no more memory."""
        t = self.layouts
        cut = np.column_stack([t.tp, t.pp, t.vpp, t.cp, t.ep, t.mbs])
        _, twin = np.unique(cut, axis=0, return_inverse=True)
        plain = t.recompute == Recompute.NONE
        none_s, none_gib = np.full((2, len(t)), np.inf)
        none_s[twin[plain]], none_gib[twin[plain]] = self.step_time_s[plain], self.memory_gib[plain]
        return np.asarray(~plain & (none_s[twin] <= self.step_time_s) & (none_gib[twin] <= self.memory_gib))

    def columns(self) -> dict[str, Column]:
        """What is predicted, by the names of a table's columns: the figures, then their parts."""
        low_s, high_s = self.step_time_interval_s
        columns = {
            "predicted_step_time_s": self.step_time_s,
            "predicted_step_time_low_s": low_s,
            "predicted_step_time_high_s": high_s,
            "predicted_tokens_per_s_per_gpu": self.tokens_per_s_per_gpu,
            "predicted_model_tflops_per_gpu": self.model_tflops_per_gpu,
            "predicted_memory_gib": self.memory_gib,
            "predicted_p_fit": self.p_fit,
        }
        for part in (self.step_time, self.memory):
            columns |= {f"predicted_{f.name}": getattr(part, f.name) for f in fields(part)}
        return columns

    @property
    def step_time_interval_s(self) -> tuple[Column, Column]:
        """Between what 80 of 100 measured step times should lie."""
        width = np.exp(INTERVAL_DEVIATIONS * self.step_time_error)
        return self.step_time_s / width, self.step_time_s * width

    @property
    def likely_to_fit(self) -> int:
        """How many rows are more likely to fit into memory than not."""
        return int(np.sum(self.p_fit >= 0.5))  # noqa: PLR2004 (more likely than not)


def expected_gain(throughput: Column, error: Column, best: float) -> Column:
    """By how much a run is expected to beat `best`, its throughput known to a normal relative error."""
    deviation = error * throughput
    z = (throughput - best) / deviation
    return np.asarray(deviation * (z * normal_cdf(z) + np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)))


def predict(layouts: Layouts, setting: Setting) -> Predictions:
    """Predictions, row by row of `layouts`. `setting` has one entry, or one a row. Layouts must pass static checks."""
    blocks = [slice(at, at + BLOCK_ROWS) for at in range(0, max(1, len(layouts)), BLOCK_ROWS)]
    own = len(setting) > 1
    parts = (_predict(take(layouts, b), take(setting, b) if own else setting) for b in blocks)
    return next(parts) if len(blocks) == 1 else join(parts, len(layouts), layouts=layouts)


def _predict(layouts: Layouts, s: Setting) -> Predictions:
    table = Table.of(layouts, s)
    return conclude(layouts, s, memory=predict_memory(table), step_time=predict_step_time(table))


def conclude(layouts: Layouts, s: Setting, *, memory: Memory, step_time: StepTime) -> Predictions:
    """What follows from memory and step time, and from their relative errors in the setting."""
    total_s, total_gib = step_time.total_s, memory.total_gib
    nothing = np.zeros(len(layouts))
    return Predictions(
        layouts=layouts,
        memory=memory,
        step_time=step_time,
        memory_gib=total_gib,
        p_fit=normal_cdf((s.memory_bytes / GIB / total_gib - 1) / s.memory_error),
        step_time_s=total_s,
        model_tflops_per_gpu=s.gbs * s.model_flops_per_sequence / TERA / s.gpus / total_s,
        tokens_per_s_per_gpu=s.gbs * s.tokens_per_sequence / s.gpus / total_s,
        step_time_error=s.step_time_error + nothing,
    )


def normal_cdf(z: Column) -> Column:
    """The standard normal distribution function, to 2e-4 (Page 1977, Applied Statistics 26:75)."""
    return np.asarray(0.5 + 0.5 * np.tanh(z * (0.7988 + 0.7988 * 0.04417 * (z * z))))
