"""`hptool base-config`: a config that runs, with the best predicted layout for its nodes, and what it takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hptool import catalogue, files, rates
from hptool.errors import InputError, NoFeasibleLayout
from hptool.facts import Cluster
from hptool.plan import Plan, SearchRequest, make_plan
from hptool.presets import Preset, Site, parameters_of_size
from hptool.units import SECONDS_PER_DAY

Say = Callable[[str], None]

#: GPUs in a node of those that recipes name (DGX).
_RECIPE_NODE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigRequest:
    """What the user asked for, as given: `model` is a preset, a family beside a `size`, or the path of a config."""

    model: str
    size: str | None = None
    cluster: str | None = None
    gpu: str | None = None
    nodes: int | None = None
    days: float | None = None
    seq_length: int | None = None
    output: Path | None = None
    overwrite: bool = False
    overrides: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeConfig:
    """A config as commented YAML, and what was found on the way."""

    text: str
    model: str
    num_parameters: int
    nodes: int
    gpus: int
    layout: str
    memory_gib: float
    p_fit: float
    training_days: float
    time_limit_days: float | None

    @property
    def in_time(self) -> bool:
        """The training ends within its time limit, as far as is predicted; always where there is none."""
        return self.time_limit_days is None or self.training_days <= self.time_limit_days

    def document(self) -> Mapping[str, Any]:
        """Plain values for JSON."""
        names = [
            "model",
            "num_parameters",
            "nodes",
            "gpus",
            "layout",
            "memory_gib",
            "p_fit",
            "training_days",
            "time_limit_days",
            "in_time",
        ]
        return {name: getattr(self, name) for name in names} | {"config": files.parse_yaml(self.text, self.model)}


def make_config(request: ConfigRequest, say: Say) -> MadeConfig:
    """The config, told of and written to `output` where there is one.

    InputError for what stands for nothing, NoFeasibleLayout where no layout fits into the GPUs' memory.
    """
    if request.days is not None and not request.days > 0:
        raise InputError(f"--days: {request.days:g} given, allowed is more than 0")
    if request.output is not None and request.output.exists() and not request.overwrite:
        raise InputError(f"--output: {request.output} is there; give another, or --overwrite")
    model = _model(request)
    preset = None if model.endswith((".yaml", ".yml")) else catalogue.preset(model)
    cluster = _cluster(request, preset)
    wanted = SearchRequest(model=model, cluster=cluster.name, nodes=cluster.nodes, overrides=request.overrides)
    plan = make_plan(wanted, cluster=cluster)
    made = _made(request, preset, plan)
    _tell(made, cluster, say)
    if (remark := catalogue.remark(model)) is not None:
        say(remark)
    if request.output is not None:
        files.write_text(request.output, made.text)
    return made


def _model(request: ConfigRequest) -> str:
    """As `catalogue.preset` takes it, or the path of a config."""
    model = request.model
    if model.endswith((".yaml", ".yml")):
        if request.size or request.seq_length:
            raise InputError(f"--model: {model} given, but --size and --seq-length go with a family's presets")
        return model
    if request.size is not None:
        if parameters_of_size(request.size) is None:
            raise InputError(f"--size: {request.size!r} given, allowed is a size such as 6.7b or 350m")
        family, _, size = model.partition("/")
        if family not in catalogue.families():
            known = sorted(catalogue.families())
            raise InputError(f"--model: unknown family {family!r}; {files.nearest(family, known)}")
        if size:
            raise InputError(f"--size: {request.size} given, but --model {model} has a size; give --model {family}")
        model = f"{family}/{request.size}"
    if request.seq_length is not None and request.seq_length < 1:
        raise InputError(f"--seq-length: {request.seq_length} given, allowed is 1 or more")
    return model if request.seq_length is None else f"{model}_seq{request.seq_length}"


def _cluster(request: ConfigRequest, preset: Preset | None) -> Cluster:
    """The nodes asked for, or those that the recipe names."""
    if request.cluster is not None and request.gpu is not None:
        raise InputError(f"--gpu: {request.gpu} given, but --cluster {request.cluster} has its GPU; give one of them")
    cluster = rates.cluster_of(request.gpu or rates.USUAL_GPU, request.cluster)
    if request.nodes is not None:
        nodes = request.nodes
    elif preset is not None:
        nodes = min(cluster.nodes, max(1, preset.num_nodes * _RECIPE_NODE // cluster.gpus_per_node))
    else:
        nodes = 1 if request.cluster is None else cluster.nodes
    if not 1 <= nodes <= cluster.nodes:
        raise InputError(f"--nodes: {nodes} given, allowed is 1 to {cluster.nodes} ({cluster.name})")
    return replace(cluster, nodes=nodes)


def _made(request: ConfigRequest, preset: Preset | None, plan: Plan) -> MadeConfig:
    config, p = plan.config, plan.predictions
    best = int(p.ranking()[0])
    if p.p_fit[best] < rates.EVEN:
        raise NoFeasibleLayout(
            f"no layout of {config.run.name} fits into {config.gpus} {plan.cluster.gpu.name}: "
            f"{rates.least_memory(plan)}\n"
            "what would help: more nodes, GPUs with more memory, or a smaller model"
        )
    training_days = float(p.step_time_s[best]) * config.trainer.max_steps / SECONDS_PER_DAY
    if preset is not None and not request.overrides:
        site = Site(
            cluster=plan.cluster, num_nodes=plan.nodes, time_limit_days=request.days, expected_days=training_days
        )
        text = catalogue.config_text(preset, site, config.layout)
    else:  # comments do not survive a change of keys
        text = files.yaml_text(config.document())
    limit = request.days if preset is None else request.days or preset.time_limit_days
    return MadeConfig(
        text=text,
        model=config.run.name,
        num_parameters=config.shape.num_parameters,
        nodes=plan.nodes,
        gpus=config.gpus,
        layout=config.layout.name,
        memory_gib=float(p.memory_gib[best]),
        p_fit=float(p.p_fit[best]),
        training_days=training_days,
        time_limit_days=limit,
    )


def _tell(made: MadeConfig, cluster: Cluster, say: Say) -> None:
    """What does not fit comes first."""
    where = f"{made.nodes} node{'s' * (made.nodes > 1)} of {cluster.gpus_per_node} {cluster.gpu.name}"
    if not made.in_time:
        assert made.time_limit_days is not None  # noqa: S101 (`in_time` looked at it)
        say(
            f"over its time limit: {made.training_days:.1f} days expected of {made.model} on {where}, "
            f"{made.time_limit_days:g} given; about {made.training_days / made.time_limit_days:.1f} times the GPUs or "
            "the days would do"
        )
    say(
        f"{made.model}, {made.num_parameters / 1e9:.3g}B parameters, on {where}: {made.layout}, "
        f"{made.memory_gib:.1f} of {cluster.gpu.memory_gib:g} GiB, {made.training_days:.3g} days of training"
    )
