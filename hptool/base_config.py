"""NeMo-Megatron's training config as types, and what it means in hptool's words.

The fields below are the keys of NeMo-Megatron's GPT YAML, under the same names, so that a config that works
there reads here and the other way round. A key that the worker cannot honour is typed with the only values
that it can: a wish is granted or refused by name, never ignored. Keys that only matter to NeMo itself
(experiment manager, tokenizer, profiler) are kept and written back as they came.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal

import jinja2

from hptool.candidates import Layout, Recompute, Workload
from hptool.facts import VOCAB_DIVISOR, Cluster, ModelShape, Precision

#: NeMo's (Lightning's) spellings of the precisions that the worker knows.
PRECISIONS: Mapping[str | int, Precision] = {
    "bf16": "bf16",
    "bf16-mixed": "bf16",
    32: "fp32",
    "32": "fp32",
    "32-true": "fp32",
}


#: Entries of the GPT-2 BPE vocabulary, the tokenizer of NeMo's GPT-3 recipes (Radford et al. 2019).
GPT2_VOCAB_SIZE = 50_257


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSection:
    """`run`: what NeMo's launcher needs to know of the job."""

    name: str
    results_dir: str | None = None
    time_limit: str | None = None
    dependency: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSection:
    """`trainer`: nodes, devices, precision and length of the training."""

    num_nodes: int
    devices: int
    accelerator: Literal["gpu", "cpu"] = "gpu"
    precision: Literal["bf16", "bf16-mixed", 32, "32", "32-true"] = "bf16"
    logger: bool = False
    enable_checkpointing: Literal[False] = False
    use_distributed_sampler: bool = False
    max_epochs: int | None = None
    max_steps: int = 100
    max_time: str | None = None
    log_every_n_steps: int = 10
    val_check_interval: int | float = 2000
    limit_val_batches: int | float = 0
    limit_test_batches: int | float = 0
    accumulate_grad_batches: Literal[1] = 1
    gradient_clip_val: float = 1.0
    benchmark: bool = False
    enable_model_summary: bool = False
    num_sanity_val_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("num_nodes", "devices", "max_steps"):
            if getattr(self, name) < 1:
                msg = f"{name}: {getattr(self, name)} given, allowed is 1 or more"
                raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedSection:
    """`model.optim.sched`: the learning-rate schedule."""

    name: Literal["CosineAnnealing"] = "CosineAnnealing"
    warmup_steps: int = 0
    constant_steps: int = 0
    min_lr: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimSection:
    """`model.optim`: Adam, sharded over the data-parallel ranks, and its overlaps."""

    name: Literal["mcore_distributed_optim", "distributed_fused_adam"] = "mcore_distributed_optim"
    lr: float
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    bucket_cap_mb: int = 125
    overlap_grad_sync: bool = False
    overlap_param_sync: bool = False
    contiguous_grad_buffer: bool = True
    contiguous_param_buffer: bool = True
    sched: SchedSection = field(default_factory=SchedSection)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSection:
    """`model.data`: a tokenised `.bin/.idx` set, or synthetic tokens where `data_prefix` is empty."""

    seq_length: int
    data_prefix: str | tuple[str | float, ...] | None = None
    data_impl: Literal["mmap"] = "mmap"
    splits_string: str = "99990,8,2"
    skip_warmup: bool = True
    num_workers: int = 2
    dataloader_type: Literal["single"] = "single"
    reset_position_ids: Literal[False] = False
    reset_attention_mask: Literal[False] = False
    eod_mask_loss: Literal[False] = False
    index_mapping_dir: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSection:
    """`model`: shape, layout, batch, recomputation, and the kernels to use."""

    # batch and layout
    micro_batch_size: int
    global_batch_size: int
    rampup_batch_size: None = None
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: Literal[1] = 1
    sequence_parallel: bool = True
    overlap_p2p_comm: bool = False
    batch_p2p_comm: bool = True

    # shape
    encoder_seq_length: int
    max_position_embeddings: int
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int | None = None
    kv_channels: int | None = None
    init_method_std: float = 0.02
    use_scaled_init_method: bool = True
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    ffn_dropout: float = 0.0
    apply_query_key_layer_scaling: bool = False
    normalization: Literal["layernorm"] = "layernorm"
    layernorm_epsilon: float = 1e-5
    do_layer_norm_weight_decay: Literal[False] = False
    make_vocab_size_divisible_by: int = VOCAB_DIVISOR
    override_vocab_size: int | None = None
    pre_process: Literal[True] = True
    post_process: Literal[True] = True
    persist_layer_norm: bool = True
    bias: bool = True
    activation: Literal["gelu"] = "gelu"
    headscale: Literal[False] = False
    transformer_block_type: Literal["pre_ln"] = "pre_ln"
    openai_gelu: Literal[False] = False
    normalize_attention_scores: Literal[True] = True
    position_embedding_type: Literal["learned_absolute"] = "learned_absolute"
    attention_type: Literal["multihead"] = "multihead"
    share_embeddings_and_output_weights: bool = True

    # recomputation
    activations_checkpoint_granularity: Literal["selective", "full"] | None = None
    activations_checkpoint_method: Literal["uniform", "block"] | None = None
    activations_checkpoint_num_layers: int | None = None
    num_micro_batches_with_partial_activation_checkpoints: Literal[0] | None = None
    activations_checkpoint_layers_per_pipeline: Literal[0] | None = None

    # kernels and numerics
    mcore_gpt: Literal[True] = True
    transformer_engine: bool = True
    use_flash_attention: bool = True
    fp8: Literal[False] = False
    fp8_e4m3: Literal[False] = False
    fp8_hybrid: Literal[False] = False
    fp8_margin: int = 0
    fp8_interval: int = 1
    fp8_amax_history_len: int = 1024
    fp8_amax_compute_algo: str = "max"
    fp8_wgrad: bool = True
    ub_tp_comm_overlap: Literal[False] = False
    native_amp_init_scale: int = 4294967296
    native_amp_growth_interval: int = 1000
    hysteresis: int = 2
    fp32_residual_connection: Literal[False] = False
    fp16_lm_cross_entropy: Literal[False] = False
    megatron_amp_O2: Literal[True] = True  # noqa: N815 (NeMo's key)
    grad_allreduce_chunk_size_mb: int = 125
    grad_div_ar_fusion: bool = True
    gradient_accumulation_fusion: bool = False
    bias_activation_fusion: bool = True
    bias_dropout_add_fusion: bool = True
    masked_softmax_fusion: bool = False
    cross_entropy_loss_fusion: bool = False
    gradient_as_bucket_view: bool = True
    sync_batch_comm: bool = False
    use_cpu_initialization: bool = False
    onnx_safe: Literal[False] = False
    apex_transformer_log_level: int = 30
    gc_interval: int = 0
    seed: int = 1234
    resume_from_checkpoint: None = None
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    nsys_profile: Mapping[str, Any] = field(default_factory=dict)
    optim: OptimSection
    data: DataSection


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseConfig:
    """One training config. A candidate is a BaseConfig with another layout."""

    run: RunSection
    trainer: TrainerSection
    exp_manager: Mapping[str, Any] = field(default_factory=dict)
    model: ModelSection

    def __post_init__(self) -> None:
        problems = _contradictions(self)
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def shape(self) -> ModelShape:
        """The model's dimensions."""
        model = self.model
        return ModelShape(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups or model.num_attention_heads,
            kv_channels=model.kv_channels or model.hidden_size // model.num_attention_heads,
            seq_length=model.encoder_seq_length,
            max_position_embeddings=model.max_position_embeddings,
            vocab_size=model.override_vocab_size or GPT2_VOCAB_SIZE,
            tied_embeddings=model.share_embeddings_and_output_weights,
            has_bias=model.bias,
        )

    @property
    def layout(self) -> Layout:
        """How this config cuts the model."""
        model = self.model
        granularity = model.activations_checkpoint_granularity
        if granularity == "full":
            recompute = Recompute[(model.activations_checkpoint_method or "uniform").upper()]
        else:
            recompute = Recompute.SELECTIVE if granularity == "selective" else Recompute.NONE
        return Layout(
            tp=model.tensor_model_parallel_size,
            pp=model.pipeline_model_parallel_size,
            vpp=model.virtual_pipeline_model_parallel_size or 1,
            cp=model.context_parallel_size,
            mbs=model.micro_batch_size,
            recompute=recompute,
            recompute_num_layers=(model.activations_checkpoint_num_layers or 1) if recompute.is_full else 0,
        )

    @property
    def precision(self) -> Precision:
        """What the weights are kept in."""
        return PRECISIONS[self.trainer.precision]

    @property
    def gpus(self) -> int:
        """All GPUs of the training."""
        return self.trainer.num_nodes * self.trainer.devices

    @property
    def dp(self) -> int:
        """Data-parallel replicas; a layout that does not divide the GPUs is an error elsewhere."""
        return self.gpus // self.layout.gpus_per_replica

    @property
    def num_microbatches(self) -> int:
        """Microbatches that each replica works through in a step."""
        return self.model.global_batch_size // (self.model.micro_batch_size * self.dp)

    @property
    def workload(self) -> Workload:
        """What every layout of this config has to carry."""
        return Workload(
            shape=self.shape,
            gbs=self.model.global_batch_size,
            gpus=self.gpus,
            gpus_per_node=self.trainer.devices,
            precision=self.precision,
            sequence_parallel=self.model.sequence_parallel,
            flash_attention=self.model.use_flash_attention,
            dropout=self.model.hidden_dropout > 0,
            overlap_grad_sync=self.model.optim.overlap_grad_sync,
            overlap_param_sync=self.model.optim.overlap_param_sync,
            vocab_divisor=self.model.make_vocab_size_divisible_by,
        )

    def with_layout(self, layout: Layout) -> "BaseConfig":
        """The same training, cut as `layout`."""
        recompute = layout.recompute
        granularity: Literal["selective", "full"] | None = None
        method: Literal["uniform", "block"] | None = None
        if recompute is Recompute.SELECTIVE:
            granularity = "selective"
        elif recompute.is_full:
            granularity = "full"
            method = "block" if recompute is Recompute.BLOCK else "uniform"
        model = replace(
            self.model,
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
            context_parallel_size=layout.cp,
            micro_batch_size=layout.mbs,
            activations_checkpoint_granularity=granularity,
            activations_checkpoint_method=method,
            activations_checkpoint_num_layers=layout.recompute_num_layers if recompute.is_full else None,
            # Interleaving with batched sends computes garbage at PP=2, silently: both neighbours are one rank.
            overlap_p2p_comm=layout.vpp > 1 or self.model.overlap_p2p_comm,
            batch_p2p_comm=layout.vpp == 1 and self.model.batch_p2p_comm,
        )
        return replace(self, model=model)

    def document(self) -> dict[str, Any]:
        """The config as plain mappings, ready for YAML, keys in NeMo's order."""
        return asdict(self)


def _contradictions(config: BaseConfig) -> Sequence[str]:
    """Pairs of keys that cannot both hold. What depends on the layout is in `candidates.py`."""
    model = config.model
    problems: list[str] = []

    def need(ok: bool, key: str, allowed: str) -> None:  # noqa: FBT001 (reads as a sentence)
        if not ok:
            value: Any = config
            for part in key.split("."):
                value = getattr(value, part)
            problems.append(f"{key}: {value!r} given, allowed is {allowed}")

    positive = (
        "micro_batch_size global_batch_size tensor_model_parallel_size pipeline_model_parallel_size "
        "context_parallel_size encoder_seq_length max_position_embeddings num_layers hidden_size "
        "ffn_hidden_size num_attention_heads make_vocab_size_divisible_by"
    )
    for name in positive.split():
        need(getattr(model, name) >= 1, f"model.{name}", "1 or more")
    if problems:
        return problems
    vpp = model.virtual_pipeline_model_parallel_size
    need(vpp is None or vpp >= 1, "model.virtual_pipeline_model_parallel_size", "null, or 1 or more")
    need(config.run.name.isprintable(), "run.name", "one line of printable text")
    need(
        model.data.seq_length == model.encoder_seq_length,
        "model.data.seq_length",
        f"the value of model.encoder_seq_length ({model.encoder_seq_length})",
    )
    need(
        model.max_position_embeddings >= model.encoder_seq_length,
        "model.max_position_embeddings",
        f"at least model.encoder_seq_length ({model.encoder_seq_length})",
    )
    need(
        model.kv_channels is not None or model.hidden_size % model.num_attention_heads == 0,
        "model.num_attention_heads",
        f"a divisor of model.hidden_size ({model.hidden_size}), or set model.kv_channels",
    )
    need(
        model.num_attention_heads % (model.num_query_groups or 1) == 0,
        "model.num_query_groups",
        f"a divisor of model.num_attention_heads ({model.num_attention_heads})",
    )
    need(model.ffn_dropout == 0, "model.ffn_dropout", "0")
    for name in ("hidden_dropout", "attention_dropout"):
        need(0 <= getattr(model, name) < 1, f"model.{name}", "0 <= x < 1")
    method, layers = model.activations_checkpoint_method, model.activations_checkpoint_num_layers
    if model.activations_checkpoint_granularity == "full":
        need(layers is None or layers >= 1, "model.activations_checkpoint_num_layers", "1 or more")
    else:
        need(
            method is None,
            "model.activations_checkpoint_method",
            "null unless activations_checkpoint_granularity is full",
        )
        need(
            not layers,
            "model.activations_checkpoint_num_layers",
            "null unless activations_checkpoint_granularity is full",
        )
    return problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """What tells one size of a family from the next; the family's template holds the rest."""

    family: str
    name: str
    source: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    seq_length: int
    vocab_size: int
    global_batch_size: int
    lr: float
    tokens: int
    time_limit_days: float


#: Parts of the steps spent warming up and at the final rate; `formulas.yaml` of the predecessor, base_config.py:596.
_WARMUP_FRACTION = 0.0015
_CONSTANT_FRACTION = 0.166

#: How long before the job's end the trainer stops, to leave by itself.
_MARGIN = timedelta(minutes=30)


def render(template: str, preset: Preset, cluster: Cluster, num_nodes: int) -> str:
    """The preset's config for `num_nodes` nodes of `cluster` as commented YAML, with the layout still to be chosen."""
    limit = timedelta(days=preset.time_limit_days)
    max_steps = max(1, preset.tokens // (preset.seq_length * preset.global_batch_size))
    environment = jinja2.Environment(  # noqa: S701 (YAML of our own numbers, no HTML)
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True
    )
    return environment.from_string(template).render(
        preset=preset,
        cluster=cluster,
        num_nodes=num_nodes,
        max_steps=max_steps,
        time_limit=_slurm_time(limit),
        max_time=lightning_time(max(limit - _MARGIN, limit / 2)),
        init_method_std=round(0.64 / preset.hidden_size**0.5, 6),
        warmup_steps=int(_WARMUP_FRACTION * max_steps),
        constant_steps=int(_CONSTANT_FRACTION * max_steps),
        min_lr=round(0.1 * preset.lr, 8),
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
