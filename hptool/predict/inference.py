"""Predictions of serving: latency, time to the first token, time of each token and memory of whole tables of points."""

from dataclasses import dataclass

import numpy as np

from hptool.facts import Cluster, Engine, ModelShape
from hptool.predict import inference_memory, normal_cdf
from hptool.predict.inference_calibration import Served, calibrate_engine
from hptool.predict.inference_case import case, constants_of
from hptool.predict.inference_memory import ServingMemory, predict_memory
from hptool.predict.inference_time import PassTime, ServingTimes, serving_times
from hptool.predict.parts import Column
from hptool.serving import ServingPoints
from hptool.units import GIB, MILLI

__all__ = [
    "PassTime",
    "Served",
    "ServingMemory",
    "ServingPredictions",
    "ServingTimes",
    "calibrate_engine",
    "most_running",
    "predict_serving",
]

#: Relative error beside the engine's for models with experts or an encoder: no published table is of the latter, and
#: one of the former.
UNSURE_SHAPE = 0.15


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServingPredictions:
    """What is expected of each point of a table: times and memory with their parts.

    `prefill` is of the prompts of all requests that run at once (`running`), `decode` of one token for each of them.
    `memory_gib` is all that a rank takes of its device, `p_fit` the probability that the point can run.
    `latency_error` is a relative standard deviation, of all three times.
    """

    points: ServingPoints
    prefill: PassTime
    decode: PassTime
    memory: ServingMemory
    running: Column
    waiting_ms: Column
    latency_ms: Column
    ttft_ms: Column
    tpot_ms: Column
    memory_gib: Column
    p_fit: Column
    latency_error: Column

    def __len__(self) -> int:
        return len(self.points)

    @property
    def requests_per_s(self) -> Column:
        """Requests that are answered in a second."""
        return np.asarray(self.points.batch / self.latency_ms / MILLI)

    @property
    def tokens_per_s(self) -> Column:
        """Tokens of the outputs in a second."""
        return np.asarray(self.requests_per_s * self.points.output_len)

    @property
    def tokens_per_s_per_gpu(self) -> Column:
        """The same for each GPU of the replica."""
        return np.asarray(self.tokens_per_s / self.points.gpus)

    def columns(self) -> dict[str, Column]:
        """What is predicted, by the names of a table's columns: the figures, then their parts."""
        figures = ("latency_ms", "ttft_ms", "tpot_ms", "memory_gib", "p_fit")
        columns: dict[str, Column] = {f"predicted_{name}": getattr(self, name) for name in figures}
        columns["predicted_tokens_per_s_per_gpu"] = self.tokens_per_s_per_gpu
        columns["predicted_latency_error"] = self.latency_error
        columns["predicted_running"] = self.running
        columns["predicted_waiting_ms"] = self.waiting_ms
        for stem, part in (("prefill_", self.prefill), ("decode_", self.decode), ("", self.memory)):
            names = tuple(type(part).__dataclass_fields__)
            columns |= {f"predicted_{stem}{name}": getattr(part, name) for name in names}
        return columns


def most_running(points: ServingPoints, shape: ModelShape, cluster: Cluster, engine: Engine) -> Column:
    """How many requests of a point's lengths can run at once, whatever its batch; no end where nothing is paged."""
    return inference_memory.most_running(case(points, shape, cluster, engine))


def predict_serving(points: ServingPoints, shape: ModelShape, cluster: Cluster, engine: Engine) -> ServingPredictions:
    """Predictions, row by row of `points`. ValueError where the GPU cannot compute in a point's precision."""
    c = case(points, shape, cluster, engine)
    memory, running, least_gib = predict_memory(c)
    times = serving_times(c, constants_of(engine), running)
    doubt = UNSURE_SHAPE if shape.num_experts or shape.encoder_num_layers else 0.0
    return ServingPredictions(
        points=points,
        prefill=times.prefill,
        decode=times.decode,
        memory=memory,
        running=running,
        waiting_ms=times.waiting_ms,
        latency_ms=times.latency_ms,
        ttft_ms=times.ttft_ms,
        tpot_ms=times.tpot_ms,
        memory_gib=memory.total_gib,
        p_fit=normal_cdf((c.memory_bytes / GIB / least_gib - 1) / engine.memory_error),
        latency_error=np.full(len(points), float(np.hypot(engine.latency_error, doubt))),
    )
