"""The rates that models are expected to train at: clusters of so many GPUs, and the best layout of a model on them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from hptool import catalogue, files
from hptool.errors import InputError, NoFeasibleLayout
from hptool.facts import Cluster, ModelShape
from hptool.plan import Plan, SearchRequest, make_plan, read_config
from hptool.predict.flops import model_flops_per_sequence
from hptool.recommend import Size, fewest

#: More GPUs than any cluster has; up to so many are looked at where no profile says how many there are.
MOST_GPUS = 2**17

#: The GPU that is meant where none is named: that of the recipes.
USUAL_GPU = "a100-80gb"

#: A layout is taken to fit if it is more likely to than not.
EVEN = 0.5


# ---------------------------------------------------------------- where


def cluster_of(gpu: str, profile: str | None) -> Cluster:
    """The profile, or else nodes in which that GPU usually comes, as many as one likes."""
    if profile is not None:
        return files.read_cluster(profile)
    spec = files.read_gpu(gpu, "--gpu")
    return Cluster(
        name=spec.name,
        source=spec.source,
        gpu=spec,
        nodes=MOST_GPUS // spec.gpus_per_node,
        gpus_per_node=spec.gpus_per_node,
        intra_node=spec.intra_node,
        inter_node=spec.inter_node,
        scheduler="slurm",
    )


def with_gpus(cluster: Cluster, gpus: int, profile: str | None) -> Cluster:
    """So many GPUs of it: whole nodes, or a part of one node where no profile says what a node is.

    InputError names the nearest numbers.
    """
    node, most = cluster.gpus_per_node, cluster.nodes * cluster.gpus_per_node
    if profile is None and 1 <= gpus < node:
        return replace(cluster, nodes=1, gpus_per_node=gpus)
    if gpus < 1 or gpus > most:
        raise InputError(f"--gpus: {gpus} given, allowed is 1 to {most}{f' ({profile})' if profile else ''}")
    if gpus % node:
        below = gpus // node * node
        near = " or ".join(str(count) for count in (below, below + node) if 0 < count <= most)
        raise InputError(f"--gpus: {gpus} given, allowed are whole nodes of {node} GPUs: {near}")
    return replace(cluster, nodes=gpus // node)


# ---------------------------------------------------------------- what


def recommended(family: str) -> Mapping[str, float]:
    """The presets of a family that can be recommended, toys left out: the tokens of each recipe by its name."""
    found = {name: float(preset.tokens) for name, preset in catalogue.presets(family).items() if not preset.toy}
    if not found:
        raise InputError(f"--family: {family} given, but all of its presets are toys")
    return found


def tokens_of(model: str) -> float | None:
    """The tokens of a preset's recipe; None for the path of a config, which has none."""
    return None if model.endswith((".yaml", ".yml")) else float(catalogue.preset(model).tokens)


# ---------------------------------------------------------------- how fast


def size_on(cluster: Cluster, model: str, tokens: float, tflops: float | None = None) -> Size:
    """The model on all nodes of the cluster, at the rate of its best layout by `hptool predict`, or at `tflops`."""
    request = SearchRequest(model=model, cluster=cluster.name, nodes=cluster.nodes)
    try:
        plan = make_plan(request, cluster=cluster)
    except NoFeasibleLayout:
        shape = read_config(request.model, request.overrides, cluster, cluster.nodes).shape
        gpus = cluster.nodes * cluster.gpus_per_node
        return _size(model, shape, tokens, refusal=f"no layout can start on {gpus} GPUs")
    return _best(plan, model, tokens, tflops)


def least_memory(plan: Plan) -> str:
    """The layout that needs the least memory, and how much; for a model of which none fits."""
    memory = plan.predictions.memory_gib
    least = int(memory.argmin())
    name = plan.predictions.layouts.row(least).name
    return f"the least, {name}, needs {memory[least]:.0f} of {plan.cluster.gpu.memory_gib:g} GiB"


def _best(plan: Plan, model: str, tokens: float, tflops: float | None) -> Size:
    shape, p = plan.config.shape, plan.predictions
    best = p.ranking()[0]
    if p.p_fit[best] < EVEN:
        return _size(model, shape, tokens, refusal=f"no layout fits into memory: {least_memory(plan)}")
    return replace(
        _size(model, shape, tokens),
        layout=p.layouts.row(int(best)).name,
        tflops_per_gpu=tflops or float(p.model_tflops_per_gpu[best]),
        error=0.0 if tflops else float(p.step_time_error[best]),
    )


def _size(model: str, shape: ModelShape, tokens: float, refusal: str = "") -> Size:
    return Size(
        name=model,
        parameters=float(shape.num_parameters),
        active_parameters=float(_active_parameters(shape)),
        # As predictions count tokens: those of the encoder where there is one.
        flop_per_token=model_flops_per_sequence(shape) / (shape.encoder_seq_length or shape.seq_length),
        tokens=tokens,
        tflops_per_gpu=None,
        refusal=refusal,
        encoder=bool(shape.encoder_seq_length),
    )


def _active_parameters(shape: ModelShape) -> int:
    """Without the experts that a token does not see."""
    if not shape.num_experts:
        return shape.num_parameters
    unseen = shape.num_experts - shape.experts_per_token
    fewer = replace(shape, num_experts=shape.experts_per_token)
    return fewer.num_parameters + shape.num_expert_layers * unseen * shape.hidden_size  # routers see every token


# ---------------------------------------------------------------- how many


def fewest_nodes(
    cluster: Cluster, model: str, tokens: float, tflops: float | None, wishes: Sequence[Callable[[Size, int], bool]]
) -> Sequence[tuple[Cluster, Size] | None]:
    """For each wish the fewest nodes on which it holds of the size and its GPUs; None where it never does.

    A wish holds nowhere where the one before it does not.
    """

    @functools.cache
    def on(nodes: int) -> tuple[Cluster, Size]:
        part = replace(cluster, nodes=nodes)
        return part, size_on(part, model, tokens, tflops)

    def holds(wish: Callable[[Size, int], bool], nodes: int) -> bool:
        return wish(on(nodes)[1], nodes * cluster.gpus_per_node)

    answers: list[tuple[Cluster, Size] | None] = []
    start: int | None = 1
    for wish in wishes:
        start = None if start is None else fewest(functools.partial(holds, wish), start, cluster.nodes)
        answers.append(None if start is None else on(start))
    return answers
