"""Base configs: goldens, both ways through YAML, and keys that contradict each other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from syrupy.assertion import SnapshotAssertion

from hptool import files
from hptool.base_config import BaseConfig
from hptool.candidates import Layout, Recompute, refusal
from hptool.errors import InputError
from hptool.facts import Cluster
from hptool.presets import Preset, render
from tests.conftest import preset_config
from tests.test_facts import PRESETS, PROFILES


@pytest.mark.parametrize(("preset", "profile", "nodes"), [("126m", "dgx-a100", 8), ("tiny", "local", 1)])
def test_the_config_of_a_preset(preset: str, profile: str, nodes: int, snapshot: SnapshotAssertion) -> None:
    directory = files.data_directory("base_configs")
    text = render(
        (directory / "gpt3.yaml.j2").read_text(),
        files.read(directory / "gpt3" / f"{preset}.yaml", Preset),
        files.read_cluster(profile),
        nodes,
    )
    assert text == snapshot


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("profile", PROFILES)
def test_every_preset_fits_every_profile(preset: str, profile: str) -> None:
    cluster = files.read_cluster(profile)
    config = preset_config(preset, cluster, cluster.nodes)
    assert config.trainer.devices == cluster.gpus_per_node
    assert config.precision == cluster.gpu.default_precision


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
        ({"model__fp8": "true"}, "model.fp8: True given, allowed is False"),
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
    directory = files.data_directory("base_configs")
    document = {**files.read_yaml(directory / "gpt3" / "tiny.yaml"), "time_limit_days": days}
    text = render((directory / "gpt3.yaml.j2").read_text(), files.parse(document, Preset, "tiny"), local, 1)
    config = files.parse(files.parse_yaml(text, "tiny"), BaseConfig, "tiny")
    assert (config.run.time_limit, config.trainer.max_time) == (slurm, lightning)


def test_the_template_itself_holds_a_layout_that_can_start(local: Cluster) -> None:
    config = preset_config("tiny", local, 1)
    assert refusal(config.layout, config.workload) is None
