"""What a request comes to: everything read, checked, enumerated and predicted. Writes nothing."""

import dataclasses
import itertools
import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hptool import __version__, catalogue, files, strategy, timed_runs
from hptool.base_config import BaseConfig
from hptool.candidates import Candidates, Layout, SearchLimits, SearchSpace, enumerate_layouts
from hptool.course import Course, stages
from hptool.errors import InputError, NoFeasibleLayout
from hptool.facts import Cluster, Framework, Submit
from hptool.predict import Predictions, predict, stack
from hptool.presets import Site
from hptool.strategy import STRATEGIES
from hptool.worker.refusals import refuse_impossible

#: What a search measures, and so predicts: `cluster/frameworks/hptool-worker.yaml`.
WORKER_FRAMEWORK = "hptool-worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """What the user asked for, as given."""

    model: str
    cluster: str
    nodes: int | None = None
    strategy: str = "adaptive"
    limit_search_runs: int = 10
    budget_gpu_hours: float | None = None
    max_hours: float | None = None
    max_minutes_per_run: float = 20.0
    max_steps_per_run: int = 50
    stages: tuple[int, ...] | None = None
    verify_nodes: int | None = None
    verify_top: int = 2
    submit: Submit | None = None
    parallel: int | None = None
    space: SearchSpace = field(default_factory=SearchSpace)
    results: Path | None = None
    dry_run: bool = False
    resume: bool = False
    overrides: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """A request with everything resolved: ready to launch, nothing written yet."""

    request: SearchRequest
    cluster: Cluster
    nodes: int
    config: BaseConfig
    framework: Framework
    candidates: Candidates
    predictions: Predictions
    directory: Path

    @property
    def planned_runs(self) -> int:
        """How many layouts will be measured at most."""
        return min(self.request.limit_search_runs, len(self.candidates.layouts))

    @property
    def course(self) -> Course:
        """What is known before the first run, and how far the search goes."""
        request = self.request
        landscape, nodes = timed_runs.landscape(self.config, self.predictions, self.cluster, self.framework)
        verify_nodes = request.verify_nodes or self.nodes
        fewest = timed_runs.fewest_nodes(self.predictions.layouts, self.cluster.gpus_per_node)
        return Course(
            landscape=landscape,
            nodes=nodes,
            strategy=strategy.make(request.strategy, landscape),
            layouts=request.limit_search_runs,
            stages=request.stages or stages(request.max_steps_per_run),
            verify_nodes=request.verify_nodes,
            verify_top=request.verify_top,
            scalable=np.asarray((verify_nodes % fewest == 0) & (verify_nodes >= nodes)),
        )

    def document(self) -> Mapping[str, Any]:
        """What plan.json holds; a search may be resumed by a request with the same `search`."""
        request = self.request
        cluster = dataclasses.asdict(self.cluster)
        for site in ("slurm", "environment", "source"):  # how jobs get there does not change what they measure
            del cluster[site]
        asked = dataclasses.asdict(request)
        for fixed in ("model", "space", "results", "dry_run", "resume", "overrides"):
            del asked[fixed]
        return {
            "search": {
                "model": request.model,
                "config": self.config.with_layout(Layout()).document(),
                "cluster": cluster,
                "framework": self.framework.name,
                "space": dataclasses.asdict(request.space),
                "max_steps_per_run": asked.pop("max_steps_per_run"),
                "stages": asked.pop("stages"),
                "max_minutes_per_run": asked.pop("max_minutes_per_run"),
            },
            "asked": asked,
            "slurm": {name: getattr(self.cluster.slurm, name) for name in ("job_overhead_s", "array_parallelism")},
            "versions": {"hptool": __version__, "revision": revision(), "python": platform.python_version()},
        }


def revision() -> str | None:
    """The commit of a checkout, for those who want to repeat a search; None for an installed package."""
    package = Path(__file__).parent
    if not (package.parent / ".git").exists():
        return None
    try:
        done = subprocess.run(  # noqa: S603 (fixed words)
            ["git", "-C", str(package), "describe", "--always", "--dirty"],  # noqa: S607 (git is wherever PATH has it)
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def make_plan(request: SearchRequest, framework_name: str | None = None, cluster: Cluster | None = None) -> Plan:
    """Read, check, enumerate and predict; writes nothing. Predicts hptool's own worker unless another is named.

    A `cluster` that is given stands in the place of the profile that the request names.
    """
    _check_numbers(request)
    cluster = cluster or files.read_cluster(request.cluster)
    nodes = request.nodes if request.nodes is not None else cluster.nodes
    if not 1 <= nodes <= cluster.nodes:
        raise InputError(f"--nodes: {nodes} given, allowed is 1 to {cluster.nodes} ({request.cluster})")
    if request.verify_nodes is not None and request.verify_nodes > nodes:
        raise InputError(f"--verify-nodes: {request.verify_nodes} given, allowed is 1 to {nodes} (--nodes)")
    if request.parallel is not None and request.parallel > 1 and cluster.scheduler == "local":
        raise InputError(f"--parallel: {request.parallel} given, allowed is 1: runs on this machine share its devices")
    config = read_config(request.model, request.overrides, cluster, nodes)
    space = pinned(request.space, config, request.overrides)
    framework = files.read_framework(framework_name or WORKER_FRAMEWORK)
    return _plan(replace(request, space=space), cluster, config, framework)


def facts_remark(cluster: Cluster) -> str | None:
    """Whose facts of the GPU are used, where they are not hptool's own; nothing but numbers would tell otherwise."""
    measured, own = cluster.gpu.measured, files.GPUS_HERE / f"{cluster.gpu.name}.yaml"
    if measured is None:
        return None
    where = f" in {own}, for as long as that file is there" if own.is_file() else ""
    return f"facts of {cluster.gpu.name}: as measured on {measured.date}{where}"


def with_facts_of(plan: Plan, directory: Path) -> Plan:
    """The plan with the facts of the GPU with which the search in `directory` began, where they have changed since.

    What was predicted and measured there stays comparable. The same plan where there is no such search.
    """
    try:
        begun = read_plan(directory).cluster
    except InputError:
        return plan  # which says more when the search is to begin there
    cluster = facts_of(plan.cluster, begun)
    return plan if cluster is plan.cluster else make_plan(plan.request, plan.framework.name, cluster)


def facts_of(cluster: Cluster, begun: Cluster) -> Cluster:
    """The cluster with the other one's facts of the same GPU; the same cluster where those are the same."""
    if begun.gpu.name != cluster.gpu.name or begun.gpu == cluster.gpu:
        return cluster
    return replace(cluster, gpu=begun.gpu, intra_node=begun.intra_node, inter_node=begun.inter_node)


def read_plan(directory: Path) -> Plan:
    """The plan of the search in a directory, as it was made; InputError where there is none."""
    path = directory / "plan.json"
    if not path.is_file():
        raise InputError(f"{directory}: holds no search (there is no plan.json)")
    document = files.read_yaml(path)  # JSON is YAML
    try:
        search, asked = document["search"], document["asked"]
        facts = {**search["cluster"], "source": "the plan of a search", "slurm": document["slurm"]}
        cluster = files.parse(facts, Cluster, f"{path}: search.cluster")
        config = files.parse(search["config"], BaseConfig, f"{path}: search.config")
        space = files.parse_json(json.dumps(search["space"]), SearchSpace, f"{path}: search.space")
        limits = {name: search[name] for name in ("max_steps_per_run", "max_minutes_per_run", "stages")}
        text = json.dumps({"model": search["model"], **asked, **limits})
        request: SearchRequest = files.parse_json(text, SearchRequest, f"{path}: asked")
        framework = files.read_framework(search["framework"])
    except (KeyError, TypeError) as error:
        raise not_a_plan(path, error) from error
    return _plan(replace(request, space=space, results=directory), cluster, config, framework)


def not_a_plan(path: Path, error: Exception) -> InputError:
    """What is said of a plan that cannot be read."""
    return InputError(f"{path}: is not the plan of a search of this version ({error!r})")


def _plan(request: SearchRequest, cluster: Cluster, config: BaseConfig, framework: Framework) -> Plan:
    """Enumerate and predict."""
    limits = files.read(files.data_directory("base_configs") / "search_space.yaml", SearchLimits)
    _check_values(request.space, config, limits)
    candidates = enumerate_layouts(request.space, config.workload, limits)
    if not len(candidates.layouts):
        raise NoFeasibleLayout(_nothing_feasible(config, candidates))
    predictions = predict(candidates.layouts, stack([(config.workload, cluster, framework)]))
    best = predictions.layouts.row(int(predictions.ranking()[0]))
    # What no layout could mend is better refused here than by every run.
    refuse_impossible(config.with_layout(best), request.model)
    nodes = config.trainer.num_nodes
    default = Path("results") / f"{config.run.name}-{cluster.name}-{nodes}n".replace("/", "-")
    return Plan(
        request=request,
        cluster=cluster,
        nodes=nodes,
        config=config.with_layout(best),
        framework=framework,
        candidates=candidates,
        predictions=predictions,
        directory=(request.results or default).absolute(),
    )


def _check_numbers(request: SearchRequest) -> None:
    problems = []
    limits = ("limit_search_runs", "max_minutes_per_run", "budget_gpu_hours", "max_hours")
    for name in (*limits, "verify_nodes", "verify_top", "parallel"):
        value = getattr(request, name)
        if value is not None and not 0 < value < math.inf:
            problems.append(f"--{name.replace('_', '-')}: {value} given, allowed is more than 0")
    if request.max_steps_per_run < 2:  # noqa: PLR2004 (one to warm up, one to time)
        problems.append(f"--max-steps-per-run: {request.max_steps_per_run} given, allowed is 2 or more")
    steps = request.stages or (2,)
    if steps[0] < 2 or any(b <= a for a, b in itertools.pairwise(steps)):  # noqa: PLR2004 (as above)
        problems.append(f"--stages: {','.join(map(str, steps))} given, allowed are rising numbers from 2 on")
    if request.strategy not in STRATEGIES:
        hint = files.nearest(request.strategy, list(STRATEGIES))
        problems.append(f"--strategy: {request.strategy!r} given; {hint}")
    if request.results is not None and not str(request.results).isprintable():
        problems.append(f"--results: {str(request.results)!r} given, allowed is a path of printable text")
    if problems:
        raise InputError(*problems)


def read_config(model: str, overrides: Sequence[str], cluster: Cluster, nodes: int) -> BaseConfig:
    """The preset or file that `--model` names, for these nodes, with the overrides."""
    preset = None if model.endswith((".yaml", ".yml")) else catalogue.preset(model)
    if preset is not None:
        site = Site(cluster=cluster, num_nodes=nodes)
        document = files.parse_yaml(catalogue.config_text(preset, site, Layout()), model)
    else:
        document = files.read_config_yaml(Path(model))
        # The nodes and devices are the cluster's, whatever the file was written for.
        device = "gpu" if cluster.gpu.device == "cuda" else "cpu"
        for key, value in (("num_nodes", nodes), ("devices", cluster.gpus_per_node), ("accelerator", device)):
            document = files.with_value(document, ["trainer", key], value)
    document = files.apply_overrides(document, overrides, "override")
    config = files.parse(document, BaseConfig, model)
    if preset is not None and not any(override.startswith("trainer.max_steps=") for override in overrides):
        # Another batch or length is no reason to train on other tokens than the recipe's.
        steps = max(1, preset.tokens // (config.model.data.seq_length * config.model.global_batch_size))
        config = replace(config, trainer=replace(config.trainer, max_steps=steps))
    for key, value, allowed in (
        ("num_nodes", config.trainer.num_nodes, nodes),
        ("devices", config.trainer.devices, cluster.gpus_per_node),
    ):
        if value != allowed:
            raise InputError(f"override: trainer.{key}: {value} given, allowed is {allowed} (--nodes and the profile)")
    if config.precision not in cluster.gpu.peak_tflops:
        allowed_words = " or ".join(sorted(cluster.gpu.peak_tflops))
        given = (
            ("model.fp8 (--precision fp8)", True)
            if config.model.fp8
            else ("trainer.precision", config.trainer.precision)
        )
        raise InputError(f"{model}: {given[0]}: {given[1]!r} given, allowed on {cluster.gpu.name} is {allowed_words}")
    return config


#: Overrides of these keys choose a value of a search axis.
_AXIS_KEYS = {
    "model.tensor_model_parallel_size": "tp",
    "model.pipeline_model_parallel_size": "pp",
    "model.virtual_pipeline_model_parallel_size": "vpp",
    "model.context_parallel_size": "cp",
    "model.expert_model_parallel_size": "ep",
    "model.micro_batch_size": "mbs",
}


def pinned(space: SearchSpace, config: BaseConfig, overrides: Sequence[str]) -> SearchSpace:
    """The space with the axes that an override fixes; an axis given both ways is an InputError."""
    keys = {override.partition("=")[0] for override in overrides}
    layout = config.layout
    for key in sorted(keys & set(_AXIS_KEYS)):
        axis = _AXIS_KEYS[key]
        if getattr(space, axis) is not None:
            raise InputError(f"override: {key}: is fixed here and listed by --{axis}; give one of them")
        space = replace(space, **{axis: (getattr(layout, axis),)})
    if any(key.startswith("model.activations_checkpoint") for key in keys):
        if space.recompute is not None:
            raise InputError("override: model.activations_checkpoint_*: is fixed here and listed by --recompute")
        space = replace(space, recompute=((layout.recompute, layout.recompute_num_layers or None),))
    return space


def _check_values(space: SearchSpace, config: BaseConfig, limits: SearchLimits) -> None:
    """A listed value that no legal layout has, whatever the other axes, is a mistake and not a rejection."""
    problems = []
    for axis in ("tp", "pp", "vpp", "cp", "ep", "mbs"):
        for value in getattr(space, axis) or ():
            if value < 1:
                problems.append(f"--{axis}: {value} given, allowed is 1 or more")
                continue
            wide = SearchSpace(**{axis: (value,)})
            found = enumerate_layouts(wide, config.workload, limits)
            if not len(found.layouts):
                worst = max(found.rejections, key=lambda r: r.count)
                problems.append(f"--{axis}: {value} given, but no layout can have it: {worst.reason}")
    if problems:
        raise InputError(*problems)


def _nothing_feasible(config: BaseConfig, candidates: Candidates) -> str:
    lines = [f"{r.count:>6} {r.reason} (e.g. {r.example})" for r in candidates.rejections]
    return "\n".join(
        [
            f"no layout of {config.run.name} can start on {config.gpus} GPUs:",
            *lines,
            "what would help: an axis left at auto, another number of nodes, or another model.global_batch_size than "
            + str(config.model.global_batch_size),
        ]
    )
