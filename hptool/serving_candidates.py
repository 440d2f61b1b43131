"""The points of a serving search: enumerate them, and reject layouts and points that cannot start, with a reason."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hptool.candidates import FP8_MULTIPLE, Rejection, mlp_widths
from hptool.facts import Cluster, ModelShape, Precision
from hptool.serving import Lengths, ServingLayout, ServingPoint

#: What `auto` tries: the batches of the predecessor's searches (its conf/search_config files) and those below them.
_AUTO_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

#: What the worker's own loop computes in: its layers are not those of Transformer Engine.
_LOOP: tuple[Precision, ...] = ("fp32", "bf16", "fp16")

#: What the config of a run can say (`nemo_keys.PRECISION_OVERRIDES`), whoever answers.
_CONFIG: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "fp8")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingSpace:
    """The values to try of each axis; None is `auto`."""

    tp: tuple[int, ...] | None = None
    pp: tuple[int, ...] | None = None
    batch_sizes: tuple[int, ...] | None = None
    precision: tuple[Precision, ...] | None = None
    cuda_graphs: tuple[bool, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingCandidates:
    """The points that pass every static check, in the order of their axes, and why the others do not."""

    points: tuple[ServingPoint, ...]
    rejections: tuple[Rejection, ...]


def enumerate_points(
    space: ServingSpace,
    lengths: Sequence[Lengths],
    shape: ModelShape,
    cluster: Cluster,
    *,
    nodes: int,
    precision: Precision,
    loop: bool = True,
) -> ServingCandidates:
    """Every point of the space that can start on `nodes` nodes, each once, and the rest counted by reason.

    `precision` is the model's own. With `loop` the worker's own loop serves, which cannot do all that engines can.
    Layouts that cannot start count once for each of their points. Lengths come in the order in which they are given.
    """
    gpus = nodes * cluster.gpus_per_node
    sizes = [size for size in range(1, gpus + 1) if gpus % size == 0]
    tp = space.tp or tuple(size for size in sizes if size <= cluster.gpus_per_node)
    pp = space.pp or tuple(size for size in sizes if shape.pipeline_layers % size == 0)
    graphs = space.cuda_graphs or ((False, True) if cluster.gpu.device == "cuda" else (False,))
    found: list[ServingPoint] = []
    counts: dict[str, tuple[int, str]] = {}
    kinds = sorted(set(space.precision or (precision,)))
    for one_tp, one_pp, kind, launches in itertools.product(
        sorted(set(tp)), sorted(set(pp)), kinds, sorted(set(graphs))
    ):
        layout = ServingLayout(tp=one_tp, pp=one_pp, precision=kind, cuda_graphs=launches)
        if space.tp is None and space.pp is None and layout.gpus > gpus:
            continue  # nobody asked for it
        refused = next(_layout_rules(layout, shape, cluster, gpus, loop=loop), None)
        for asked, batch in itertools.product(dict.fromkeys(lengths), sorted(set(space.batch_sizes or _AUTO_BATCHES))):
            point = ServingPoint(layout=layout, lengths=asked, batch=batch)
            reason = refused or next(_point_rules(point, shape), None)
            if reason is None:
                found.append(point)
            else:
                count, example = counts.get(reason, (0, f"{layout.name} {point.name}"))
                counts[reason] = count + 1, example
    rejections = tuple(Rejection(reason=why, count=n, example=example) for why, (n, example) in counts.items())
    return ServingCandidates(points=tuple(found), rejections=rejections)


def _layout_rules(
    layout: ServingLayout, shape: ModelShape, cluster: Cluster, gpus: int, *, loop: bool
) -> Iterator[str]:
    """What stands against a layout, in the order of blame."""
    tp, pp, per_node, eight_bits = layout.tp, layout.pp, cluster.gpus_per_node, layout.precision == "fp8"
    heads, groups, widths = shape.num_attention_heads, shape.num_query_groups, mlp_widths(shape)
    rules = [
        (f"{cluster.gpu.name} does not compute in {layout.precision}", layout.precision not in cluster.gpu.peak_tflops),
        (
            f"hptool's own loop serves in {', '.join(_LOOP)} and no {layout.precision}",
            loop and layout.precision not in _LOOP,
        ),
        (f"hptool's configs know {', '.join(_CONFIG)} and no {layout.precision}", layout.precision not in _CONFIG),
        ("CUDA graphs need a model without experts", loop and layout.cuda_graphs and shape.num_experts),
        (
            f"CUDA graphs need a GPU, and {cluster.gpu.name} is none",
            layout.cuda_graphs and cluster.gpu.device != "cuda",
        ),
        (f"tp does not divide the {heads} attention heads", heads % tp),
        (f"tp does not divide the {groups} query groups", groups % tp),
        *((f"tp does not divide {name} {width}", width % tp) for name, width in widths),
        *(
            (
                f"tp leaves a rank a part of {name} {width} that no multiple of {FP8_MULTIPLE} is (fp8)",
                eight_bits and width // tp % FP8_MULTIPLE,
            )
            for name, width in widths
        ),
        (f"pp does not divide the {shape.pipeline_layers} layers", shape.pipeline_layers % pp),
        (f"tp·pp is more than the {gpus} GPUs", layout.gpus > gpus),
        (f"tp·pp does not fill whole nodes of {per_node} GPUs", layout.gpus > per_node and layout.gpus % per_node),
        (f"tp does not fill whole nodes of {per_node} GPUs", tp > per_node and tp % per_node),
    ]
    yield from (reason for reason, broken in rules if broken)


def _point_rules(point: ServingPoint, shape: ModelShape) -> Iterator[str]:
    """What stands against a point of a layout that could start."""
    lengths, most = point.lengths, shape.max_position_embeddings
    longest = lengths.input_len + lengths.output_len - 1  # the last token is not read again
    if shape.encoder_num_layers:  # a prompt is the encoder's, and an answer the decoder's
        longest = max(lengths.input_len, lengths.output_len)
    if shape.learned_positions and longest > most:
        yield f"prompt and answer have more tokens than the model's {most} positions"
