"""One training config: NeMo-Megatron's keys (`nemo_keys.py`), and what they mean in hptool's words."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from hptool.candidates import Layout, Recompute, Workload
from hptool.facts import ModelShape, Precision
from hptool.nemo_keys import PRECISIONS, ModelSection, RunSection, StackSection, TrainerSection

#: Entries of the vocabularies that NeMo's tokenizers are known by (their `type`, or their library); the first where a
#: config names none. From Radford et al. 2019, Devlin et al. 2018 and the byte.
VOCABULARIES: Mapping[str, int] = {
    "GPT2BPETokenizer": 50_257,
    "BertWordPieceLowerCase": 30_522,
    "BertWordPieceCase": 28_996,
    "byte-level": 257,
}

#: What T5 has in its stacks and not in `model`.
_STACK_KEYS = tuple(f.name for f in fields(StackSection))


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseConfig:
    """One training config. A candidate is a BaseConfig with another layout."""

    run: RunSection
    trainer: TrainerSection
    exp_manager: Mapping[str, Any] = field(default_factory=dict)
    model: ModelSection
    name: str | None = None
    restore_from_path: None = None
    defaults: Any = None
    hydra: Any = None

    def __post_init__(self) -> None:
        problems = _contradictions(self)
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def stack(self) -> StackSection:
        """The keys of the layers: the decoder's, which an encoder beside it shares but for its number of layers."""
        return self.model.decoder or self.model

    @property
    def is_encoder_decoder(self) -> bool:
        """T5 and mT5."""
        return self.model.decoder is not None

    @property
    def is_bert(self) -> bool:
        """An encoder alone, trained on masked tokens."""
        return self.model.bert_binary_head is not None

    @property
    def shape(self) -> ModelShape:
        """The model's dimensions."""
        model, stack = self.model, self.stack
        layers, hidden, ffn, heads = (
            _given(getattr(stack, name))
            for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
        )
        encoder_layers = _given(model.encoder.num_layers) if model.encoder else 0
        length = model.data.seq_length
        return ModelShape(
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=ffn,
            num_attention_heads=heads,
            num_query_groups=stack.num_query_groups or heads,
            kv_channels=stack.kv_channels or hidden // heads,
            seq_length=_given(model.data.seq_length_dec) if encoder_layers else length,
            max_position_embeddings=model.max_position_embeddings,
            vocab_size=model.override_vocab_size or _given(_known_vocabulary(model)),
            tied_embeddings=model.share_embeddings_and_output_weights,
            has_bias=stack.bias,
            has_qkv_bias=stack.bias if stack.qkv_bias is None else stack.qkv_bias,
            gated_mlp=stack.is_gated,
            rms_norm=stack.normalization == "rmsnorm",
            causal=not self.is_bert,
            learned_positions=stack.position_embedding_type == "learned_absolute",
            num_experts=model.num_moe_experts or 0,
            experts_per_token=model.moe_router_topk if model.num_moe_experts else 0,
            expert_ffn_hidden_size=(model.moe_ffn_hidden_size or ffn) if model.num_moe_experts else 0,
            shared_ffn_hidden_size=model.moe_shared_expert_intermediate_size or 0,
            encoder_num_layers=encoder_layers,
            encoder_seq_length=length if encoder_layers else 0,
            has_mlm_head=self.is_bert,
            has_binary_head=bool(model.bert_binary_head),
        )

    @property
    def layout(self) -> Layout:
        """How this config cuts the model."""
        model, stack = self.model, self.stack
        granularity, layers = stack.activations_checkpoint_granularity, stack.activations_checkpoint_num_layers
        recompute = Recompute.NONE
        if granularity == "selective":
            recompute = Recompute.SELECTIVE
        elif granularity == "full" and layers != 0:  # NeMo's block method with 0 layers recomputes nothing
            recompute = Recompute[(stack.activations_checkpoint_method or "uniform").upper()]
        return Layout(
            tp=model.tensor_model_parallel_size,
            pp=model.pipeline_model_parallel_size,
            vpp=model.virtual_pipeline_model_parallel_size or 1,
            cp=model.context_parallel_size,
            ep=model.expert_model_parallel_size,
            mbs=model.micro_batch_size,
            recompute=recompute,
            recompute_num_layers=(layers or 1) if recompute.is_full else 0,
        )

    @property
    def precision(self) -> Precision:
        """What GEMMs compute in: what the weights are kept in, or 8 bits where `model.fp8` asks for them."""
        return "fp8" if self.model.fp8 else PRECISIONS[self.trainer.precision]

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
        stack = self.stack
        return Workload(
            shape=self.shape,
            gbs=self.model.global_batch_size,
            gpus=self.gpus,
            gpus_per_node=self.trainer.devices,
            precision=self.precision,
            sequence_parallel=self.model.sequence_parallel,
            flash_attention=self.model.use_flash_attention,
            alibi=self.is_alibi,
            cp_comm_type=self.model.cp_comm_type,
            cuda_graph=self.model.enable_cuda_graph,
            dropout=stack.hidden_dropout > 0,
            overlap_grad_sync=self.model.optim.overlap_grad_sync,
            overlap_param_sync=self.model.optim.overlap_param_sync,
            vocab_divisor=self.model.make_vocab_size_divisible_by,
        )

    @property
    def is_alibi(self) -> bool:
        """Positions are a bias on the attention scores (Press et al. 2021)."""
        return self.stack.position_embedding_type.lower() == "alibi"

    def with_layout(self, layout: Layout) -> "BaseConfig":
        """The same training, cut as `layout`."""
        model = replace(
            self.model,
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            micro_batch_size=layout.mbs,
            # Interleaving with batched sends computes garbage at PP=2, silently: both neighbours are one rank.
            overlap_p2p_comm=layout.vpp > 1 or self.model.overlap_p2p_comm,
            batch_p2p_comm=layout.vpp == 1 and self.model.batch_p2p_comm,
        )
        recompute = _recompute_keys(layout)
        if model.encoder is None or model.decoder is None:
            return replace(self, model=replace(model, **recompute))
        split = self._split_rank(layout.pp) if model.pipeline_model_parallel_split_rank is not None else None
        model = replace(
            model,
            encoder=replace(model.encoder, **recompute),
            decoder=replace(model.decoder, **recompute),
            pipeline_model_parallel_split_rank=split,
        )
        return replace(self, model=model)

    def _split_rank(self, pp: int) -> int:
        """The first stage of the decoder where the layers of both are spread evenly over `pp` stages."""
        shape = self.shape
        return pp * shape.encoder_num_layers // (shape.encoder_num_layers + shape.num_layers)

    def document(self) -> dict[str, Any]:
        """The config as plain mappings, ready for YAML, with the keys that its model has."""
        document = asdict(self)
        model = document["model"]
        if self.is_encoder_decoder:
            absent = [*_STACK_KEYS, "encoder_seq_length"]
        else:
            absent = ["encoder", "decoder", "seq_length", "pipeline_model_parallel_split_rank"]
        for key in absent:
            del model[key]
        for key in ("name", "restore_from_path", "defaults", "hydra"):
            if document[key] is None:
                del document[key]
        return document


def _given(value: int | None) -> int:
    assert value is not None  # noqa: S101 (`_contradictions` has seen to it)
    return value


def _known_vocabulary(model: ModelSection) -> int | None:
    """Entries of the tokenizer's vocabulary, sentinels included; None where its name does not tell."""
    names = [str(model.tokenizer.get(key) or "") for key in ("type", "library")]
    if not any(names):
        return VOCABULARIES["GPT2BPETokenizer"]
    sentinels = model.tokenizer.get("num_sentinel_tokens") or 0
    return next((VOCABULARIES[name] + sentinels for name in names if name in VOCABULARIES), None)


def _recompute_keys(layout: Layout) -> dict[str, Any]:
    """NeMo's keys of a layout's recomputation."""
    recompute = layout.recompute
    granularity: Literal["selective", "full"] | None = None
    if recompute.is_full:
        granularity = "full"
    elif recompute is Recompute.SELECTIVE:
        granularity = "selective"
    return {
        "activations_checkpoint_granularity": granularity,
        "activations_checkpoint_method": recompute.name.lower() if recompute.is_full else None,
        "activations_checkpoint_num_layers": layout.recompute_num_layers if recompute.is_full else None,
    }


class _Problems:
    """Collects what is wrong with a config, one line a key."""

    def __init__(self, config: BaseConfig) -> None:
        self._config = config
        self.lines: list[str] = []

    def need(self, ok: bool, key: str, allowed: str) -> None:  # noqa: FBT001 (reads as a sentence)
        """Notes the value at `key` unless it is `ok`."""
        if not ok:
            value: Any = self._config
            for part in key.split("."):
                value = getattr(value, part)
            self.lines.append(f"{key}: {value!r} given, allowed is {allowed}")


def _contradictions(config: BaseConfig) -> Sequence[str]:
    """Pairs of keys that cannot both hold. What depends on the layout is in `candidates.py`."""
    model = config.model
    problems = _Problems(config)
    need = problems.need
    positive = (
        "micro_batch_size global_batch_size tensor_model_parallel_size pipeline_model_parallel_size "
        "context_parallel_size expert_model_parallel_size max_position_embeddings make_vocab_size_divisible_by"
    )
    for name in positive.split():
        need(getattr(model, name) >= 1, f"model.{name}", "1 or more")
    need((model.encoder is None) == (model.decoder is None), "model.decoder", "given together with model.encoder")
    if problems.lines:
        return problems.lines
    vpp = model.virtual_pipeline_model_parallel_size
    need(vpp is None or vpp >= 1, "model.virtual_pipeline_model_parallel_size", "null, or 1 or more")
    need(config.run.name.isprintable(), "run.name", "one line of printable text")
    kept = PRECISIONS[config.trainer.precision]
    need(not model.fp8 or kept == "bf16", "model.fp8", f"false with trainer.precision {config.trainer.precision}")
    both = model.fp8_e4m3 and model.fp8_hybrid
    need(not both, "model.fp8_hybrid", "false where model.fp8_e4m3 is true: they are two formats")
    need(
        model.precision is None or PRECISIONS.get(model.precision) == kept,
        "model.precision",
        f"null, or as trainer.precision ({config.trainer.precision})",
    )
    if model.encoder is not None and model.decoder is not None:
        _check_encoder_decoder(model, model.encoder, model.decoder, problems)
    else:
        _check_lengths(model, problems)
        _check_stack(model, "model", problems)
        need(model.pipeline_model_parallel_split_rank is None, "model.pipeline_model_parallel_split_rank", "null")
    if model.override_vocab_size is None and _known_vocabulary(model) is None:
        problems.lines.append(
            "model.override_vocab_size: required key is missing, because model.tokenizer does not tell its vocabulary"
        )
    need(not model.nsys_profile.get("enabled"), "model.nsys_profile", "enabled: false: nothing is profiled here")
    need((model.override_vocab_size or 1) >= 1, "model.override_vocab_size", "null, or 1 or more")
    _check_experts(config, problems)
    if config.is_bert:
        need(model.position_embedding_type == "learned_absolute", "model.position_embedding_type", "learned_absolute")
        need(model.num_moe_experts is None, "model.num_moe_experts", "null with BERT")
    return problems.lines


def _check_encoder_decoder(
    model: ModelSection, encoder: StackSection, decoder: StackSection, problems: _Problems
) -> None:
    need = problems.need
    empty = StackSection()
    for name in _STACK_KEYS:
        if getattr(model, name) != getattr(empty, name):
            problems.lines.append(
                f"model.{name}: {getattr(model, name)!r} given, allowed is nothing here: "
                "T5 has it in model.encoder and model.decoder"
            )
        if name not in ("num_layers", "activations_checkpoint_num_layers"):
            same = getattr(encoder, name) == getattr(decoder, name)
            need(same, f"model.encoder.{name}", f"as model.decoder.{name} ({getattr(decoder, name)!r})")
    for part, stack in (("model.encoder", encoder), ("model.decoder", decoder)):
        _check_stack(stack, part, problems)
        need(stack.position_embedding_type == "learned_absolute", f"{part}.position_embedding_type", "learned_absolute")
    length, decoder_length = model.data.seq_length, model.data.seq_length_dec
    need(decoder_length is not None and decoder_length >= 1, "model.data.seq_length_dec", "1 or more")
    need(model.seq_length in (None, length), "model.seq_length", f"the value of model.data.seq_length ({length})")
    need(model.encoder_seq_length is None, "model.encoder_seq_length", "null with T5, which has model.data.seq_length")
    longest = max(length, decoder_length or 0)
    need(model.max_position_embeddings >= longest, "model.max_position_embeddings", f"at least {longest}")
    if not problems.lines:
        # What stands there need not suit this layout's pipeline: `with_layout` sets it anew.
        split, pp = model.pipeline_model_parallel_split_rank, model.pipeline_model_parallel_size
        even = pp * _given(encoder.num_layers) // (_given(encoder.num_layers) + _given(decoder.num_layers))
        need(split in (None, 0, even), "model.pipeline_model_parallel_split_rank", f"null or {even}")
    need(model.num_moe_experts is None, "model.num_moe_experts", "null with T5")
    need(model.share_embeddings_and_output_weights, "model.share_embeddings_and_output_weights", "true with T5")


def _check_lengths(model: ModelSection, problems: _Problems) -> None:
    need, length = problems.need, model.encoder_seq_length
    need(length is not None and length >= 1, "model.encoder_seq_length", "1 or more")
    need(model.seq_length is None, "model.seq_length", "null but for T5")
    need(model.data.seq_length_dec is None, "model.data.seq_length_dec", "null but for T5")
    need(
        model.data.seq_length == length,
        "model.data.seq_length",
        f"the value of model.encoder_seq_length ({length})",
    )
    # Rotary positions and ALiBi have no table that could be too short, but NeMo's meaning is the same.
    need(
        length is None or model.max_position_embeddings >= length,
        "model.max_position_embeddings",
        f"at least model.encoder_seq_length ({length})",
    )


def _check_stack(stack: StackSection, part: str, problems: _Problems) -> None:
    need = problems.need
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    for name in sizes:
        value = getattr(stack, name)
        if value is None:
            problems.lines.append(f"{part}.{name}: required key is missing")
        else:
            need(value >= 1, f"{part}.{name}", "1 or more")
    if any((getattr(stack, name) or 0) < 1 for name in sizes):
        return
    hidden, heads = _given(stack.hidden_size), _given(stack.num_attention_heads)
    need(
        stack.kv_channels is not None or hidden % heads == 0,
        f"{part}.num_attention_heads",
        f"a divisor of {part}.hidden_size ({hidden}), or set {part}.kv_channels",
    )
    need(
        heads % (stack.num_query_groups or 1) == 0,
        f"{part}.num_query_groups",
        f"a divisor of {part}.num_attention_heads ({heads})",
    )
    need(stack.ffn_dropout == 0, f"{part}.ffn_dropout", "0")
    for name in ("hidden_dropout", "attention_dropout"):
        need(0 <= getattr(stack, name) < 1, f"{part}.{name}", "0 <= x < 1")
    need(0 < stack.rotary_percentage <= 1, f"{part}.rotary_percentage", "0 < x <= 1")
    need(stack.qkv_bias is not False or not stack.bias, f"{part}.qkv_bias", f"null or true where {part}.bias is true")
    method, layers = stack.activations_checkpoint_method, stack.activations_checkpoint_num_layers
    if stack.activations_checkpoint_granularity == "full":
        fewest = 0 if method == "block" else 1
        need(layers is None or layers >= fewest, f"{part}.activations_checkpoint_num_layers", f"{fewest} or more")
        return
    only_full = "null unless activations_checkpoint_granularity is full"
    # NeMo's own recipes for Llama 2 name a method for 0 layers.
    need(method is None or layers == 0, f"{part}.activations_checkpoint_method", only_full)
    need(not layers, f"{part}.activations_checkpoint_num_layers", only_full)


def _check_experts(config: BaseConfig, problems: _Problems) -> None:
    model, need = config.model, problems.need
    experts = model.num_moe_experts
    if experts is None:
        for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
            need(getattr(model, name) is None, f"model.{name}", "null without model.num_moe_experts")
        need(model.expert_model_parallel_size == 1, "model.expert_model_parallel_size", "1 without experts")
        return
    need(experts >= 1, "model.num_moe_experts", "null, or 1 or more")
    need(1 <= model.moe_router_topk <= experts, "model.moe_router_topk", f"1 to {experts}")
    for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        value = getattr(model, name)
        need(value is None or value >= 1, f"model.{name}", "null, or 1 or more")
