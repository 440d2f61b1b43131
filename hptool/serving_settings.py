"""What a serving search is asked on the command line, or in the predecessor's YAML keys (`inference_settings`)."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hptool import catalogue, files
from hptool.errors import InputError
from hptool.serving import Lengths, Targets
from hptool.serving_candidates import ServingSpace
from hptool.serving_plan import ServingRequest

#: Of its `time_limit`: H:M:S or D-H:M:S, as sbatch reads it.
_LIMIT = re.compile(r"(?:([0-9]+)-)?([0-9]+):([0-9]{1,2}):([0-9]{1,2})")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """`inference_settings.run`."""

    model_type: str = "gpt3"
    model_train_name: str | None = None
    gpus_per_node: int | None = None
    data_type: Literal["fp32", "fp16", "bf16"] = "fp16"
    time_limit: str | int = "0:30:00"
    results_dir: str | None = None
    tensor_parallel_sizes: tuple[int, ...] | None = None
    pipeline_parallel_sizes: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkSettings:
    """`inference_settings.benchmark`."""

    input_len: int = 60
    output_len: int = 20
    batch_sizes: tuple[int, ...] | None = None
    beam_width: int = 1
    topk: int = 4
    topp: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceSettings:
    """The whole of it."""

    run: RunSettings = field(default_factory=RunSettings)
    benchmark: BenchmarkSettings = field(default_factory=BenchmarkSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What such a file asks for, by the options of `hptool search-inference`; and what is said about it."""

    options: dict[str, Any]
    remarks: tuple[str, ...]


def read_settings(path: Path, *, names_model: bool = True) -> Asked:
    """The options that a search config of the predecessor stands for; it may hold its training search as well.

    Its model is not looked at where it is not to name one.
    """
    document = files.read_yaml(path)
    if not isinstance(document, dict) or "inference_settings" not in document:
        raise InputError(f"{path}: inference_settings: required key is missing")
    found: InferenceSettings = files.parse(
        document["inference_settings"], InferenceSettings, f"{path}: inference_settings"
    )
    run, benchmark = found.run, found.benchmark
    if benchmark.beam_width != 1:
        raise InputError(
            f"{path}: inference_settings.benchmark.beam_width: {benchmark.beam_width} given, allowed is 1: beams are "
            "batches that share a prompt, and hptool times batches"
        )
    options: dict[str, Any] = {
        "workload": f"{benchmark.input_len}:{benchmark.output_len}",
        "tp": run.tensor_parallel_sizes,
        "pp": run.pipeline_parallel_sizes,
        "batch_sizes": benchmark.batch_sizes,
        "precision": (run.data_type,),
        "max_minutes_per_run": _minutes(run.time_limit, path),
        "results": Path(run.results_dir) if run.results_dir and "${" not in run.results_dir else None,
        "model": _model(run, path) if names_model else None,
    }
    remarks = ["topk and topp are read and change nothing: what is drawn from the last token takes no time to speak of"]
    if run.gpus_per_node is not None:
        remarks.append("gpus_per_node changes nothing: the cluster's profile says how many GPUs a node has")
    return Asked(options={name: value for name, value in options.items() if value is not None}, remarks=tuple(remarks))


def _model(run: RunSettings, path: Path) -> str | None:
    """The preset of a name such as gpt3_5b."""
    if run.model_train_name is None or run.model_train_name.startswith("$"):
        return None
    name = run.model_train_name.replace("_", "/", 1)
    try:
        catalogue.preset(name)
    except InputError as error:
        key = "inference_settings.run.model_train_name"
        raise InputError(f"{path}: {key}: {run.model_train_name!r} given; {error}") from error
    return name


def _minutes(limit: str | int, path: Path) -> float:
    found = _LIMIT.fullmatch(str(limit))
    if found is None:
        hint = "; YAML reads 1:30:00 as a number of seconds, so quote it" if isinstance(limit, int) else ""
        key = "inference_settings.run.time_limit"
        raise InputError(f"{path}: {key}: {limit!r} given, allowed is H:MM:SS or D-HH:MM:SS{hint}")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return (days * 24 + hours) * 60 + minutes + seconds / 60


#: What is asked where neither the command line nor a file says it.
_DEFAULTS: Mapping[str, Any] = {"workload": "60:20", "max_minutes_per_run": 30.0}

_AXES = ("tp", "pp", "batch_sizes", "precision", "cuda_graphs")
_TARGETS = ("max_latency_ms", "max_ttft_ms", "max_tpot_ms", "percentile")


def request_of(options: Mapping[str, Any]) -> tuple[ServingRequest, tuple[str, ...]]:
    """The request that these options of `hptool search-inference` stand for, and remarks on it.

    What an option leaves open may be said by the file of `settings`.
    """
    given = {name: value for name, value in options.items() if value is not None}
    settings = given.pop("settings", None)
    asked = Asked(options={}, remarks=())
    if settings is not None:
        asked = read_settings(settings, names_model="model" not in given)
    words = {**_DEFAULTS, **asked.options, **given}
    if "model" not in words:
        raise InputError("--model: required, a preset such as gpt3/5b or the path of a NeMo-Megatron YAML config")
    graphs = words.pop("cuda_graphs", None)
    axes: dict[str, Any] = {name: words.pop(name) for name in _AXES if name in words}
    if graphs is not None:
        axes["cuda_graphs"] = tuple(word == "on" for word in graphs)
    targets: dict[str, Any] = {name: words.pop(name) for name in _TARGETS if name in words}
    targets["percentile"] = int(targets.get("percentile", 50))
    command = words.pop("command", None)
    request = ServingRequest(
        workload=_workload(words.pop("workload")),
        space=ServingSpace(**axes),
        targets=Targets(**targets),
        command=_words(command) if command is not None else (),
        from_file=tuple(axis for axis in _AXES if axis in asked.options and axis not in given),
        **words,
    )
    return request, asked.remarks


def _workload(text: str) -> tuple[Lengths, ...]:
    problems, found = [], []
    for word in text.split(","):
        try:
            found.append(Lengths.parse(word))
        except ValueError as error:
            problems.append(f"--workload: {error}")
    if problems:
        raise InputError(*problems)
    return tuple(dict.fromkeys(found))


def _words(command: str) -> tuple[str, ...]:
    try:
        found = tuple(shlex.split(command))
    except ValueError as error:
        raise InputError(f"--command: {command!r} given, allowed is a command as typed in a shell ({error})") from error
    if not found:
        raise InputError("--command: nothing given, allowed is a command as typed in a shell")
    return found
