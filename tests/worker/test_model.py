"""The model is the one that the config describes, cut as the layout says."""

from pathlib import Path
from typing import Any

import pytest

from hptool.base_config import BaseConfig
from hptool.errors import InputError
from hptool.worker.refusals import refuse_impossible
from tests.worker.runs import on_ranks, tiny_config, tiny_family

TP2 = {"trainer__devices": 2, "model__tensor_model_parallel_size": 2}
PP2 = {"trainer__devices": 2, "model__pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "model__virtual_pipeline_model_parallel_size": 2}


def built(config: BaseConfig) -> dict[str, Any]:
    """Megatron's config and the parameters of one rank, as this rank made them."""
    from hptool.worker import model  # noqa: PLC0415 (imports torch and megatron)

    megatron = model.transformer_config(config)
    chunks = model.build_chunks(config, megatron)
    return {
        "parameters": [{name: list(x.shape) for name, x in chunk.named_parameters()} for chunk in chunks],
        "config": {
            key: getattr(megatron, key)
            for key in (
                "batch_p2p_comm",
                "overlap_p2p_comm",
                "sequence_parallel",
                "layernorm_epsilon",
                "hidden_dropout",
                "attention_dropout",
                "init_method_std",
                "recompute_granularity",
                "recompute_method",
                "recompute_num_layers",
                "recompute_modules",
            )
        },
        "sequence_parallel_marks": sum(
            getattr(x, "sequence_parallel", False) for chunk in chunks for x in chunk.parameters()
        ),
    }


def count(parameters: list[dict[str, list[int]]]) -> int:
    """Numbers in these tensors."""
    total = 0
    for chunk in parameters:
        for shape in chunk.values():
            size = 1
            for dimension in shape:
                size *= dimension
            total += size
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__share_embeddings_and_output_weights": False},
        {"model__bias": False},
        {"model__num_query_groups": 2},
        {"model__kv_channels": 32},
        {"model__max_position_embeddings": 100},
        {"model__bias": False, "model__qkv_bias": True},
        tiny_family("llama"),
        tiny_family("llama", model__qkv_bias=True),
        tiny_family("gemma"),
        tiny_family("alibi"),
        tiny_family("moe"),
        tiny_family("moe", model__moe_shared_expert_intermediate_size=48),
        tiny_family("moe", model__bias=True, model__activation="gelu"),
        tiny_family("bert"),
        tiny_family("bert", model__bert_binary_head=False),
        tiny_family("bert", model__share_embeddings_and_output_weights=False),
        tiny_family("t5"),
        tiny_family("t5", model__encoder__num_layers=2),
        tiny_family("t5", model__encoder__bias=False, model__decoder__bias=False),
    ],
    ids=str,
)
def test_parameters_are_those_of_the_shape(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    (rank,) = on_ranks(tmp_path, config, lambda: built(config))
    shape = config.shape
    copies = 1 if shape.tied_embeddings else 2
    # T5 and BERT have a bias for each word.
    words = shape.hidden_size * copies + (config.is_bert or config.is_encoder_decoder)
    padding = (shape.padded_vocab_size(1) - shape.vocab_size) * words
    assert padding > 0
    assert count(rank["parameters"]) - padding == shape.num_parameters


def test_tensor_ranks_hold_halves_of_the_matrices(tmp_path: Path) -> None:
    config = tiny_config(**TP2)
    ranks = on_ranks(tmp_path, config, lambda: built(config))
    shape = config.shape
    h, f = shape.hidden_size, shape.ffn_hidden_size
    vocabulary = shape.padded_vocab_size(2) * h
    # Split: the vocabulary, all weights, and the biases of column-parallel layers. Whole: positions, norms, the rest.
    split = vocabulary + shape.num_layers * (4 * h * h + 2 * h * f + 3 * h + f)
    whole = shape.max_position_embeddings * h + shape.num_layers * (2 * h + 4 * h) + 2 * h
    assert [count(rank["parameters"]) for rank in ranks] == [split // 2 + whole] * 2
    # Gradients of norms and of row-parallel biases are to be added up: six tensors a layer, and the last norm's two.
    assert [rank["sequence_parallel_marks"] for rank in ranks] == [shape.num_layers * 6 + 2] * 2


def test_pipeline_stages_hold_the_model_once(tmp_path: Path) -> None:
    config = tiny_config(**PP2)
    ranks = on_ranks(tmp_path, config, lambda: built(config))
    shape = config.shape
    vocabulary = shape.padded_vocab_size(1) * shape.hidden_size
    layers = shape.num_layers // 2 * shape.layer_parameters
    first, last = (count(rank["parameters"]) for rank in ranks)
    assert first == layers + vocabulary + shape.max_position_embeddings * shape.hidden_size
    assert last == layers + vocabulary + 2 * shape.hidden_size  # the tied embedding once more, and the last norm


def test_interleaved_stages_alternate(tmp_path: Path) -> None:
    config = tiny_config(**VPP2)
    ranks = on_ranks(tmp_path, config, lambda: built(config))
    assert [len(rank["parameters"]) for rank in ranks] == [2, 2]
    embeddings = [["embedding" in str(list(chunk)) for chunk in rank["parameters"]] for rank in ranks]
    assert embeddings == [[True, False], [False, False]]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("batch", [True, False])
def test_interleaving_never_batches_its_sends(tmp_path: Path, overlap: bool, batch: bool) -> None:  # noqa: FBT001 (parameters)
    wish = {"model__overlap_p2p_comm": overlap, "model__batch_p2p_comm": batch}
    for changes, expected in (({**VPP2, **wish}, (True, False)), ({**PP2, **wish}, (False, batch))):
        config = tiny_config(**changes)
        for rank in on_ranks(tmp_path, config, lambda config=config: built(config)):  # type: ignore[misc]
            assert (rank["config"]["overlap_p2p_comm"], rank["config"]["batch_p2p_comm"]) == expected


def test_numbers_of_the_config_reach_megatron(tmp_path: Path) -> None:
    config = tiny_config(
        model__layernorm_epsilon=1e-6,
        model__hidden_dropout=0.1,
        model__attention_dropout=0.2,
        model__init_method_std=0.01,
        model__activations_checkpoint_granularity="full",
        model__activations_checkpoint_method="block",
        model__activations_checkpoint_num_layers=3,
    )
    (rank,) = on_ranks(tmp_path, config, lambda: built(config))
    assert rank["config"] == {
        "batch_p2p_comm": True,
        "overlap_p2p_comm": False,
        "sequence_parallel": False,
        "layernorm_epsilon": 1e-6,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.2,
        "init_method_std": 0.01,
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 3,
        "recompute_modules": ["core_attn"],
    }


@pytest.mark.parametrize("scaled", [True, False])
def test_initial_weights_have_the_wanted_spread(tmp_path: Path, scaled: bool) -> None:  # noqa: FBT001 (a parameter)
    config = tiny_config(model__init_method_std=0.05, model__use_scaled_init_method=scaled)

    def spreads() -> dict[str, float]:
        from hptool.worker import model  # noqa: PLC0415 (imports torch and megatron)

        (chunk,) = model.build_chunks(config, model.transformer_config(config))
        return {name: float(x.std()) for name, x in chunk.named_parameters() if x.dim() == 2}

    (spread,) = on_ranks(tmp_path, config, spreads)
    assert len(spread) == 2 + 4 * config.shape.num_layers
    for name, std in spread.items():
        # GPT-2's residual scaling: the outputs of attention and MLP are divided by the square root of 2·layers.
        is_output = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        expected = 0.05 / (2 * config.shape.num_layers) ** 0.5 if scaled and is_output else 0.05
        assert std == pytest.approx(expected, rel=0.05), name


def test_keys_of_other_families_reach_megatron(tmp_path: Path) -> None:
    config = tiny_config(
        **tiny_family(
            "moe",
            model__rotary_percentage=0.5,
            model__rotary_base=100.0,
            model__rotary_interleaved=True,
            model__seq_len_interpolation_factor=4.0,
            model__layernorm_zero_centered_gamma=True,
            model__moe_shared_expert_intermediate_size=48,
            model__moe_token_dispatcher_type="allgather",  # noqa: S106 (no password)
        )
    )

    def found() -> dict[str, Any]:
        from hptool.worker import model  # noqa: PLC0415 (imports torch and megatron)

        megatron = model.transformer_config(config)
        (chunk,) = model.build_chunks(config, megatron)
        rope, layer = chunk.rotary_pos_emb, chunk.decoder.layers[0]
        return {
            "frequencies": rope.inv_freq.tolist(),
            "factor": rope.seq_len_interpolation_factor,
            "interleaved": rope.rotary_interleaved and megatron.rotary_interleaved,
            "norm": [type(layer.input_layernorm).__name__, float(layer.input_layernorm.weight.abs().max())],
            "moe": [
                megatron.moe_router_topk,
                megatron.moe_aux_loss_coeff,
                megatron.moe_z_loss_coeff,
                megatron.moe_expert_capacity_factor,
            ],
            "dispatcher": type(layer.mlp.token_dispatcher).__name__,
            "shared": list(layer.mlp.shared_experts.linear_fc1.weight.shape),
        }

    (answer,) = on_ranks(tmp_path, config, found)
    assert answer.pop("frequencies") == pytest.approx([100 ** (-i / 8) for i in range(0, 8, 2)])
    assert answer == {
        "factor": 4.0,
        "interleaved": True,
        "norm": ["_ZeroCentredRmsNorm", 0.0],
        "moe": [2, 1.0, 0.1, None],
        "dispatcher": "MoEAllGatherTokenDispatcher",
        "shared": [96, 64],
    }


def test_embeddings_are_scaled_where_asked(tmp_path: Path) -> None:
    def mean_size(config: BaseConfig) -> float:
        import torch  # noqa: PLC0415 (heavy)

        from hptool.worker import model  # noqa: PLC0415 (imports torch and megatron)

        (chunk,) = model.build_chunks(config, model.transformer_config(config))
        tokens = torch.arange(32)[None]
        return float(chunk.embedding(tokens, tokens).abs().mean())

    plain, scaled = (
        on_ranks(tmp_path / str(wish), config, lambda config=config: mean_size(config))[0]  # type: ignore[misc]
        for wish in (False, True)
        for config in [tiny_config(**tiny_family("gemma", model__scale_embeddings=wish))]
    )
    assert scaled == pytest.approx(8 * plain)


def test_zero_centred_norms_are_the_norms_of_their_weight_and_one() -> None:
    import torch  # noqa: PLC0415 (heavy)
    from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: PLC0415 (heavy)

    from hptool.worker.attention import LocalNorm  # noqa: PLC0415 (imports torch and megatron)

    x = torch.randn(5, 16)
    for normalization in ("LayerNorm", "RMSNorm"):
        plain, centred = (
            LocalNorm(
                TransformerConfig(
                    num_layers=1,
                    hidden_size=16,
                    num_attention_heads=1,
                    normalization=normalization,
                    layernorm_zero_centered_gamma=wish,
                ),
                16,
                1e-5,
            )
            for wish in (False, True)
        )
        assert torch.equal(plain(x), centred(x))
        weight = torch.randn(16)
        with torch.no_grad():
            plain.load_state_dict({"weight": weight + 1}, strict=False)
            centred.load_state_dict({"weight": weight}, strict=False)
        assert torch.allclose(plain(x), centred(x))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (tiny_family("llama", model__apply_rope_fusion=True), "model.apply_rope_fusion: True given"),
        (tiny_family("moe", model__moe_grouped_gemm=True), "model.moe_grouped_gemm: True given"),
        (
            {"model__fp8": True, "model__fp8_hybrid": True, "trainer__precision": "bf16"},
            "model.fp8: True given",
        ),
        (
            tiny_family(
                "bert",
                model__masked_softmax_fusion=True,
                model__use_flash_attention=False,
                trainer__precision="bf16",
            ),
            "model.masked_softmax_fusion: True given",
        ),
    ],
)
def test_a_missing_kernel_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    from hptool.worker import model  # noqa: PLC0415 (imports torch and megatron)

    with pytest.raises(InputError, match=f"{said}, allowed is False where"):
        model.transformer_config(tiny_config(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (tiny_family("alibi", model__use_flash_attention=False), "allowed is with model.use_flash_attention"),
        ({"model__enable_cuda_graph": True}, "model.enable_cuda_graph: True given, allowed is false on a CPU"),
        (
            tiny_family("alibi", model__fp8=True, trainer__precision="bf16"),
            "model.fp8: True given, allowed is false without",
        ),
        (tiny_family("llama", model__rotary_percentage=0.2), "an even part of the 16 channels"),
        (tiny_family("llama", model__seq_len_interpolation_factor=0.0), "model.seq_len_interpolation_factor: 0.0"),
        (
            tiny_family("t5", model__encoder__num_query_groups=2, model__decoder__num_query_groups=2),
            "model.decoder.num_query_groups: 2 given, allowed is null or 4",
        ),
        (
            tiny_family(
                "t5",
                **{
                    f"model__{part}__{key}": key != "bias"
                    for part in ("encoder", "decoder")
                    for key in ("bias", "qkv_bias")
                },
            ),
            "model.decoder.qkv_bias: True given",
        ),
        (
            tiny_family("moe", model__bias=True, model__moe_shared_expert_intermediate_size=8),
            "model.moe_shared_expert_intermediate_size: 8 given",
        ),
        (tiny_family("moe", model__bias=True, model__moe_grouped_gemm=True), "model.moe_grouped_gemm: True given"),
        (
            tiny_family("bert", model__data__short_seq_prob=0.1, model__data__data_prefix="a_set"),
            "model.data.short_seq_prob: 0.1 given",
        ),
        (
            tiny_family("moe", trainer__devices=4, model__expert_model_parallel_size=3),
            "ep does not divide the 4 experts",
        ),
    ],
)
def test_what_no_layout_could_honour_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as raised:
        refuse_impossible(tiny_config(**changes), "tiny")
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("layout", "encoder", "decoder"),
    [
        ({}, [[[1, 2, 3, 4]]], [[[1, 2, 3, 4]]]),
        ({"pipeline_model_parallel_size": 2}, [[[1, 2, 3, 4]], [[]]], [[[]], [[1, 2, 3, 4]]]),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            [[[1, 2], []], [[3, 4], []]],
            [[[], [1, 2]], [[], [3, 4]]],
        ),
    ],
)
def test_stages_of_an_encoder_decoder_are_cut_from_the_encoders_layers_first(
    tmp_path: Path, layout: dict[str, int], encoder: list[Any], decoder: list[Any]
) -> None:
    changes = {f"model__{key}": value for key, value in layout.items()}
    config = tiny_config(**tiny_family("t5", trainer__devices=len(encoder), **changes))

    def numbers() -> dict[str, Any]:
        from hptool.worker import model  # noqa: PLC0415 (imports torch and megatron)

        chunks = model.build_chunks(config, model.transformer_config(config))
        return {
            part: [[x.layer_number for x in getattr(c, part).layers] if getattr(c, part) else [] for c in chunks]
            for part in ("encoder", "decoder")
        }

    ranks = on_ranks(tmp_path, config, numbers)
    assert [rank["encoder"] for rank in ranks] == encoder
    assert [rank["decoder"] for rank in ranks] == decoder


@pytest.mark.parametrize("family", ["bert", "t5", "moe"])
def test_parameters_have_the_same_names_and_shapes_on_disk_in_every_layout(tmp_path: Path, family: str) -> None:
    def saved() -> dict[str, list[Any]]:
        from hptool.worker import model  # noqa: PLC0415 (imports torch and megatron)

        found: dict[str, list[Any]] = {}
        for chunk in model.build_chunks(config, model.transformer_config(config)):
            for tensor in chunk.sharded_state_dict().values():
                if hasattr(tensor, "global_shape"):  # and no object of its own kind
                    places = found.setdefault(tensor.key, [list(tensor.global_shape), []])[1]
                    places.append(list(tensor.global_offset))
        return found

    layouts: dict[str, dict[str, int]] = {
        "whole": {},
        "pp2": {"pipeline_model_parallel_size": 2},
        "vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    }
    made = []
    for name, layout in layouts.items():
        changes = {f"model__{key}": value for key, value in layout.items()}
        config = tiny_config(**tiny_family(family, trainer__devices=2 if layout else 1, **changes))
        merged: dict[str, Any] = {}
        for rank in on_ranks(tmp_path / name, config, saved):
            for key, (whole, places) in rank.items():
                merged.setdefault(key, (whole, set()))[1].update(map(tuple, places))
                assert merged[key][0] == whole, key
        made.append(merged)
    assert len(made[0]) > 10
    assert made[0] == made[1] == made[2]


def test_block_recomputation_counts_layers_of_both_stacks(tmp_path: Path) -> None:
    keys = {"granularity": "full", "method": "block", "num_layers": 5}
    changes = {
        f"model__{part}__activations_checkpoint_{key}": value
        for part in ("encoder", "decoder")
        for key, value in keys.items()
    }
    config = tiny_config(**tiny_family("t5", **changes))

    def counts() -> list[int]:
        from hptool.worker import model  # noqa: PLC0415 (imports torch and megatron)

        (chunk,) = model.build_chunks(config, model.transformer_config(config))
        return [chunk.encoder.config.recompute_num_layers, chunk.decoder.config.recompute_num_layers]

    # All four of the encoder (of which five are as many as there are), and the decoder's first.
    assert on_ranks(tmp_path, config, counts) == [[5, 1]]


def test_ranks_of_a_tensor_group_draw_alike_outside_and_apart_inside_the_fork(tmp_path: Path) -> None:
    config = tiny_config(**TP2)

    def draw() -> dict[str, Any]:
        import torch  # noqa: PLC0415 (heavy)
        from megatron.core import tensor_parallel  # noqa: PLC0415 (heavy)

        from hptool.worker import model  # noqa: PLC0415 (imports torch and megatron)

        before = torch.rand(4).tolist()
        with tensor_parallel.get_cuda_rng_tracker().fork():
            inside = torch.rand(4).tolist()
        after = torch.rand(4).tolist()
        (chunk,) = model.build_chunks(config, model.transformer_config(config))
        weight = chunk.decoder.layers[0].mlp.linear_fc1.weight
        return {"before": before, "inside": inside, "after": after, "weight": float(weight.sum())}

    first, second = on_ranks(tmp_path, config, draw)
    assert first["before"] == second["before"]
    assert first["after"] == second["after"]
    assert first["inside"] != second["inside"]
    assert first["weight"] != second["weight"]
    assert len({str(first[key]) for key in ("before", "inside", "after")}) == 3
