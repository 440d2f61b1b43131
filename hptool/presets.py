"""Presets: what tells one size of a family from the next, the shape of any other size, and the config that they make.

Pure: the files under `base_configs/` are read by `catalogue.py`.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal

import jinja2

from hptool.candidates import Layout
from hptool.errors import InputError
from hptool.facts import VOCAB_DIVISOR, Cluster, ModelShape
from hptool.nemo_keys import Activation


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One model with its recipe: a file under `base_configs/`, laid over the defaults of its family.

    `tokens` is what the recipe trains on, `lr` its peak, `num_nodes` of eight GPUs and `time_limit_days` what the
    recipe was meant for. A `toy` is for demonstrations and never recommended. Where `init_method_std` is empty it is
    0.64 / sqrt(hidden_size); where `warmup_steps` is empty it is 1 % of the steps within 1,000 to 2,000.
    """

    family: str
    name: str
    source: str
    aliases: tuple[str, ...] = ()
    template: Literal["gpt", "bert", "t5"] = "gpt"
    toy: bool = False

    # shape
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int | None = None
    kv_channels: int | None = None
    encoder_num_layers: int | None = None
    seq_length: int
    seq_length_dec: int | None = None
    vocab_size: int
    normalization: Literal["layernorm", "rmsnorm"] = "layernorm"
    layernorm_zero_centered_gamma: bool = False
    layernorm_epsilon: float = 1e-5
    activation: Activation = "gelu"
    bias: bool = True
    qkv_bias: bool = False
    tied_embeddings: bool = True
    scale_embeddings: bool = False
    position_embedding_type: Literal["learned_absolute", "rope", "alibi"] = "learned_absolute"
    rotary_percentage: float = 1.0
    rotary_base: float = 10_000.0
    rotary_interleaved: bool = False
    bert_binary_head: bool | None = None
    num_moe_experts: int | None = None
    moe_router_topk: int = 2
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    moe_aux_loss_coeff: float = 0.01

    # recipe
    global_batch_size: int
    tokens: int
    num_nodes: int = 1
    time_limit_days: float
    lr: float
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["CosineAnnealing", "WarmupAnnealing"] = "CosineAnnealing"
    warmup_steps: int | None = None
    warmup_ratio: float | None = None
    constant_fraction: float = 0.0
    init_method_std: float | None = None
    dropout: float = 0.0
    masked_lm_prob: float = 0.15
    splits_string: str = "99990,8,2"
    tokenizer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> ModelShape:
        """The model's dimensions."""
        encoder_layers = self.encoder_num_layers or 0
        experts = self.num_moe_experts or 0
        return ModelShape(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups or self.num_attention_heads,
            kv_channels=self.kv_channels or self.hidden_size // self.num_attention_heads,
            seq_length=(self.seq_length_dec or self.seq_length) if encoder_layers else self.seq_length,
            max_position_embeddings=self.seq_length,
            vocab_size=self.vocab_size,
            tied_embeddings=self.tied_embeddings,
            has_bias=self.bias,
            has_qkv_bias=self.bias or self.qkv_bias,
            gated_mlp=self.activation.endswith("glu"),
            rms_norm=self.normalization == "rmsnorm",
            causal=self.template != "bert",
            learned_positions=self.position_embedding_type == "learned_absolute",
            num_experts=experts,
            experts_per_token=self.moe_router_topk if experts else 0,
            expert_ffn_hidden_size=(self.moe_ffn_hidden_size or self.ffn_hidden_size) if experts else 0,
            shared_ffn_hidden_size=self.moe_shared_expert_intermediate_size or 0,
            encoder_num_layers=encoder_layers,
            encoder_seq_length=self.seq_length if encoder_layers else 0,
            has_mlm_head=self.template == "bert",
            has_binary_head=bool(self.bert_binary_head),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeRow:
    """Usual dimensions and learning rate of models below `up_to_b` billion parameters, and of the last row up to them.

    The MLP is `ffn_ratio` times as wide as the model where no width is given; `head_dim` is what a head has.
    """

    up_to_b: float
    hidden_size: int
    head_dim: int
    lr: float
    heads_per_group: int = 1
    ffn_hidden_size: int | None = None
    kv_channels: int | None = None
    num_attention_heads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRow:
    """Sequences in a global batch of models of up to `up_to_b` billion parameters, at the family's sequence length."""

    up_to_b: float
    sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the presets of a family share, and the rules for its other sizes."""

    source: str
    defaults: Mapping[str, Any]
    sizes: tuple[SizeRow, ...] = ()
    batches: tuple[BatchRow, ...] = ()
    ffn_ratio: float = 4.0


# ---------------------------------------------------------------- custom sizes

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)([mMbBtT])")
_UNITS = {"m": 10**6, "b": 10**9, "t": 10**12}

#: How far the parameters of a custom size may be from what was asked.
SIZE_TOLERANCE = 0.02


def parameters_of_size(text: str) -> float | None:
    """Parameters that a size such as `6.7b` or `126m` stands for; None where the text is no size."""
    match = _SIZE.fullmatch(text)
    return float(match[1]) * _UNITS[match[2].lower()] if match else None


def custom_preset(name: str, family: Family, parameters: float, defaults: Preset) -> Preset:
    """A model of this many parameters within `SIZE_TOLERANCE`; `defaults` is any preset of its family.

    The rule: hidden size, head size and learning rate are the family's usual ones for the size, and layers make up
    the parameters. Where no number of layers comes within 2 %, or only an odd one, which few pipelines divide, the
    hidden size moves, as little as possible. A model too small for four layers of its family's smallest width is
    about 32 times as wide as it has layers. InputError where not even the smallest model is small enough.
    """
    largest = family.sizes[-1]
    if parameters > largest.up_to_b * 1e9:
        raise InputError(f"--model: {name!r} given, allowed are presets and sizes up to {largest.up_to_b:g}b")
    row = next((r for r in family.sizes if parameters < r.up_to_b * 1e9), largest)
    usual = _one_layer(defaults, row, family.ffn_ratio, row.hidden_size)
    small = _with_layers(usual, _FEWEST_LAYERS).shape.num_parameters > parameters
    best: tuple[float, Preset, int] | None = None
    for hidden in _small_widths(row) if small else _widths(row):
        model = _one_layer(defaults, row, family.ffn_ratio, hidden)
        one, two = (_with_layers(model, layers).shape.num_parameters for layers in (1, 2))
        for layers in _layer_counts(one, two, parameters):
            off = abs(one + (layers - 1) * (two - one) - parameters) / max(1.0, parameters)
            if small:
                habit = abs(math.log(hidden / layers / _SMALL_ASPECT))
            else:
                habit = 4 * abs(math.log(hidden / row.hidden_size))
            # What each costs: a width beside the habit, layers and heads that split badly, a size beside the wanted.
            stacks = 2 if model.encoder_num_layers else 1
            cost = habit + _uneven(stacks * layers) + _uneven(model.num_attention_heads) + 2 * off
            if off <= SIZE_TOLERANCE and (best is None or cost < best[0]):
                best = cost, model, layers
    if best is None:
        smallest = _one_layer(defaults, row, family.ffn_ratio, min(_small_widths(row))).shape.num_parameters
        raise InputError(
            f"--model: {name!r} given, allowed are sizes from {smallest / 1e6:.2g}m on "
            f"(with a vocabulary of {defaults.vocab_size}; model.override_vocab_size makes it smaller)"
        )
    size_b = parameters / 1e9
    sequences = next((r.sequences for r in family.batches if size_b <= r.up_to_b), family.batches[-1].sequences)
    _, shape, layers = best
    return replace(
        _with_layers(shape, layers),
        name=f"{defaults.family}_{name}",
        source=f"Shape of this size by hptool's rule, after {family.source}",
        aliases=(),
        toy=False,
        lr=row.lr,
        global_batch_size=sequences,
        init_method_std=None if defaults.template != "t5" else defaults.init_method_std,
    )


#: Below this many layers of its smallest width a family has no habits to follow.
_FEWEST_LAYERS = 4

#: Hidden size over layers of a small model: that of GPT-3's smallest ones (Brown et al. 2020, table 2.1: 64 and 43),
#: and less, because a small model's embeddings leave little for its layers.
_SMALL_ASPECT = 32


def _widths(row: SizeRow) -> Sequence[int]:
    """Hidden sizes around the row's, in whole heads and, of many heads, in numbers that tensor parallelism divides."""
    heads = row.hidden_size // row.head_dim
    step = row.head_dim * (4 if heads >= 16 else 1)  # noqa: PLR2004 (as said)
    return [h for h in range(step, 2 * row.hidden_size + 1, step) if 2 * h >= row.hidden_size]


def _small_widths(row: SizeRow) -> Sequence[int]:
    """Hidden sizes up to the row's."""
    return [h for h in (*range(8, 128, 8), *range(128, row.hidden_size + 1, 64)) if h <= row.hidden_size]


def _one_layer(defaults: Preset, row: SizeRow, ffn_ratio: float, hidden: int) -> Preset:
    """A model of one layer of this width, with the row's heads and MLP in proportion."""
    heads = max(1, round(hidden / row.head_dim))
    if row.num_attention_heads:
        heads = max(1, round(row.num_attention_heads * hidden / row.hidden_size))
    while row.kv_channels is None and hidden % heads:
        heads -= 1
    groups = max(1, heads // row.heads_per_group)
    while heads % groups:
        groups -= 1
    ffn = ffn_ratio * hidden if row.ffn_hidden_size is None else row.ffn_hidden_size * hidden / row.hidden_size
    multiple = 128 if ffn >= 512 else 8  # noqa: PLR2004 (tiles of the GPUs' matrix units; 8 for toys)
    return _with_layers(
        replace(
            defaults,
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=groups if groups != heads else None,
            kv_channels=min(row.kv_channels, hidden) if row.kv_channels else None,
            ffn_hidden_size=max(multiple, round(ffn / multiple) * multiple),
        ),
        1,
    )


def _layer_counts(one: int, two: int, parameters: float) -> Sequence[int]:
    """The numbers of layers within the tolerance of the wanted size, and those on both sides of it.

    `one` and `two` are the parameters of models of so many layers.
    """

    def exact(size: float) -> float:
        return max(1.0, 1 + (size - one) / (two - one))

    low, nearest, high = (exact(parameters * (1 + off)) for off in (-SIZE_TOLERANCE, 0, SIZE_TOLERANCE))
    return sorted({math.floor(nearest), math.ceil(nearest), *range(math.ceil(low), math.floor(high) + 1)})


def _with_layers(preset: Preset, layers: int) -> Preset:
    encoder_layers = layers if preset.encoder_num_layers else None
    return replace(preset, num_layers=layers, encoder_num_layers=encoder_layers)


def _uneven(number: int) -> float:
    """What a number of layers or heads costs that few parallel sizes divide."""
    return next(cost for divisor, cost in ((8, 0.0), (4, 0.02), (2, 0.05), (1, 0.6)) if number % divisor == 0)


# ---------------------------------------------------------------- batch and steps


def fitting_batch(gbs: int, gpus: int) -> int:
    """`gbs`, or the nearest number to it that these GPUs divide but for powers of two.

    Replicas share the batch evenly, and layouts mostly take powers of two of the GPUs: what is odd about their number
    must divide the batch. The step is the largest that changes the batch by no more than an eighth.
    """
    odd = gpus
    while odd % 2 == 0:
        odd //= 2
    if gbs % odd == 0:
        return gbs
    step = odd
    while 8 * step <= gbs:
        step *= 2
    return max(1, round(gbs / step)) * step


#: Warm-up where a recipe names none: 1 % of the steps within these bounds, and never more than a tenth.
_WARMUP_FRACTION = 0.01
_WARMUP_STEPS = (1000, 2000)
_LONGEST_WARMUP = 0.1

#: How long before the job's end the trainer stops, to leave by itself.
_MARGIN = timedelta(minutes=30)


def warmup_steps(preset: Preset, max_steps: int) -> int:
    """Steps until the full rate."""
    if preset.warmup_steps is not None:
        return preset.warmup_steps
    fewest, most = _WARMUP_STEPS
    return min(max(fewest, min(most, round(_WARMUP_FRACTION * max_steps))), int(_LONGEST_WARMUP * max_steps))


# ---------------------------------------------------------------- the config


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a config is to run: what its job asks of the cluster, and the days that its training should take there."""

    cluster: Cluster
    num_nodes: int
    time_limit_days: float | None = None
    expected_days: float | None = None


@functools.cache
def _environment(templates: tuple[tuple[str, str], ...]) -> jinja2.Environment:
    """Compiles each template once, for any number of configs: that takes longer than all else about one."""
    return jinja2.Environment(  # noqa: S701 (YAML of our own numbers, no HTML)
        loader=jinja2.DictLoader(dict(templates)),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(templates: Mapping[str, str], preset: Preset, site: Site, layout: Layout) -> str:
    """The preset's config for these nodes, cut as `layout`, as commented YAML; `templates` by their file names."""
    days = preset.time_limit_days if site.time_limit_days is None else site.time_limit_days
    limit = timedelta(days=days)
    gpus = site.num_nodes * site.cluster.gpus_per_node
    gbs = fitting_batch(preset.global_batch_size, gpus)
    max_steps = max(1, preset.tokens // (preset.seq_length * gbs))
    return (
        _environment(tuple(sorted(templates.items())))
        .get_template(f"{preset.template}.yaml.j2")
        .render(
            preset=preset,
            cluster=site.cluster,
            num_nodes=site.num_nodes,
            expected_days=site.expected_days,
            limit_days=days,
            gbs=gbs,
            layout=layout,
            max_steps=max_steps,
            time_limit=_slurm_time(limit),
            max_time=lightning_time(max(limit - _MARGIN, limit / 2)),
            init_method_std=preset.init_method_std or round(0.64 / preset.hidden_size**0.5, 6),
            warmup_steps=warmup_steps(preset, max_steps),
            constant_steps=int(preset.constant_fraction * max_steps),
            min_lr=round(0.1 * preset.lr, 8),
            vocab_divisor=VOCAB_DIVISOR,
        )
    )


def _clock(span: timedelta) -> tuple[int, int, int, int]:
    minutes, seconds = divmod(int(span.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return days, hours, minutes, seconds


def _slurm_time(span: timedelta) -> str:
    """As sbatch reads it: D-HH:MM:SS."""
    return "{}-{:02}:{:02}:{:02}".format(*_clock(span))


def lightning_time(span: timedelta) -> str:
    """As Lightning's trainer reads it: DD:HH:MM:SS."""
    return "{:02}:{:02}:{:02}:{:02}".format(*_clock(span))
