"""How fast hptool's worker trains on one GPU: against plain PyTorch, and as a share of what the GPU could.

    python -m tests.benchmarks.gpu_speed --output results/gpu-speed

GPT-2 124M against `gpu_plain_gpt2`, each with its best micro batch; and the model FLOPS utilisation of GPT-3 1.3B and
2.7B and Llama 3.2 1B and 3B. Their layouts are found as a search finds them: the adaptive strategy proposes, short
runs are made, and the best of them is timed longer. Every run is one of the worker's, by its supervisor.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hptool.measurement import Failure, FailureKind, Measurement, Outcome
from hptool.plan import Plan
from hptool.strategy import Ending, Stop, Trial
from tests.gpu import runs
from tests.gpu.command import Given, command
from tests.gpu.device import one_gpu
from tests.gpu.models import GPT2, TINY_GPT2, TINY_UTILISED, UTILISED, Model, plan_of, rows_of
from tests.gpu.record import Record

#: Steps of a run that looks for the best layout, and of the one that times it: a warm-up and at least eight.
_SHORT_STEPS, _LONG_STEPS = 4, 12

#: Layouts that are tried of a model: on published landscapes the best one is among as many (docs/search.md).
_MOST_TRIES = 3

#: What a run takes besides its steps: a fork, the device's context, weights, and a layer's kernels, which are compiled
#: anew for each micro batch.
_START_S = 25.0

#: Of the seconds that a step is predicted to take: predictions are off, and the first step is slower.
_CAUTION = 1.5

#: What plain PyTorch takes for a micro batch, which it compiles for.
_PLAIN_S = 45.0


def measure(given: Given, record: Record) -> None:
    """Times what has not been timed yet."""
    runs.load(given.device.accelerator)
    gpt2, models = (TINY_GPT2, TINY_UTILISED) if given.tiny else (GPT2, UTILISED)
    cluster = one_gpu(given.device)
    _Bench(given=given, record=record, model=gpt2, plan=plan_of(gpt2, cluster)).compare()
    for model in models:
        _Bench(given=given, record=record, model=model, plan=plan_of(model, cluster)).utilise()


def finding_of(outcome: Outcome, peak_tflops: float) -> dict[str, Any]:
    """What a run comes to, for the record."""
    if not isinstance(outcome, Measurement):
        return {"outcome": outcome.kind.value, "message": outcome.message[:300]}
    return {
        "outcome": "ok",
        "step_time_s": outcome.step_time_s,
        "step_time_low_s": outcome.step_time_low_s,
        "step_time_high_s": outcome.step_time_high_s,
        "timed_steps": len(outcome.step_times_s),
        "tokens_per_s": outcome.tokens_per_s_per_gpu,
        "model_tflops_per_gpu": outcome.model_tflops_per_gpu,
        "mfu": outcome.model_tflops_per_gpu / peak_tflops,
        "losses": [outcome.losses[0], outcome.losses[-1]],
        "max_allocated_gib": outcome.peak_memory_gib,
        "max_reserved_gib": outcome.max_reserved_gib,
        "device_used_gib": outcome.device_used_gib,
        "kernels": dict(outcome.kernels),
        "startup_s": outcome.startup_s,
    }


def is_final(finding: Mapping[str, Any] | None) -> bool:
    """It was timed, or has no room: a later call would find the same."""
    return finding is not None and finding.get("outcome") in ("ok", "oom")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """The runs of one model."""

    given: Given
    record: Record
    model: Model
    plan: Plan

    def compare(self) -> None:
        """Times the worker and plain PyTorch with each micro batch."""
        steps = 3 if self.given.tiny else _LONG_STEPS
        # The largest micro batch is the fastest unless it has no room; it is known first.
        for row, layout in reversed(list(enumerate(self.plan.candidates.layouts.rows()))):
            key = f"{self.model.name} worker mbs{layout.mbs}"
            if not is_final(self.record.findings.get(key)):
                found = self._timed(key, row, steps)
                if found is not None:
                    self.record.find(key, found)
                    self._complain_of_crash(key)
        keys = {mbs: f"{self.model.name} plain mbs{mbs}" for mbs in self.model.mbs}
        left = [mbs for mbs, key in keys.items() if not is_final(self.record.findings.get(key))]
        self._time_plain(sorted(left, reverse=True), steps)

    def _time_plain(self, left: list[int], steps: int) -> None:
        if not left:
            return
        if not self.given.tiny and not self.given.clock.has(_PLAIN_S):
            self.record.leave(f"{self.model.name} plain mbs {', '.join(map(str, left))}")
            return
        shape, limit_s = self.plan.config.shape, min(self.given.clock.left_s, _PLAIN_S * len(left))
        work = {
            "layers": shape.num_layers,
            "hidden": shape.hidden_size,
            "heads": shape.num_attention_heads,
            "ffn": shape.ffn_hidden_size,
            "seq": shape.seq_length,
            "vocab": shape.vocab_size,
            "gbs": self.model.gbs,
            "steps": steps,
            "seed": self.plan.config.model.seed,
            "mbs": left,
            "device": self.given.device.kind,
            "compiled": not self.given.tiny,
        }
        lines, log = self.given.output / "plain.jsonl", self.given.output / "plain.log"
        lines.unlink(missing_ok=True)
        arguments = [sys.executable, "-m", "tests.benchmarks.gpu_plain_gpt2", str(lines), json.dumps(work)]
        # What the worker has set for Megatron's sake is nothing that plain PyTorch would have.
        environment = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_MAX_CONNECTIONS"}
        with log.open("wb") as output:
            try:
                subprocess.run(
                    arguments, stdout=output, stderr=subprocess.STDOUT, timeout=limit_s, check=False, env=environment
                )
            except subprocess.TimeoutExpired:
                output.write(f"ended after {limit_s:.0f} s\n".encode())
        for line in lines.read_text(encoding="utf-8").splitlines() if lines.is_file() else []:
            found = json.loads(line)
            key = f"{self.model.name} plain mbs{found['mbs']}"
            self.record.find(key, found)
            self._complain_of_crash(key)
        for mbs in left:
            key = f"{self.model.name} plain mbs{mbs}"
            if key not in self.record.findings:
                self.record.leave(f"{key} ({runs.last_lines(log, 1)})")

    def utilise(self) -> None:
        """Tries layouts as the strategy proposes them, then times the best one longer; keeps each run as it ends."""
        key = f"utilisation {self.model.name}"
        found: dict[str, Any] = self.record.findings.get(key) or {"tries": {}, "final": None}
        if is_final(found["final"]):
            return
        strategy, rows = self.plan.course.strategy, rows_of(self.plan)
        short, long, most = (2, 3, 1) if self.given.tiny else (_SHORT_STEPS, _LONG_STEPS, _MOST_TRIES)
        while len(found["tries"]) < most:
            proposal = strategy.next([_trial(rows[name], tried) for name, tried in found["tries"].items()])
            if isinstance(proposal, Stop):
                break
            name = self.plan.candidates.layouts.row(proposal.row).name
            tried = self._timed(f"{key} {name}", proposal.row, short)
            if tried is None:
                return
            found["tries"][name] = tried
            self.record.find(key, found)
        best = best_layout(found)
        if best is None:
            tries = "; ".join(f"{name}: {x['outcome']} {x.get('message', '')}" for name, x in found["tries"].items())
            self.record.complain(f"{key}: no layout could be timed: {tries}"[:500])
            self.record.find(key, {"tries": {}, "final": None})  # another call tries again
            return
        final = self._timed(f"{key} {best}", rows[best], long)
        if final is not None:
            found["final"] = final | {"layout": best}
            self.record.find(key, found)
            if final["outcome"] != "ok":
                self.record.complain(f"{key} {best}: {final['outcome']}: {final.get('message', '')}")

    def _timed(self, what: str, row: int, steps: int) -> dict[str, Any] | None:
        """What became of a run; None where there is no time for it, which is noted."""
        expected_s = _START_S + _CAUTION * steps * float(self.plan.predictions.step_time_s[row])
        if not self.given.tiny and not self.given.clock.has(expected_s):
            self.record.leave(what)
            return None
        outcome = runs.run(
            self.plan,
            self.plan.candidates.layouts.row(row),
            steps=steps,
            directory=self.given.output / "runs" / self.model.name,
            limit_s=max(self.given.clock.left_s, 1.0),
        )
        if isinstance(outcome, Failure) and outcome.kind is FailureKind.TIMEOUT and not self.given.clock.has(1.0):
            self.record.leave(what)
            return None
        print(f"{what}: {outcome.step_time_s if isinstance(outcome, Measurement) else outcome.kind}", flush=True)
        return finding_of(outcome, self.plan.cluster.gpu.peak_tflops[self.plan.config.precision])

    def _complain_of_crash(self, key: str) -> None:
        found = self.record.findings[key]
        if not is_final(found):
            self.record.complain(f"{key}: {found['outcome']}: {found.get('message', '')}")


def ratio(findings: Mapping[str, Any], name: str) -> tuple[float, str, str] | None:
    """Worker over plain in tokens a second, each at its best, and the two; None where one of them is not known."""
    best = {}
    for side in ("worker", "plain"):
        rates = {
            key: finding["tokens_per_s"]
            for key, finding in findings.items()
            if key.startswith(f"{name} {side} ") and finding.get("outcome") == "ok"
        }
        if not rates:
            return None
        best[side] = max(rates, key=lambda key: rates[key])
    worker, plain = best["worker"], best["plain"]
    return findings[worker]["tokens_per_s"] / findings[plain]["tokens_per_s"], worker, plain


def best_layout(found: Mapping[str, Any]) -> str | None:
    """The name of the fastest layout of a model's findings; None where none was timed."""
    final = found.get("final") or {}
    if final.get("outcome") == "ok":
        return str(final["layout"])
    timed = {name: tried["step_time_s"] for name, tried in found.get("tries", {}).items() if tried["outcome"] == "ok"}
    return min(timed, key=lambda name: timed[name]) if timed else None


def _trial(row: int, tried: Mapping[str, Any]) -> Trial:
    if tried["outcome"] == "ok":
        return Trial(row=row, ending=Ending.MEASURED, step_time_s=tried["step_time_s"])
    return Trial(row=row, ending=Ending.OOM if tried["outcome"] == "oom" else Ending.FAILED)


def printed(findings: Mapping[str, Any], name: str) -> list[str]:
    """The findings as lines."""
    lines = []
    compared = ratio(findings, name)
    if compared is not None:
        value, worker, plain = compared
        rates = [findings[key]["tokens_per_s"] for key in (worker, plain)]
        lines.append(f"{worker}: {rates[0]:,.0f} tokens/s; {plain}: {rates[1]:,.0f}; ratio {value:.3f}")
    for key, found in findings.items():
        final = found.get("final") if key.startswith("utilisation ") else None
        if final and final["outcome"] == "ok":
            lines.append(
                f"{key}: {final['mfu']:.1%} of peak with {final['layout']}, {final['step_time_s']:.3f} s a step"
            )
    return lines


def _measure_and_print(given: Given, record: Record) -> None:
    """Time what has not been timed yet, and print ratio and utilisation."""
    try:
        measure(given, record)
    finally:
        for line in printed(record.findings, (TINY_GPT2 if given.tiny else GPT2).name):
            print(line)


main = command(_measure_and_print)

if __name__ == "__main__":
    main()
