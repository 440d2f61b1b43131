"""Facts: parameter counts against published ones, and every shipped file."""

import pytest

from hptool import files
from hptool.base_config import Preset
from hptool.facts import GpuSpec, ModelShape
from tests.conftest import preset_config

GPUS = sorted(p.stem for p in (files.data_directory("cluster") / "gpus").glob("*.yaml"))
PROFILES = sorted(p.stem for p in files.data_directory("cluster").glob("*.yaml"))
PRESETS = sorted(p.stem for p in (files.data_directory("base_configs") / "gpt3").glob("*.yaml"))


def shape(**changes: int | bool) -> ModelShape:
    """GPT-3 175B (Brown et al. 2020, table 2.1), with changes."""
    values: dict[str, int | bool] = {
        "num_layers": 96,
        "hidden_size": 12288,
        "ffn_hidden_size": 49152,
        "num_attention_heads": 96,
        "num_query_groups": 96,
        "kv_channels": 128,
        "seq_length": 2048,
        "max_position_embeddings": 2048,
        "vocab_size": 51200,
        "tied_embeddings": True,
        "has_bias": True,
    }
    return ModelShape(**(values | changes))  # type: ignore[arg-type]


def test_gpt3_has_its_published_number_of_parameters() -> None:
    # Narayanan et al. 2021 (arXiv:2104.04473), equation 2, gives 174.6 billion for this shape.
    assert shape().num_parameters / 1e9 == pytest.approx(174.6, abs=0.05)


def test_gpt2_has_its_published_number_of_parameters() -> None:
    gpt2 = shape(
        num_layers=12,
        hidden_size=768,
        ffn_hidden_size=3072,
        num_attention_heads=12,
        num_query_groups=12,
        kv_channels=64,
        seq_length=1024,
        max_position_embeddings=1024,
        vocab_size=50257,
    )
    assert gpt2.num_parameters == 124_439_808  # the released checkpoint


def test_untied_embeddings_cost_one_vocabulary_more() -> None:
    assert shape(tied_embeddings=False).num_parameters - shape().num_parameters == 51200 * 12288


@pytest.mark.parametrize(("tp", "padded"), [(1, 50304), (2, 50432), (8, 51200)])
def test_vocabulary_is_padded_as_megatron_pads_it(tp: int, padded: int) -> None:
    assert shape(vocab_size=50257).padded_vocab_size(tp) == padded


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_about_the_size_of_its_name(name: str) -> None:
    size = {"tiny": 0.9e6, "126m": 126e6, "843m": 843e6}.get(name) or float(name.removesuffix("b")) * 1e9
    config = preset_config(name, files.read_cluster("dgx-a100"), 1)
    assert config.shape.num_parameters == pytest.approx(size, rel=0.04)
    preset = files.read(files.data_directory("base_configs") / "gpt3" / f"{name}.yaml", Preset)
    assert preset.name == f"gpt3_{name}"


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_file_is_sound_and_says_its_source(name: str) -> None:
    spec = files.read_gpu(name, "test")
    assert spec.name == name
    assert len(spec.source) > 40
    for alias in spec.aliases:
        assert files.read_gpu(alias, "test") == spec


def test_no_name_means_two_gpus() -> None:
    specs = [files.read(p, GpuSpec) for p in (files.data_directory("cluster") / "gpus").glob("*.yaml")]
    names = [name for spec in specs for name in (spec.name, *spec.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_reads_under_its_own_name(name: str) -> None:
    assert files.read_cluster(name).name == name
