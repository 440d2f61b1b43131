"""What a serving run has done so far, on disk: its points, those that failed, and the one that it is at.

serving.json       `ServingOrders`, beside the run's config
measurement.json   `ServingMeasurement`, after each point anew; what was measured stays, whatever ends the run
.point             the point that is under way
.failed.jsonl      `PointFailure`: points whose ranks died; others take their place and go on with what is left
.served            the run is over

Knows neither torch nor megatron.
"""

import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hptool import files
from hptool.base_config import BaseConfig
from hptool.measurement import FailureKind, PointFailure, ServedPoint, ServingMeasurement
from hptool.secrets import redact
from hptool.serving_orders import SERVING, PointOrder, ServingOrders
from hptool.worker import outcome

_POINT = ".point"
_FAILED = ".failed.jsonl"
_SERVED = ".served"


def serving_config(config: BaseConfig) -> BaseConfig:
    """The same model as it is served: without what only pays with many tokens at once or a backward pass.

    Its layers are Megatron-core's local ones with torch's attention, whose cache is `cached_attention`'s.
    """
    stack: dict[str, Any] = {
        "apply_rope_fusion": False,
        "activations_checkpoint_granularity": None,
        "activations_checkpoint_method": None,
        "activations_checkpoint_num_layers": None,
    }
    model = replace(
        config.model,
        transformer_engine=False,
        use_flash_attention=True,
        sequence_parallel=False,
        enable_cuda_graph=False,
        gradient_accumulation_fusion=False,
    )
    if model.encoder is not None and model.decoder is not None:
        parts: dict[str, Any] = {"encoder": replace(model.encoder, **stack), "decoder": replace(model.decoder, **stack)}
        return replace(config, model=replace(model, **parts))
    return replace(config, model=replace(model, **stack))


def read_orders(config_path: Path) -> ServingOrders | None:
    """What a run with this config is to serve; None where it is to train. InputError where it cannot be read."""
    path = config_path.parent / SERVING
    return files.read(path, ServingOrders) if path.exists() else None


def clear(directory: Path) -> None:
    """Forgets an earlier attempt in this directory."""
    outcome.clear(directory)
    for name in (_POINT, _FAILED, _SERVED):
        (directory / name).unlink(missing_ok=True)


def read(directory: Path) -> ServingMeasurement | None:
    """What was measured so far."""
    path = directory / outcome.MEASUREMENT
    if not path.exists():
        return None
    found: ServingMeasurement = files.parse_json(files.read_text(path), ServingMeasurement, str(path))
    return found


def begin_point(directory: Path, point: PointOrder) -> None:
    """From now on this point is under way."""
    files.write_text(directory / _POINT, point.name)


def end_point(directory: Path) -> None:
    """No point is under way."""
    (directory / _POINT).unlink(missing_ok=True)


def point_under_way(directory: Path, orders: ServingOrders) -> PointOrder | None:
    """The point that the ranks are, or were, at."""
    with contextlib.suppress(OSError):
        name = (directory / _POINT).read_text(encoding="utf-8")
        return next((point for point in orders.points if point.name == name), None)
    return None


def end(directory: Path) -> None:
    """The run is over: whatever goes wrong afterwards does not matter."""
    files.write_text(directory / _SERVED, "")


def is_over(directory: Path) -> bool:
    """All points were measured, have failed or need not be tried."""
    return (directory / _SERVED).exists()


def note_failure(directory: Path, orders: ServingOrders, failure: PointFailure) -> list[PointOrder]:
    """Keeps the failure of a point whose ranks are gone, also in the measurement; the points that are still open."""
    end_point(directory)
    files.append_line(directory / _FAILED, files.json_text(failure, indent=None))
    measured = read(directory)
    if measured is not None:
        measured = replace(measured, failures=(*measured.failures, failure))
        measured = replace(measured, skipped=skipped(orders, measured.points, measured.failures))
        outcome.write_measurement(directory, measured)
    return open_points(orders, measured.points if measured else (), failures_of(directory))


def failures_of(directory: Path) -> tuple[PointFailure, ...]:
    """The points whose ranks died."""
    path = directory / _FAILED
    if not path.exists():
        return ()
    lines = files.read_text(path).splitlines()
    return tuple(files.parse_json(line, PointFailure, str(path)) for line in lines)


def open_points(
    orders: ServingOrders, points: Sequence[ServedPoint], failures: Sequence[PointFailure]
) -> list[PointOrder]:
    """Those that are still to be measured, in their order."""
    done = {*_names(points), *_names(failures), *skipped(orders, points, failures)}
    return [point for point in orders.points if point.name not in done]


def skipped(orders: ServingOrders, points: Sequence[ServedPoint], failures: Sequence[PointFailure]) -> tuple[str, ...]:
    """Points that need not be tried: a smaller batch of the same lengths was out of memory, or beyond the targets."""
    by_name = {point.name: point for point in orders.points}
    ended = [by_name[failure.name] for failure in failures if failure.kind is FailureKind.OOM]
    if orders.stops_early:
        ended += [by_name[point.name] for point in points if not point.keeps(orders.targets)]
    beyond = {larger for point in ended for larger in orders.larger(point)}
    tried = {*_names(points), *_names(failures)}
    return tuple(point.name for point in orders.points if point in beyond and point.name not in tried)


def tell_progress(directory: Path, done: int, of: int, tokens_per_s: float) -> None:
    """For those who watch, as `rank.tell_progress`: points that are done, and the rate of the last one."""
    aside = directory / f".{outcome.PROGRESS}"
    with contextlib.suppress(OSError):
        aside.write_text(json.dumps({"step": done, "of": of, "tokens_per_s": tokens_per_s}), encoding="utf-8")
        aside.replace(directory / outcome.PROGRESS)


def failure_of(point: PointOrder, kind: FailureKind, message: str) -> PointFailure:
    """As it is kept: without secrets, of a length that a table can show."""
    return PointFailure(name=point.name, kind=kind, message=redact(message)[: outcome.MESSAGE_LIMIT])


def summary(measured: ServingMeasurement) -> str:
    """A line a point, for the terminal."""
    lines = [
        f"{point.name}: {point.latency_ms.p50:.4g} ms, first token {point.ttft_ms.p50:.4g} ms, "
        f"{point.tokens_per_s_per_gpu:,.1f} tokens/s a GPU, {point.peak_memory_gib:.2f} GiB {measured.memory_kind}"
        for point in measured.points
    ]
    lines += [f"{failure.name}: {failure.kind}: {failure.message}" for failure in measured.failures]
    if measured.skipped:
        lines.append(f"not tried: {', '.join(measured.skipped)}")
    return "\n".join([f"{measured.engine}{', CUDA graphs' if measured.cuda_graphs else ''}", *lines])


def _names(points: Iterable[ServedPoint | PointFailure]) -> list[str]:
    return [point.name for point in points]
