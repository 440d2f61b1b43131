"""What the worker refuses before it starts anything; knows neither torch nor megatron."""

import importlib.util

from hptool.base_config import BaseConfig
from hptool.candidates import SearchLimits, SearchSpace, enumerate_layouts, mlp_widths
from hptool.errors import InputError
from hptool.serving_orders import ServingOrders
from hptool.worker import masking, served
from hptool.worker.installed import is_installed, may_use_transformer_engine, uses_transformer_engine

#: One step to warm up and one to time.
_FEWEST_STEPS = 2


def refuse_impossible(config: BaseConfig, source: str) -> None:
    """InputError where the config's layout cannot run on its GPUs, or the config asks for what the worker has not."""
    problems = [f"{source}: layout {config.layout.name}: {reason}" for reason in _broken_rules(config)]
    trainer, model = config.trainer, config.model
    if trainer.max_steps < _FEWEST_STEPS:
        problems.append(
            f"{source}: trainer.max_steps: {trainer.max_steps} given, allowed is {_FEWEST_STEPS} or more "
            "(the first steps only warm up)"
        )
    if model.optim.overlap_param_sync and not model.optim.overlap_grad_sync:
        problems.append(
            f"{source}: model.optim.overlap_param_sync: True given, allowed is False unless overlap_grad_sync is True"
        )
    if config.precision == "fp16":
        problems.append(
            f"{source}: trainer.precision: {trainer.precision!r} given, allowed for training is 'bf16' or 32: fp16 "
            "needs losses that are scaled"
        )
    problems += [f"{source}: {problem}" for problem in (*masking.problems(config), *_unsupported(config))]
    if problems:
        raise InputError(*problems)


def refuse_unservable(config: BaseConfig, orders: ServingOrders, source: str) -> None:
    """InputError where this layout cannot serve these points on the config's GPUs, or the model cannot serve at all.

    What a config says of batches, recomputation and the like is for training, and is not looked at.
    """
    model, shape, layout = config.model, config.shape, config.layout
    problems: list[str] = []

    def need(ok: bool, key: str, given: object, allowed: str) -> None:  # noqa: FBT001 (reads as a sentence)
        if not ok:
            problems.append(f"{source}: {key}: {given!r} given, allowed is {allowed}")

    part = "model.decoder" if config.is_encoder_decoder else "model"
    need(not config.is_bert, "model.bert_binary_head", model.bert_binary_head, "null: BERT writes no text to serve")
    if orders.engine == "megatron":  # a command of the user's knows best what it can do
        for key, size in (
            ("model.virtual_pipeline_model_parallel_size", layout.vpp),
            ("model.context_parallel_size", layout.cp),
            ("model.expert_model_parallel_size", layout.ep),
        ):
            need(size == 1, key, size, "1 for serving")
        one = layout.tp * layout.pp
        allowed = f"TP·PP ({one}) on all nodes together: serving measures one replica"
        need(config.gpus == one, "trainer.devices", config.trainer.devices, allowed)
        divided = [
            ("num_attention_heads", shape.num_attention_heads),
            ("num_query_groups", shape.num_query_groups),
            *mlp_widths(shape),
        ]
        for name, width in divided:
            allowed = f"a divisor of {name} ({width})"
            need(width % layout.tp == 0, "model.tensor_model_parallel_size", layout.tp, allowed)
        layers = shape.pipeline_layers
        allowed = f"a divisor of the {layers} layers"
        need(layers % layout.pp == 0, "model.pipeline_model_parallel_size", layout.pp, allowed)
        need(not model.fp8, "model.fp8", model.fp8, "false for serving, whose layers are not Transformer Engine's")
        if orders.cuda_graphs:
            on_gpu = config.trainer.accelerator != "cpu"
            need(on_gpu, "cuda_graphs", given=True, allowed="false on a CPU: CUDA graphs need a GPU")
            allowed = "false with experts: the host decides which token goes to which"
            need(not model.num_moe_experts, "cuda_graphs", given=True, allowed=allowed)
        problems += [f"{source}: {problem}" for problem in _unsupported(served.serving_config(config))]
    if shape.learned_positions:
        table = shape.max_position_embeddings
        allowed = f"at most the {table} places of {part}.max_position_embeddings"
        for point in orders.points:
            read = point.input_len + point.output_len - 1  # the last token is not read again
            longest = max(point.input_len, point.output_len) if config.is_encoder_decoder else read
            need(longest <= table, "points", point.name, allowed)
    if problems:
        raise InputError(*problems)


def refuse_ramp(config: BaseConfig, source: str) -> None:
    """InputError where `model.rampup_batch_size` has a batch that the layout cannot cut into microbatches."""
    model, layout = config.model, config.layout
    if model.rampup_batch_size is None:
        return
    start, increment, samples = model.rampup_batch_size
    # Interleaving counts in whole rounds of the pipeline.
    divisor = model.micro_batch_size * config.dp * (layout.pp if layout.vpp > 1 else 1)
    gbs = model.global_batch_size
    fits = 0 < start < gbs and increment > 0 and samples > 0 and (gbs - start) % increment == 0
    if not fits or start % divisor or increment % divisor:
        raise InputError(
            f"{source}: model.rampup_batch_size: {list(model.rampup_batch_size)} given, allowed is [start, increment, "
            f"samples] with a start below model.global_batch_size ({gbs}) that increments lead to, both multiples of "
            f"{divisor} for layout {layout.name} on {config.gpus} GPUs, and 1 sample or more"
        )


def refuse_missing_framework() -> None:
    """InputError where torch or Megatron-core is not installed; imports neither."""
    missing = [name for name in ("torch", "megatron") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"the worker needs {' and '.join(missing)}: pip install 'hptool[worker]'")


def refuse_missing_kernels(config: BaseConfig) -> None:
    """InputError where the config asks for kernels that are not installed here, by key and owner."""
    model, stack = config.model, config.stack
    part = "model.decoder" if config.is_encoder_decoder else "model"
    needs = []
    if model.gradient_accumulation_fusion and not uses_transformer_engine(config):
        needs.append(("model.gradient_accumulation_fusion", "fused_weight_gradient_mlp_cuda", "Apex"))
    # With flash attention there is no softmax kernel to fuse, and nothing to refuse.
    if stack.masked_softmax_fusion and not model.use_flash_attention and config.precision != "fp32":
        kernels = ["scaled_masked_softmax_cuda"]  # which says how rows are batched, whatever the mask
        if not config.is_bert:
            kernels.append("scaled_upper_triang_masked_softmax_cuda")
        if config.is_bert or config.is_encoder_decoder:
            kernels.append("scaled_softmax_cuda")
        needs += [(f"{part}.masked_softmax_fusion", kernel, "Apex' megatron kernels") for kernel in kernels]
    if fuses_rope(config):
        needs.append((f"{part}.apply_rope_fusion", "transformer_engine", "Transformer Engine"))
    if model.fp8:
        needs.append(("model.fp8", "transformer_engine", "Transformer Engine, whose GEMMs take 8 bits,"))
    if model.moe_grouped_gemm and model.num_moe_experts:
        needs.append(("model.moe_grouped_gemm", "grouped_gemm", "the grouped_gemm package"))
    if model.enable_cuda_graph and (uses_transformer_engine(config) or model.gradient_accumulation_fusion):
        raise InputError(
            "model.enable_cuda_graph: True given, allowed is False with layers of Transformer Engine or weight "
            "gradients of Apex (set model.transformer_engine and model.gradient_accumulation_fusion to false)"
        )
    problems = [
        f"{key}: True given, allowed is False where {owner} ({module}) is not installed"
        for key, module, owner in needs
        if not is_installed(module)
    ]
    if problems:
        raise InputError(*problems)


def fuses_rope(config: BaseConfig) -> bool:
    """Rotary positions are applied by one kernel."""
    return config.stack.apply_rope_fusion and config.stack.position_embedding_type == "rope"


def _broken_rules(config: BaseConfig) -> list[str]:
    """The first of the candidates' rules that this layout breaks; a search space of one."""
    layout = config.layout
    space = SearchSpace(
        tp=(layout.tp,),
        pp=(layout.pp,),
        vpp=(layout.vpp,),
        cp=(layout.cp,),
        ep=(layout.ep,),
        mbs=(layout.mbs,),
        recompute=((layout.recompute, layout.recompute_num_layers),),
    )
    limits = SearchLimits(
        mbs=(layout.mbs,), long_mbs=layout.mbs, max_microbatch_tokens=1, min_tokens_per_cp_rank=1, block_fractions=()
    )
    return [rejection.reason for rejection in enumerate_layouts(space, config.workload, limits).rejections]


def _unsupported(config: BaseConfig) -> list[str]:
    """Keys that no layout could honour: what Megatron-core's layers without Transformer Engine cannot do."""
    model, stack, shape = config.model, config.stack, config.shape
    part = "model.decoder" if config.is_encoder_decoder else "model"
    problems = []

    def need(ok: bool, key: str, given: object, allowed: str) -> None:  # noqa: FBT001 (reads as a sentence)
        if not ok:
            problems.append(f"{key}: {given!r} given, allowed is {allowed}")

    if model.enable_cuda_graph:
        on_gpu = config.trainer.accelerator != "cpu"
        need(on_gpu, "model.enable_cuda_graph", given=True, allowed="false on a CPU: CUDA graphs need a GPU")
        compiles = model.use_flash_attention and not model.num_moe_experts
        allowed = "false without model.use_flash_attention, and with experts: such layers are not compiled"
        need(compiles, "model.enable_cuda_graph", given=True, allowed=allowed)
    allowed = "false without model.transformer_engine and model.use_flash_attention, or with ALiBi"
    need(not model.fp8 or may_use_transformer_engine(config), "model.fp8", given=True, allowed=allowed)
    if config.is_alibi:
        positions = stack.position_embedding_type
        need(model.use_flash_attention, f"{part}.position_embedding_type", positions, "with model.use_flash_attention")
    if stack.position_embedding_type == "rope":
        rotated = int(shape.kv_channels * stack.rotary_percentage)
        allowed = f"an even part of the {shape.kv_channels} channels of a head"
        need(rotated > 0 and rotated % 2 == 0, f"{part}.rotary_percentage", stack.rotary_percentage, allowed)
        factor = stack.seq_len_interpolation_factor
        need(factor is None or factor > 0, f"{part}.seq_len_interpolation_factor", factor, "null, or more than 0")
    if config.is_encoder_decoder:
        heads, groups = shape.num_attention_heads, shape.num_query_groups
        need(groups == heads, f"{part}.num_query_groups", groups, f"null or {heads} (cross-attention knows no groups)")
        allowed = f"null or {stack.bias}, as model.decoder.bias (cross-attention has the same)"
        need(shape.has_qkv_bias == stack.bias, f"{part}.qkv_bias", stack.qkv_bias, allowed)
    if shape.num_experts and stack.bias:
        width = model.moe_shared_expert_intermediate_size
        need(width is None, "model.moe_shared_expert_intermediate_size", width, "null where model.bias is true")
        need(not model.moe_grouped_gemm, "model.moe_grouped_gemm", given=True, allowed="false where model.bias is true")
    return problems
