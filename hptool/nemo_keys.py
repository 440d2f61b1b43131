"""The keys of NeMo-Megatron's training YAML as types, under the same names, for GPT-like models, BERT and T5.

A config that works there reads here and the other way round. A key that the worker cannot honour is typed with the
only values that it can: a wish is granted or refused by name, never ignored. Keys that only matter to NeMo itself
(experiment manager, tokenizer, profiler) are kept and written back as they came.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hptool.facts import VOCAB_DIVISOR, Precision

#: NeMo's (Lightning's) spellings of the precisions that the worker knows.
PRECISIONS: Mapping[str | int, Precision] = {
    "bf16": "bf16",
    "bf16-mixed": "bf16",
    32: "fp32",
    "32": "fp32",
    "32-true": "fp32",
    16: "fp16",
    "16": "fp16",
    "16-mixed": "fp16",
}

#: The keys of each precision of GEMMs. 8 bits are NeMo's usual two formats: more fraction forward, more range backward.
PRECISION_OVERRIDES: Mapping[str, tuple[str, ...]] = {
    "fp32": ("trainer.precision=32", "model.fp8=false"),
    "bf16": ("trainer.precision=bf16", "model.fp8=false"),
    "fp16": ("trainer.precision=16", "model.fp8=false"),
    "fp8": ("trainer.precision=bf16", "model.fp8=true", "model.fp8_e4m3=false", "model.fp8_hybrid=true"),
}

#: NeMo's activations of the MLP. `fast-` asks for a fused kernel, which `bias_activation_fusion` decides here.
Activation = Literal["gelu", "geglu", "fast-geglu", "swiglu", "fast-swiglu", "squared-relu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSection:
    """`run`: what NeMo's launcher needs to know of the job."""

    name: str
    results_dir: str | None = None
    time_limit: str | None = None
    dependency: str | None = None
    preprocessed_dir: str | None = None
    blending_alpha: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSection:
    """`trainer`: nodes, devices, precision and length of the training."""

    num_nodes: int
    devices: int
    accelerator: Literal["gpu", "cpu"] = "gpu"
    precision: Literal["bf16", "bf16-mixed", 32, "32", "32-true", 16, "16", "16-mixed"] = "bf16"
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
    """`model.optim.sched`: the learning-rate schedule. The warm-up is a number of steps, or a part of them."""

    name: Literal["CosineAnnealing", "WarmupAnnealing"] = "CosineAnnealing"
    warmup_steps: int | None = None
    warmup_ratio: float | None = None
    constant_steps: int = 0
    min_lr: float = 0.0
    last_epoch: Literal[-1] = -1

    def __post_init__(self) -> None:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            msg = f"warmup_ratio: {self.warmup_ratio} given, allowed is null where there are warmup_steps"
            raise ValueError(msg)
        if self.warmup_ratio is not None and not 0 <= self.warmup_ratio <= 1:
            msg = f"warmup_ratio: {self.warmup_ratio} given, allowed is 0 <= x <= 1"
            raise ValueError(msg)

    def steps_of_warmup(self, max_steps: int) -> int:
        """Steps until the full rate."""
        return self.warmup_steps or int((self.warmup_ratio or 0) * max_steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimSection:
    """`model.optim`: Adam, sharded over the data-parallel ranks, and its overlaps."""

    name: Literal["mcore_distributed_optim", "distributed_fused_adam"] = "mcore_distributed_optim"
    lr: float
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    bucket_cap_mb: int = 125
    grad_sync_dtype: Literal["fp32"] | None = None
    overlap_grad_sync: bool = False
    overlap_param_sync: bool = False
    contiguous_grad_buffer: Literal[True] = True
    contiguous_param_buffer: Literal[True] = True
    sched: SchedSection = field(default_factory=SchedSection)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSection:
    """`model.data`: a tokenised `.bin/.idx` set, or synthetic tokens where `data_prefix` is empty.

    `seq_length` is the encoder's where there is one, and `seq_length_dec` then the decoder's. What T5 and BERT train
    on is made of the set's tokens by masking `masked_lm_prob` of them.
    """

    seq_length: int
    seq_length_dec: int | None = None
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
    validation_drop_last: bool = True
    no_seqlen_plus_one_input_tokens: Literal[False] = False
    pad_samples_to_global_batch_size: Literal[False] = False
    shuffle_documents: bool = True
    dataset_type: Literal["t5"] | None = None
    masked_lm_prob: float = 0.15
    short_seq_prob: float = 0.0
    max_ngram_size: int = 10
    mean_ngram_size: int | None = None
    geometric_dist: bool = True
    permutation: Literal[False] = False
    whole_word_masking: bool = False
    favor_longer_ngrams: bool = False
    respect_document_boundaries: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class StackSection:
    """The keys of one stack of layers: they stand in `model`, or with T5 in `model.encoder` and `model.decoder`."""

    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    kv_channels: int | None = None
    init_method_std: float = 0.02
    use_scaled_init_method: bool = True
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    ffn_dropout: float = 0.0
    apply_query_key_layer_scaling: bool = False
    normalization: Literal["layernorm", "rmsnorm"] = "layernorm"
    layernorm_zero_centered_gamma: bool = False
    layernorm_epsilon: float = 1e-5
    persist_layer_norm: bool = True
    arch: Literal["transformer"] = "transformer"
    bias: bool = True
    qkv_bias: bool | None = None
    activation: Activation = "gelu"
    headscale: Literal[False] = False
    transformer_block_type: Literal["pre_ln"] = "pre_ln"
    openai_gelu: Literal[False] = False
    normalize_attention_scores: Literal[True] = True
    position_embedding_type: Literal["learned_absolute", "rope", "alibi", "ALiBi"] = "learned_absolute"
    rotary_percentage: float = 1.0
    rotary_base: float = 10_000.0
    rotary_interleaved: bool = False
    seq_len_interpolation_factor: float | None = None
    apply_rope_fusion: bool = False
    attention_type: Literal["multihead"] = "multihead"
    use_emha: Literal[False] = False
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    relative_position_bias_self_attention_only: bool = True
    fp32_residual_connection: Literal[False] = False
    onnx_safe: Literal[False] = False
    bias_activation_fusion: bool = True
    bias_dropout_add_fusion: bool = True
    masked_softmax_fusion: bool = False
    grad_div_ar_fusion: bool = True

    # recomputation
    activations_checkpoint_granularity: Literal["selective", "full"] | None = None
    activations_checkpoint_method: Literal["uniform", "block"] | None = None
    activations_checkpoint_num_layers: int | None = None

    @property
    def is_gated(self) -> bool:
        """The MLP computes a gate beside its values."""
        return self.activation.endswith("glu")


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomizationSection:
    """`model.mcore_customization_config`: Falcon's layers, which are not there."""

    new_decoder_architecture: Literal[False] = False
    parallel_attention: Literal[False] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSection(StackSection):
    """`model`: shape, layout, batch, recomputation, and the kernels to use.

    T5 has its shape in `encoder` and `decoder`; BERT is what has a `bert_binary_head`, be it false.
    """

    # batch and layout
    micro_batch_size: int
    global_batch_size: int
    rampup_batch_size: tuple[int, int, int] | None = None
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    pipeline_model_parallel_split_rank: int | None = None
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    cp_comm_type: Literal["all_gather", "a2a"] = "all_gather"
    expert_model_parallel_size: int = 1
    sequence_parallel: bool = True
    overlap_p2p_comm: bool = False
    batch_p2p_comm: bool = True

    # shape beside the stacks
    encoder: StackSection | None = None
    decoder: StackSection | None = None
    encoder_seq_length: int | None = None
    seq_length: int | None = None
    max_position_embeddings: int
    do_layer_norm_weight_decay: Literal[False] = False
    make_vocab_size_divisible_by: int = VOCAB_DIVISOR
    override_vocab_size: int | None = None
    pre_process: Literal[True] = True
    post_process: Literal[True] = True
    share_embeddings_and_output_weights: bool = True
    share_token_embeddings: Literal[True] = True
    share_decoder_tokens_head_embeddings: Literal[True] = True
    scale_embeddings: bool = False
    bert_binary_head: bool | None = None

    # experts
    num_moe_experts: int | None = None
    moe_router_topk: int = 2
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    moe_router_load_balancing_type: Literal["aux_loss", "none"] = "aux_loss"
    moe_aux_loss_coeff: float = 0.01
    moe_z_loss_coeff: float | None = None
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"  # noqa: S105 (no password)
    moe_grouped_gemm: bool = False

    # recomputation
    num_micro_batches_with_partial_activation_checkpoints: Literal[0] | None = None
    activations_checkpoint_layers_per_pipeline: Literal[0] | None = None

    # kernels and numerics
    mcore_gpt: Literal[True] = True
    mcore_bert: Literal[True] = True
    mcore_customization_config: CustomizationSection = field(default_factory=CustomizationSection)
    precision: str | int | None = None
    transformer_engine: bool = True
    use_flash_attention: bool = True
    get_attention_mask_from_fusion: bool = True
    fp8: bool = False
    fp8_e4m3: bool = False
    fp8_hybrid: bool = False
    fp8_margin: int = 0
    fp8_interval: int = 1
    fp8_amax_history_len: int = 1024
    fp8_amax_compute_algo: Literal["max", "most_recent"] = "max"
    fp8_wgrad: bool = True
    reduce_amax: Literal[True] = True
    ub_tp_comm_overlap: Literal[False] = False
    ub_tp_comm_overlap_cfg: None = None
    native_amp_init_scale: int = 4294967296
    native_amp_growth_interval: int = 1000
    hysteresis: int = 2
    fp16_lm_cross_entropy: Literal[False] = False
    megatron_amp_O2: Literal[True] = True  # noqa: N815 (NeMo's key)
    grad_allreduce_chunk_size_mb: int = 125
    gradient_accumulation_fusion: bool = False
    cross_entropy_loss_fusion: bool = True
    gradient_as_bucket_view: bool = True
    sync_batch_comm: bool = False
    use_cpu_initialization: bool = False
    enable_cuda_graph: bool = False
    apex_transformer_log_level: int = 30
    gc_interval: int = 0
    seed: int = 1234
    resume_from_checkpoint: None = None
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    nsys_profile: Mapping[str, Any] = field(default_factory=dict)
    optim: OptimSection
    data: DataSection
