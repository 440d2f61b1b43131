"""Every layout trains the same model: from the same weights and samples it must see the same losses."""

import itertools
from typing import Any

import pytest

from tests.worker.runs import Launcher

#: Adding up in another order has cost at most 1.3e-7 in fp32. What the norms' gradients lack where their sum over the
#: tensor group is forgotten costs 1e-4.
TOLERANCE = 1e-6

#: Megatron's fused cross entropy rounds its gradient to bf16, in fp32 training too.
BF16_GRADIENT_TOLERANCE = 1e-4


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


def test_fused_cross_entropy_is_near(launcher: Launcher, one_process: list[float]) -> None:
    losses = list(launcher.run(**layout(2, **TP2, cross_entropy_loss_fusion=True)).losses)
    assert losses == pytest.approx(one_process, rel=BF16_GRADIENT_TOLERANCE)


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
