"""Base configs: goldens, both ways through YAML, and keys that contradict each other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from syrupy.assertion import SnapshotAssertion

from hptool import catalogue, files
from hptool.base_config import BaseConfig
from hptool.candidates import Layout, Recompute, refusal
from hptool.errors import InputError
from hptool.facts import Cluster
from hptool.presets import Site
from tests.conftest import preset_config
from tests.test_facts import PROFILES


@pytest.mark.parametrize(
    ("model", "profile", "nodes"),
    [
        ("gpt3/126m", "dgx-a100", 8),
        ("gpt3/tiny", "local", 1),
        ("gpt3/gpt2_124m", "dgx-h100", 1),
        ("llama/llama3_8b", "dgx-h100", 16),
        ("mixtral/8x7b", "dgx-h100", 8),
        ("bert/0.11b", "dgx-a100", 8),
        ("t5/11b", "dgx-a100", 20),
    ],
)
def test_the_config_of_a_preset(model: str, profile: str, nodes: int, snapshot: SnapshotAssertion) -> None:
    site = Site(cluster=files.read_cluster(profile), num_nodes=nodes)
    assert catalogue.config_text(catalogue.preset(model), site, Layout()) == snapshot


@pytest.mark.parametrize("model", catalogue.preset_names())
def test_a_config_means_the_model_of_its_preset(model: str, dgx_a100: Cluster) -> None:
    config = preset_config(model, dgx_a100, 16)
    assert config.shape == catalogue.preset(model).shape
    assert config.trainer.devices == 8
    assert config.precision == "bf16"


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("model", ["gpt3/tiny", "llama/tiny", "mixtral/tiny", "bert/tiny", "t5/tiny"])
def test_a_toy_fits_every_profile(model: str, profile: str) -> None:
    cluster = files.read_cluster(profile)
    config = preset_config(model, cluster, cluster.nodes)
    assert config.trainer.devices == cluster.gpus_per_node
    assert config.precision == cluster.gpu.default_precision


@pytest.mark.parametrize("model", ["gpt3/tiny", "mixtral/tiny", "bert/tiny", "t5/tiny"])
def test_a_config_survives_its_way_through_yaml(model: str, local: Cluster) -> None:
    config = preset_config(model, local, 1)
    assert files.parse(files.parse_yaml(files.yaml_text(config.document()), "yaml"), BaseConfig, "yaml") == config


def test_both_stacks_of_an_encoder_decoder_are_recomputed_alike(local: Cluster) -> None:
    layout = Layout(pp=2, recompute=Recompute.BLOCK, recompute_num_layers=2)
    config = preset_config("t5/tiny", local, 1).with_layout(layout)
    assert config.layout == layout
    assert config.model.encoder is not None
    assert config.model.encoder.activations_checkpoint_num_layers == 2
    assert config.stack.activations_checkpoint_method == "block"
    assert config.model.activations_checkpoint_method is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"model__num_layers": "4"}, "model.num_layers: 4 given, allowed is nothing here: T5 has it in model.encoder"),
        ({"model__encoder__hidden_size": "64"}, "model.encoder.hidden_size: 64 given, allowed is as model.decoder"),
        ({"model__decoder__num_layers": "0"}, "model.decoder.num_layers: 0 given, allowed is 1 or more"),
        ({"model__data__seq_length_dec": "null"}, "model.data.seq_length_dec: None given, allowed is 1 or more"),
        ({"model__decoder": "null"}, "model.decoder: None given, allowed is given together with model.encoder"),
        ({"model__encoder__position_embedding_type": "rope"}, "allowed is as model.decoder.position_embedding_type"),
    ],
)
def test_a_wrong_encoder_decoder_is_told_by_key(override: dict[str, str], words: str, local: Cluster) -> None:
    with pytest.raises(InputError) as caught:
        preset_config("t5/tiny", local, 1, **override)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("model", "override", "words"),
    [
        ("mixtral/tiny", {"model__moe_router_topk": "5"}, "model.moe_router_topk: 5 given, allowed is 1 to 4"),
        ("llama/tiny", {"model__expert_model_parallel_size": "2"}, "allowed is 1 without experts"),
        ("llama/tiny", {"model__moe_ffn_hidden_size": "2"}, "allowed is null without model.num_moe_experts"),
        ("bert/tiny", {"model__position_embedding_type": "rope"}, "allowed is learned_absolute"),
        ("llama/tiny", {"model__seq_length": "64"}, "model.seq_length: 64 given, allowed is null but for T5"),
        ("gpt3/tiny", {"model__precision": "bf16"}, "allowed is null, or as trainer.precision (32)"),
    ],
)
def test_a_key_of_another_family_is_not_ignored(
    model: str, override: dict[str, str], words: str, local: Cluster
) -> None:
    with pytest.raises(InputError) as caught:
        preset_config(model, local, 1, **override)
    assert words in str(caught.value)


layouts = st.builds(
    Layout,
    tp=st.sampled_from([1, 2]),
    pp=st.sampled_from([1, 2, 4]),
    vpp=st.sampled_from([1, 2]),
    cp=st.sampled_from([1, 2]),
    mbs=st.sampled_from([1, 4]),
    recompute=st.sampled_from(Recompute),
    recompute_num_layers=st.just(0),
).map(
    lambda x: Layout(
        **{a: getattr(x, a) for a in ("tp", "pp", "vpp", "cp", "mbs", "recompute")},
        recompute_num_layers=2 if x.recompute.is_full else 0,
    )
)


@given(layout=layouts)
def test_a_layout_survives_the_way_through_nemos_keys_and_yaml(layout: Layout) -> None:
    config = preset_config("tiny", files.read_cluster("local"), 1).with_layout(layout)
    again = files.parse(files.parse_yaml(files.yaml_text(config.document()), "yaml"), BaseConfig, "yaml")
    assert again == config
    assert again.layout == layout


def test_interleaving_never_uses_batched_sends(local: Cluster) -> None:
    # Megatron computes garbage with them at PP=2, and says nothing.
    model = preset_config("tiny", local, 1).with_layout(Layout(pp=2, vpp=2)).model
    assert (model.overlap_p2p_comm, model.batch_p2p_comm) == (True, False)


def test_no_virtual_pipeline_survives_a_layout_without_one(local: Cluster) -> None:
    config = preset_config("tiny", local, 1).with_layout(Layout(pp=2, vpp=2)).with_layout(Layout())
    assert config.model.virtual_pipeline_model_parallel_size is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"model__hidden_size": "128.5"}, "model.hidden_size: 128.5 given, allowed is integer"),
        ({"model__num_layers": "0"}, "model.num_layers: 0 given, allowed is 1 or more"),
        ({"model__hiden_size": "128"}, "model.hiden_size: unknown key; did you mean hidden_size?"),
        ({"model__fp8": "true"}, "model.fp8: True given, allowed is false with trainer.precision 32"),
        ({"model__fp8_e4m3": "true", "model__fp8_hybrid": "true"}, "model.fp8_hybrid: True given, allowed is false"),
        ({"model__cp_comm_type": "p2p"}, "model.cp_comm_type: 'p2p' given, allowed is 'all_gather' or 'a2a'"),
        ({"model__normalization": "batchnorm"}, "allowed is 'layernorm' or 'rmsnorm'"),
        ({"trainer__precision": "fp64"}, "trainer.precision: 'fp64' given, allowed is 'bf16'"),
        ({"model__data__seq_length": "64"}, "model.data.seq_length: 64 given, allowed is the value of model.encoder"),
        ({"model__num_attention_heads": "7"}, "a divisor of model.hidden_size (128)"),
        ({"model__hidden_dropout": "1.0"}, "allowed is 0 <= x < 1"),
        ({"model__activations_checkpoint_num_layers": "2"}, "null unless activations_checkpoint_granularity is full"),
    ],
)
def test_a_config_that_cannot_hold_is_one_clear_error(override: dict[str, str], words: str, local: Cluster) -> None:
    with pytest.raises(InputError) as caught:
        preset_config("tiny", local, 1, **override)
    assert words in str(caught.value)
    assert len(caught.value.problems) == 1


def test_all_mistakes_are_told_at_once(local: Cluster) -> None:
    with pytest.raises(InputError) as caught:
        preset_config("tiny", local, 1, model__hidden_size="x", trainer__devices="y", model__bios="true")
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("days", "slurm", "lightning"), [(0.02, "0-00:28:48", "00:00:14:24"), (2, "2-00:00:00", "01:23:30:00")]
)
def test_time_limits_are_never_negative(days: float, slurm: str, lightning: str, local: Cluster) -> None:
    site = Site(cluster=local, num_nodes=1, time_limit_days=days)
    text = catalogue.config_text(catalogue.preset("gpt3/tiny"), site, Layout())
    config = files.parse(files.parse_yaml(text, "tiny"), BaseConfig, "tiny")
    assert (config.run.time_limit, config.trainer.max_time) == (slurm, lightning)


def test_the_template_itself_holds_a_layout_that_can_start(local: Cluster) -> None:
    config = preset_config("tiny", local, 1)
    assert refusal(config.layout, config.workload) is None
