"""The model is the one that the config describes, cut as the layout says."""

from pathlib import Path
from typing import Any

import pytest

from hptool.base_config import BaseConfig
from tests.worker.runs import on_ranks, tiny_config

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
    ],
    ids=str,
)
def test_parameters_are_those_of_the_shape(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    (rank,) = on_ranks(tmp_path, config, lambda: built(config))
    copies = 1 if config.shape.tied_embeddings else 2
    padding = (config.shape.padded_vocab_size(1) - config.shape.vocab_size) * config.shape.hidden_size * copies
    assert padding > 0
    assert count(rank["parameters"]) - padding == config.shape.num_parameters


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
