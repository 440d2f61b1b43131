"""What a request for a serving search comes to: everything read, checked, enumerated and predicted. Writes nothing."""

import dataclasses
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hptool import __version__, files, serving_strategy
from hptool.base_config import BaseConfig
from hptool.candidates import IntColumn, Layout
from hptool.errors import InputError, NoFeasibleLayout
from hptool.facts import Cluster, Engine, Submit
from hptool.nemo_keys import PRECISION_OVERRIDES
from hptool.plan import facts_of, not_a_plan, read_config, revision
from hptool.predict.inference import ServingPredictions, predict_serving
from hptool.presets import lightning_time
from hptool.serving import Lengths, Objective, ServingLayout, ServingPoint, ServingPoints, Targets
from hptool.serving_candidates import ServingCandidates, ServingSpace, enumerate_points
from hptool.serving_orders import FEWEST_REPEATS, ServingOrders
from hptool.serving_strategy import ServingLandscape, ServingView, landscape_of
from hptool.worker.orders import CHECKPOINTS, CONFIG, newest_checkpoint
from hptool.worker.refusals import refuse_unservable

#: Whose constants predict the worker's own loop, and a command of the user's: `cluster/engines/`.
_ENGINES = {"megatron": "hptool-worker", "command": "other"}

#: What `plan.json` calls a search of this kind.
KIND = "serving"

#: Every checkpoint of Megatron-core's has this file.
_CHECKPOINT_MARK = "metadata.json"

#: Where no point fits with more probability than this, no run is worth its start.
_HOPELESS = 0.02

#: Of a shape, what no weight has the size of.
_NOT_OF_WEIGHTS = ("seq_length", "encoder_seq_length")

#: What any model can answer.
_SHORTEST = (Lengths(input_len=1, output_len=1),)

#: Of a run's minutes no point is begun in the last part, so that it ends in order and keeps what it measured.
_LAST_PART = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingRequest:
    """What the user asked for, as given."""

    model: str
    cluster: str
    workload: tuple[Lengths, ...] = (Lengths(input_len=60, output_len=20),)
    nodes: int | None = None
    space: ServingSpace = field(default_factory=ServingSpace)
    targets: Targets = field(default_factory=Targets)
    objective: Objective = "throughput-per-gpu"
    strategy: str = "guided"
    limit_search_runs: int = 50
    budget_gpu_hours: float | None = None
    max_hours: float | None = None
    max_minutes_per_run: float = 30.0
    repeats: int = FEWEST_REPEATS
    engine: Literal["megatron", "command"] = "megatron"
    command: tuple[str, ...] = ()
    checkpoint: str | None = None
    submit: Submit | None = None
    parallel: int | None = None
    results: Path | None = None
    dry_run: bool = False
    resume: bool = False
    overrides: Sequence[str] = ()
    #: Axes that a file lists and not the command line: values that no layout can have are left out, and no mistake.
    from_file: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServingPlan:
    """A request with everything resolved: ready to launch, nothing written yet."""

    request: ServingRequest
    cluster: Cluster
    nodes: int
    config: BaseConfig
    engine: Engine
    candidates: ServingCandidates
    landscape: ServingLandscape
    predictions: ServingPredictions
    directory: Path

    @property
    def points(self) -> ServingPoints:
        """All points that can start, by the rows of the landscape."""
        return self.landscape.points

    @property
    def gpus(self) -> int:
        """All GPUs that a replica may have."""
        return self.nodes * self.cluster.gpus_per_node

    def layout(self, row: int) -> ServingLayout:
        """The layout of a row."""
        return self.points.row(row).layout

    def config_of(self, layout: ServingLayout) -> BaseConfig:
        """The config of a run of the layout: one replica on the fewest nodes, answering instead of training."""
        nodes = self.nodes_of(layout)
        words = [
            *PRECISION_OVERRIDES[layout.precision],
            *(f"trainer.{key}={value}" for key, value in (("num_nodes", nodes), ("devices", layout.gpus // nodes))),
            *("model.micro_batch_size=1", "model.global_batch_size=1", "model.sequence_parallel=false"),
            "model.rampup_batch_size=null",
        ]
        document = files.apply_overrides(self.config.document(), words, "serving")
        config: BaseConfig = files.parse(document, BaseConfig, self.request.model)
        limit = timedelta(minutes=self.request.max_minutes_per_run)
        trainer = replace(config.trainer, max_time=lightning_time(limit))
        return replace(config, trainer=trainer).with_layout(Layout(tp=layout.tp, pp=layout.pp))

    def nodes_of(self, layout: ServingLayout) -> int:
        """Nodes that hold a replica."""
        return math.ceil(layout.gpus / self.cluster.gpus_per_node)

    def orders_of(self, points: Sequence[ServingPoint], *, stops_early: bool) -> ServingOrders:
        """What a run of these points of one layout is asked to do."""
        request = self.request
        return ServingOrders.of(
            points,
            engine=request.engine,
            command=request.command,
            repeats=request.repeats,
            checkpoint=request.checkpoint,
            stops_early=stops_early,
            targets=request.targets,
            max_seconds=(1 - _LAST_PART) * 60 * request.max_minutes_per_run,
        )

    def document(self) -> Mapping[str, Any]:
        """What plan.json holds; a search may be resumed by a request with the same `search`."""
        request = self.request
        cluster = dataclasses.asdict(self.cluster)
        for site in ("slurm", "environment", "source"):  # how jobs get there does not change what they measure
            del cluster[site]
        asked = dataclasses.asdict(request)
        for fixed in ("model", "cluster", "results", "dry_run", "resume", "overrides", "from_file"):
            del asked[fixed]
        same = ("workload", "space", "repeats", "engine", "command", "checkpoint", "max_minutes_per_run")
        return {
            "search": {
                "kind": KIND,
                "model": request.model,
                "config": self.config.document(),
                "cluster": cluster,
                "facts": self.engine.name,
                **{name: asked.pop(name) for name in same},
            },
            "asked": {"cluster": request.cluster, **asked},
            "slurm": {name: getattr(self.cluster.slurm, name) for name in ("job_overhead_s", "array_parallelism")},
            "versions": {"hptool": __version__, "revision": revision(), "python": platform.python_version()},
        }


def make_serving_plan(request: ServingRequest, cluster: Cluster | None = None) -> ServingPlan:
    """Read, check, enumerate and predict; writes nothing. A `cluster` that is given stands for the named profile."""
    _check_numbers(request)
    cluster = cluster or files.read_cluster(request.cluster)
    nodes = request.nodes if request.nodes is not None else cluster.nodes
    if not 1 <= nodes <= cluster.nodes:
        raise InputError(f"--nodes: {nodes} given, allowed is 1 to {cluster.nodes} ({request.cluster})")
    if request.parallel is not None and request.parallel > 1 and cluster.scheduler == "local":
        raise InputError(f"--parallel: {request.parallel} given, allowed is 1: runs on this machine share its devices")
    config = read_config(request.model, request.overrides, cluster, nodes)
    request = replace(request, checkpoint=_checkpoint(request.checkpoint, config))
    _check_values(request, config, cluster, nodes)
    return _plan(request, cluster, nodes, config, files.read_engine(_ENGINES[request.engine]))


def with_facts_of(plan: ServingPlan, directory: Path) -> ServingPlan:
    """The plan with the facts of the GPU with which the search in `directory` began, as `plan.with_facts_of`."""
    try:
        begun = read_serving_plan(directory).cluster
    except InputError:
        return plan  # which says more when the search is to begin there
    cluster = facts_of(plan.cluster, begun)
    return plan if cluster is plan.cluster else make_serving_plan(plan.request, cluster)


def read_serving_plan(directory: Path) -> ServingPlan:
    """The plan of the serving search in a directory, as it was made; InputError where there is none."""
    path = directory / "plan.json"
    document = files.read_yaml(path)  # JSON is YAML
    try:
        search, asked = dict(document["search"]), document["asked"]
        facts = {**search["cluster"], "source": "the plan of a search", "slurm": document["slurm"]}
        cluster = files.parse(facts, Cluster, f"{path}: search.cluster")
        config = files.parse(search["config"], BaseConfig, f"{path}: search.config")
        engine = files.read_engine(search["facts"])
        own = {key: value for key, value in search.items() if key not in ("kind", "config", "cluster", "facts")}
        request: ServingRequest = files.parse_json(json.dumps({**own, **asked}), ServingRequest, f"{path}: asked")
    except (KeyError, TypeError) as error:
        raise not_a_plan(path, error) from error
    nodes = request.nodes if request.nodes is not None else cluster.nodes
    return _plan(replace(request, results=directory), cluster, nodes, config, engine)


def _plan(request: ServingRequest, cluster: Cluster, nodes: int, config: BaseConfig, engine: Engine) -> ServingPlan:
    """Enumerate and predict."""
    shape = config.shape
    candidates = enumerate_points(
        request.space,
        request.workload,
        shape,
        cluster,
        nodes=nodes,
        precision=config.precision,
        loop=request.engine == "megatron",
    )
    if not candidates.points:
        raise NoFeasibleLayout(_nothing_feasible(config, candidates, nodes * cluster.gpus_per_node))
    points = ServingPoints.of(candidates.points)
    predictions = predict_serving(points, shape, cluster, engine)
    landscape = landscape_of(points, shape, cluster, engine, request.objective, request.targets)
    default = Path("results") / f"{config.run.name}-serving-{cluster.name}-{nodes}n".replace("/", "-")
    plan = ServingPlan(
        request=request,
        cluster=cluster,
        nodes=nodes,
        config=config,
        engine=engine,
        candidates=candidates,
        landscape=landscape,
        predictions=predictions,
        directory=(request.results or default).absolute(),
    )
    # What no layout could mend is better refused here than by every run.
    first = candidates.points[0]
    try:
        orders = plan.orders_of([first], stops_early=False)
    except ValueError as error:
        raise InputError(*(f"--{line}" for line in str(error).splitlines())) from error
    refuse_unservable(plan.config_of(first.layout), orders, request.model)
    if request.strategy != "grid" and float(predictions.p_fit.max()) < _HOPELESS:
        least = int(predictions.memory_gib.argmin())
        raise NoFeasibleLayout(
            f"no point of {config.run.name} is expected to fit into memory: the least, "
            f"{points.row(least).layout.name}, needs {predictions.memory_gib[least]:.4g} of {cluster.gpu.memory_gib:g} "
            "GiB. What would help: more GPUs for a replica, or a smaller model; --strategy grid tries all the same"
        )
    return plan


def by_promise(plan: ServingPlan, view: ServingView | None = None) -> IntColumn:
    """Rows by what is expected of them, the best first; those that may not fit come later.

    Expected before the first run, or in a view that has learnt from some.
    """
    p, targets = plan.predictions if view is None else view, plan.request.targets
    over = np.ones(len(plan.points))
    for limit, column in (
        (targets.max_latency_ms, p.latency_ms),
        (targets.max_ttft_ms, p.ttft_ms),
        (targets.max_tpot_ms, p.tpot_ms),
    ):
        if limit is not None:
            over = np.maximum(over, column / limit)
    rates = serving_strategy.tokens_per_s_per_gpu(plan.points, p.latency_ms)
    wanted = p.latency_ms if plan.request.objective == "latency" else -rates
    fits = p.p_fit >= 0.5  # noqa: PLR2004 (more likely than not)
    return np.lexsort([wanted, over, ~fits])


def _check_numbers(request: ServingRequest) -> None:
    problems = []
    limits = ("limit_search_runs", "max_minutes_per_run", "budget_gpu_hours", "max_hours", "parallel")
    given = [(name, getattr(request, name)) for name in limits]
    given += [(name, getattr(request.targets, name)) for name in ("max_latency_ms", "max_ttft_ms", "max_tpot_ms")]
    problems += [
        f"--{name.replace('_', '-')}: {value} given, allowed is more than 0"
        for name, value in given
        if value is not None and not 0 < value < math.inf
    ]
    for name in ("tp", "pp", "batch_sizes"):
        problems += [
            f"--{name.replace('_', '-')}: {value} given, allowed is 1 or more"
            for value in getattr(request.space, name) or ()
            if value < 1
        ]
    if request.repeats < FEWEST_REPEATS:
        problems.append(f"--repeats: {request.repeats} given, allowed is {FEWEST_REPEATS} or more")
    if request.strategy not in serving_strategy.STRATEGIES:
        hint = files.nearest(request.strategy, list(serving_strategy.STRATEGIES))
        problems.append(f"--strategy: {request.strategy!r} given; {hint}")
    if bool(request.command) != (request.engine == "command"):
        problems.append("--command: is given with --engine command, and only then")
    if request.results is not None and not str(request.results).isprintable():
        problems.append(f"--results: {str(request.results)!r} given, allowed is a path of printable text")
    if not request.workload:
        problems.append("--workload: nothing given, allowed is INPUT:OUTPUT in tokens, such as 60:20,200:200")
    if problems:
        raise InputError(*problems)


def _check_values(request: ServingRequest, config: BaseConfig, cluster: Cluster, nodes: int) -> None:
    """A listed value that no legal layout has, whatever the other axes, is a mistake and not a rejection."""
    space, loop = request.space, request.engine == "megatron"

    def why_not(lengths: Sequence[Lengths] = _SHORTEST, **axes: Any) -> str | None:
        given = replace(ServingSpace(precision=space.precision, cuda_graphs=space.cuda_graphs), **axes)
        known = enumerate_points(
            given, lengths, config.shape, cluster, nodes=nodes, precision=config.precision, loop=loop
        )
        return None if known.points else max(known.rejections, key=lambda r: r.count).reason

    def problems(axes: Sequence[str]) -> list[str]:
        found = []
        for axis in axes:
            for value in () if axis in request.from_file else getattr(space, axis) or ():
                if (reason := why_not(**{axis: (value,)})) is not None:
                    word = {True: "on", False: "off"}.get(value, value) if axis == "cuda_graphs" else value
                    option = f"--{axis.replace('_', '-')}"
                    found.append(f"{option}: {word} given, but no layout can have it: {reason}")
        return found

    found = problems(("precision", "cuda_graphs"))
    if not found and why_not() is None:  # where nothing can start no value is to blame
        found = problems(("tp", "pp", "batch_sizes"))
        for lengths in request.workload:
            if (reason := why_not((lengths,))) is not None:
                found.append(f"--workload: {lengths.name} given, but no layout can answer it: {reason}")
    if found:
        raise InputError(*found)


def _checkpoint(given: str | None, config: BaseConfig) -> str | None:
    """Where it lies, from wherever the runs are started; InputError where nothing of the kind does.

    Nor may it be of another shape. One that has no config beside it is compared by the worker, tensor by tensor.
    """
    if given is None:
        return None
    path = Path(given).absolute()
    if newest_checkpoint(path) is None and not (path / _CHECKPOINT_MARK).is_file():
        raise InputError(
            f"--checkpoint: {given} given, allowed is a directory of hptool train or one of its checkpoints/step-N"
        )
    training = path if (path / CHECKPOINTS).is_dir() else path.parent.parent
    if (training / CONFIG).is_file():
        trained: BaseConfig = files.read(training / CONFIG, BaseConfig)
        differing = [
            f"{f.name} ({there} there, {asked} asked for)"
            for f in dataclasses.fields(config.shape)
            if f.name not in _NOT_OF_WEIGHTS
            and (there := getattr(trained.shape, f.name)) != (asked := getattr(config.shape, f.name))
        ]
        if differing:
            raise InputError(f"--checkpoint: {given} is of another model: it differs in {', '.join(differing)}")
    return str(path)


def _nothing_feasible(config: BaseConfig, candidates: ServingCandidates, gpus: int) -> str:
    lines = [f"{r.count:>6} {r.reason} (e.g. {r.example})" for r in candidates.rejections]
    return "\n".join(
        [
            f"no layout of {config.run.name} can serve on {gpus} GPUs:",
            *lines,
            "what would help: an axis left at auto, more nodes, or shorter requests",
        ]
    )
