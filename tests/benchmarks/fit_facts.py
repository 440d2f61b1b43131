"""Fit the constants of `cluster/gpus/` and `cluster/frameworks/` to published runs; print what would change.

    python -m tests.benchmarks.fit_facts ../shared/truth/training.csv [ampere|blackwell-hopper|nanotron|nvl72]

A factor of 1 says that the file is where the fit would put it. Each factor multiplies one constant of one GPU, network
or framework; none belongs to a data set, let alone to a model. Priors are log-normal with the deviations below, errors
of more than 7 % weigh less (Huber), and no data set weighs more than 200 runs.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from hptool import forecast, tables
from hptool.predict import predict
from hptool.predict.parts import Column

#: Of log predicted over measured: what stays unexplained, and from where on an error weighs less.
MISFIT, OUTLIER = 0.08, 0.07

MOST_RUNS = 200
STEPS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """One constant: the columns of a Setting that it stretches, in the rows of one GPU, framework or stack."""

    name: str
    columns: tuple[str, ...]
    deviation: float
    where: str = ""


#: What a GPU brings, and what a framework does, with how far a fit may move it.
GPU = {
    "gemm": (("gemm_flops_per_s",), 0.2),
    "gemm half waves": (("half_waves",), 0.5),
    "gemm half depth": (("half_depth",), 0.5),
    "attention": (("attention_flops_per_s",), 0.2),
    "memory": (("memory_bytes_per_s",), 0.1),
    "links inside": (("intra_bytes_per_s",), 0.2),
}
FRAMEWORK = {
    "operations": (("forward_launch_s", "backward_launch_s"), 0.7),
    "hidden and ffn passes": (("hidden_passes", "ffn_passes"), 0.5),
    "logit passes": (("logit_passes",), 0.5),
    "collectives": (("collective_s",), 0.7),
    "pipeline syncs": (("pipeline_sync_s",), 0.7),
    "step overhead": (("step_overhead_s",), 0.7),
    "sync passes": (("sync_passes",), 0.4),
}

#: Which runs are fitted together, because they share a GPU or a framework.
GROUPS: Mapping[str, Callable[[pd.DataFrame], "pd.Series[bool]"]] = {
    # Megatron's fused softmax gives way to plain operations where batches of heads are no multiple of four.
    "ampere": lambda d: (
        d.dataset.isin(["vtrain_multi", "aleph", "korthikanti"])
        | ((d.dataset == "vtrain_single") & (d.heads * d.mbs / d.tp % 4 == 0))
    ),
    "blackwell-hopper": lambda d: (
        (((d.gpu == "h100-80") & d.dataset.isin(["dgxc", "megatron_readme"])) | (d.dataset == "simumax"))
        & d.precision_norm.isin(["bf16"])
        & d.family.isin(["gpt3", "llama", "nemotron"])
        & ~d.framework.str.contains("JAX")
        & ~d.model.str.contains(":")  # fine-tuning of a part of the weights
    ),
    "nanotron": lambda d: (d.dataset == "ultrascale") & (d.tp <= 8) & (d.gpus <= 128) & (d.mfu_pct > 3),
    "nvl72": lambda d: (d.dataset == "mbridge") & (d.family == "llama") & d.gpu.isin(["b200", "gb200", "gb300"]),
}


def main(path: Path, groups: Sequence[str]) -> None:
    """Fit each group and print its factors and errors."""
    frame = tables.read_table(path)
    for name in groups or list(GROUPS):
        fit(name, frame[GROUPS[name](frame) & (frame.outcome == "ok")].reset_index(drop=True))


def fit(name: str, frame: pd.DataFrame) -> None:
    """Gauss-Newton with a numerical slope."""
    expected = forecast.forecast(frame)
    measured_s = forecast.measured_step_time_s(frame, expected)
    known = np.isfinite(measured_s)
    frameworks = np.array([stack.split(" on ")[0] for stack in expected.stack])
    gpus = np.array([stack.split(" on ")[1].split(",")[0] for stack in expected.stack])
    datasets = frame.dataset.iloc[expected.row].to_numpy()
    factors = [
        Factor(name=f"{owner}: {what}", columns=columns, deviation=deviation, where=owner)
        for owners, facts in ((sorted(set(gpus[known])), GPU), (sorted(set(frameworks[known])), FRAMEWORK))
        for owner in owners
        for what, (columns, deviation) in facts.items()
    ]
    rows = {f.where: (gpus == f.where) | (frameworks == f.where) for f in factors}

    def errors(logs: Column) -> Column:
        columns = {c: getattr(expected.setting, c) for f in factors for c in f.columns}
        for factor, log in zip(factors, logs, strict=True):
            for column in factor.columns:
                columns[column] = columns[column] * np.exp(log * rows[factor.where])
        step_time_s = predict(expected.predictions.layouts, replace(expected.setting, **columns)).step_time_s
        return np.asarray(np.log(step_time_s[known] / measured_s[known]))

    counts = pd.Series(datasets[known]).map(pd.Series(datasets[known]).value_counts()).to_numpy(float)
    share = np.sqrt(np.minimum(1.0, MOST_RUNS / counts)) / MISFIT**2
    prior = np.diag([1 / f.deviation**2 for f in factors])
    logs = np.zeros(len(factors))
    for _ in range(STEPS):
        now = errors(logs)
        slope = np.column_stack([(errors(logs + 1e-3 * unit) - now) / 1e-3 for unit in np.eye(len(factors))])
        weight = share * np.minimum(1.0, OUTLIER / np.maximum(np.abs(now), 1e-12))
        curvature = slope.T @ (slope * weight[:, None]) + prior
        step = -np.linalg.solve(curvature, slope.T @ (weight * now) + prior @ logs)
        logs = logs + np.clip(step, -0.5, 0.5)
        if np.max(np.abs(step)) < 1e-4:
            break
    print(f"{name}: {known.sum()} runs")
    for factor, log in zip(factors, logs, strict=True):
        print(f"  x{np.exp(log):6.3f}  {factor.name}")
    before, after = np.abs(errors(np.zeros(len(factors)))), np.abs(errors(logs))
    for dataset in sorted(set(datasets[known])):
        own = datasets[known] == dataset
        print(f"  {dataset}: median error {np.median(before[own]):.1%}, refitted {np.median(after[own]):.1%}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
