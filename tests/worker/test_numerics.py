"""Every layout trains the same model: from the same weights and samples it must see the same losses."""

import itertools
import math
from typing import Any

import pytest

from tests.worker.runs import FAMILIES, Launcher, tiny_family

#: Adding up in another order has cost at most 1.3e-7 in fp32. What the norms' gradients lack where their sum over the
#: tensor group is forgotten costs 1e-4.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process with everything on one rank."""
    return list(Launcher(tmp_path_factory.mktemp("one")).run().losses)


def layout(devices: int, **model: Any) -> dict[str, Any]:
    """Changes to the tiny config."""
    return {"trainer__devices": devices, **{f"model__{key}": value for key, value in model.items()}}


TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
FULL = {"activations_checkpoint_granularity": "full"}

LAYOUTS = {
    "tp2-sp": layout(2, **TP2),
    "tp2-no-sp": layout(2, **TP2, sequence_parallel=False),
    "pp2": layout(2, **PP2),
    "pp2-unbatched": layout(2, **PP2, batch_p2p_comm=False),
    "pp2-synchronised": layout(2, **PP2, sync_batch_comm=True),
    "tp2-pp2": layout(4, **TP2, **PP2),
    "pp2-vpp2": layout(2, **PP2, virtual_pipeline_model_parallel_size=2),
    "dp2": layout(2),
    "dp2-overlap": layout(2, optim__overlap_grad_sync=True, optim__overlap_param_sync=True),
    "dp2-divide-first": layout(2, grad_div_ar_fusion=False),
    "dp2-mbs1": layout(2, micro_batch_size=1),
    "dp2-pp2-vpp2-overlap": layout(
        4,
        **PP2,
        virtual_pipeline_model_parallel_size=2,
        optim__overlap_grad_sync=True,
        optim__overlap_param_sync=True,
    ),
    "cp2": layout(2, **CP2),
    "tp2-cp2": layout(4, **TP2, **CP2),
    "cp2-a2a": layout(2, **CP2, cp_comm_type="a2a"),
    "tp2-cp2-a2a": layout(4, **TP2, **CP2, cp_comm_type="a2a"),
    "selective": layout(1, activations_checkpoint_granularity="selective"),
    "uniform-1": layout(1, **FULL, activations_checkpoint_method="uniform", activations_checkpoint_num_layers=1),
    "uniform-2": layout(1, **FULL, activations_checkpoint_method="uniform", activations_checkpoint_num_layers=2),
    "block-1": layout(1, **FULL, activations_checkpoint_method="block", activations_checkpoint_num_layers=1),
    "dot-product": layout(1, use_flash_attention=False),
    "dot-product-tp2": layout(2, **TP2, use_flash_attention=False),
    "query-key-layer-scaling": layout(1, apply_query_key_layer_scaling=True),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_equal_those_of_one_process(name: str, launcher: Launcher, one_process: list[float]) -> None:
    assert list(launcher.run(**LAYOUTS[name]).losses) == pytest.approx(one_process, rel=TOLERANCE)


def stacks(**keys: Any) -> dict[str, Any]:
    """Changes to both of T5's stacks."""
    return {f"model__{part}__{key}": value for part in ("encoder", "decoder") for key, value in keys.items()}


VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
ALLGATHER = {"moe_token_dispatcher_type": "allgather"}
OVERLAP = {"optim__overlap_grad_sync": True, "optim__overlap_param_sync": True}
UNIFORM = {**FULL, "activations_checkpoint_method": "uniform", "activations_checkpoint_num_layers": 1}
BLOCK = {**FULL, "activations_checkpoint_method": "block", "activations_checkpoint_num_layers": 1}

#: Enough for a wrong gradient to have gone through Adam and into the loss.
SHORT = {"trainer__max_steps": 3}

#: What each family adds to what GPT has shown above: its own layers cut, pipelined, recomputed.
FAMILY_LAYOUTS: dict[tuple[str, str], dict[str, Any]] = {
    ("llama", "tp2-pp2"): layout(4, **TP2, **PP2),
    ("llama", "tp2-no-sp"): layout(2, **TP2, sequence_parallel=False),
    ("llama", "pp2-vpp2"): layout(2, **VPP2),
    ("llama", "cp2"): layout(2, **CP2),
    ("llama", "uniform"): layout(1, **UNIFORM),
    ("gemma", "tp2-pp2"): layout(4, **TP2, **PP2),
    ("gemma", "cp2"): layout(2, **CP2),
    ("alibi", "tp2-pp2"): layout(4, **TP2, **PP2),
    ("alibi", "selective"): layout(1, activations_checkpoint_granularity="selective"),
    ("bert", "tp2-pp2"): layout(4, **TP2, **PP2),
    ("bert", "tp2-no-sp"): layout(2, **TP2, sequence_parallel=False),
    ("bert", "pp2-vpp2"): layout(2, **VPP2),
    ("bert", "dp2-mbs1"): layout(2, micro_batch_size=1),
    ("bert", "block"): layout(1, **BLOCK),
    ("t5", "tp2-pp2"): layout(4, **TP2, **PP2),
    ("t5", "pp2"): layout(2, **PP2),
    ("t5", "pp2-vpp2"): layout(2, **VPP2),
    ("t5", "pp4"): layout(4, pipeline_model_parallel_size=4),
    ("t5", "dp2-mbs1-overlap"): layout(2, micro_batch_size=1, **OVERLAP),
    ("t5", "uniform"): layout(1) | stacks(**UNIFORM),
    ("t5", "pp2-selective"): layout(2, **PP2) | stacks(activations_checkpoint_granularity="selective"),
    ("t5", "block-5"): layout(1) | stacks(**(BLOCK | {"activations_checkpoint_num_layers": 5})),
    ("t5", "dot-product"): layout(1, use_flash_attention=False),
    ("moe", "tp2"): layout(2, **TP2),
    ("moe", "dp2"): layout(2),
    ("moe", "ep2"): layout(2, **EP2),
    ("moe", "ep2-allgather"): layout(2, **EP2, **ALLGATHER),
    ("moe", "ep2-divide-first"): layout(2, **EP2, grad_div_ar_fusion=False, **OVERLAP),
    ("moe", "tp2-ep2"): layout(4, **TP2, **EP2),
    ("moe", "pp2-vpp2-ep2"): layout(4, **VPP2, **EP2),
    ("moe", "cp2-ep2"): layout(2, **CP2, **EP2),
    ("moe", "uniform"): layout(1, **UNIFORM),
}


@pytest.fixture(scope="module")
def whole_family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of one process, by family."""
    launcher = Launcher(tmp_path_factory.mktemp("families"))
    return {family: list(launcher.run(**tiny_family(family, **SHORT)).losses) for family in FAMILIES}


@pytest.mark.parametrize(("family", "name"), FAMILY_LAYOUTS)
def test_losses_of_every_family_equal_those_of_one_process(
    family: str, name: str, launcher: Launcher, whole_family: dict[str, list[float]]
) -> None:
    losses = list(launcher.run(**tiny_family(family, **SHORT, **FAMILY_LAYOUTS[family, name])).losses)
    assert losses == pytest.approx(whole_family[family], rel=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_another_model(family: str, whole_family: dict[str, list[float]]) -> None:
    losses = whole_family[family]
    others = [other[-1] for name, other in whole_family.items() if name != family]
    assert all(abs(losses[-1] - other) > 1e-4 for other in others)
    assert losses[-1] != losses[0]
    # Untrained it guesses: of 500 words, and BERT of two orders.
    assert losses[0] == pytest.approx(math.log(500) + (family == "bert") * math.log(2), abs=0.1)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"model__qkv_bias": True}),
        ("llama", {"model__rotary_percentage": 0.5, "model__rotary_interleaved": True}),
        ("llama", {"model__activation": "squared-relu"}),
        ("llama", {"model__seq_len_interpolation_factor": 2.0, "model__rotary_base": 100.0}),
        ("bert", {"model__bert_binary_head": False, "model__share_embeddings_and_output_weights": False}),
        ("t5", {"model__encoder__num_layers": 2, "model__decoder__num_layers": 6}),
        ("moe", {"model__moe_shared_expert_intermediate_size": 32, "model__moe_router_topk": 1}),
    ],
    ids=str,
)
def test_other_members_do_not_depend_on_the_layout_either(
    launcher: Launcher, whole_family: dict[str, list[float]], family: str, changes: dict[str, Any]
) -> None:
    whole = launcher.run(**tiny_family(family, **SHORT, **changes))
    cut = launcher.run(**tiny_family(family, **SHORT, **layout(4, **TP2, **PP2), **changes))
    assert list(cut.losses) == pytest.approx(list(whole.losses), rel=TOLERANCE)
    assert list(cut.losses) != pytest.approx(whole_family[family], rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_in_bf16(launcher: Launcher, whole_family: dict[str, list[float]], family: str) -> None:
    losses = list(launcher.run(**tiny_family(family, trainer__precision="bf16", trainer__max_steps=2)).losses)
    assert losses == pytest.approx(whole_family[family][:2], rel=1e-2)


def test_nemos_key_of_a_fused_loss_changes_nothing(launcher: Launcher, one_process: list[float]) -> None:
    losses = list(launcher.run(**layout(2, **TP2, cross_entropy_loss_fusion=False)).losses)
    assert losses == pytest.approx(one_process, rel=TOLERANCE)


def test_losses_fall(one_process: list[float]) -> None:
    assert len(one_process) == 5
    assert all(abs(a - b) > 1e-3 * a for a, b in itertools.pairwise(one_process))
    assert one_process[-1] < one_process[0] - 0.05


@pytest.mark.parametrize("changes", [layout(1), layout(2, **TP2), layout(2, **CP2)], ids=["one", "tp2", "cp2"])
def test_bf16_trains_as_fp32_does(launcher: Launcher, one_process: list[float], changes: dict[str, Any]) -> None:
    run = launcher.run(trainer__precision="bf16", **changes)
    assert run.precision == "bf16"
    # Eight bits of mantissa: near the fp32 losses, but not the same.
    assert list(run.losses) == pytest.approx(one_process, rel=3e-3)
    assert list(run.losses) != pytest.approx(one_process, rel=1e-7)


def test_dropout_changes_the_losses(launcher: Launcher, one_process: list[float]) -> None:
    run = launcher.run(model__hidden_dropout=0.1, model__attention_dropout=0.1)
    assert list(run.losses) != pytest.approx(one_process, rel=TOLERANCE)
    recomputed = launcher.run(
        model__hidden_dropout=0.1,
        model__attention_dropout=0.1,
        model__activations_checkpoint_granularity="full",
        model__activations_checkpoint_method="uniform",
    )
    # Recomputation must drop what the forward pass dropped.
    assert list(recomputed.losses) == pytest.approx(list(run.losses), rel=TOLERANCE)


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer__gradient_clip_val": 0.0},
        {"model__share_embeddings_and_output_weights": False},
        {"model__bias": False},
        {"model__num_query_groups": 2},
        {"model__use_cpu_initialization": True},
        {"model__bias_dropout_add_fusion": False, "model__bias_activation_fusion": False},
        {"model__gc_interval": 1},
    ],
    ids=str,
)
def test_other_models_do_not_depend_on_the_layout_either(launcher: Launcher, changes: dict[str, Any]) -> None:
    whole = launcher.run(**changes)
    cut = launcher.run(**layout(4, **TP2, **PP2), **changes)
    assert list(cut.losses) == pytest.approx(list(whole.losses), rel=TOLERANCE)
