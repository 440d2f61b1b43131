"""Presets and custom sizes: published numbers of parameters, the stated rule, and names that stand for nothing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hptool import catalogue, files
from hptool.errors import InputError
from hptool.presets import SIZE_TOLERANCE, fitting_batch, parameters_of_size, warmup_steps
from tests.conftest import ROOT

#: Parameters in billions as published, of the models' cards and papers.
PUBLISHED = {
    "gpt3/175b": 174.6,  # Narayanan et al. 2021 (arXiv 2104.04473), equation 2
    "gpt3/gpt2_124m": 0.1244,  # the released checkpoint
    "llama/llama2_7b": 6.74,  # Touvron et al. 2023, model card
    "llama/llama2_13b": 13.02,
    "llama/llama2_70b": 68.98,
    "llama/llama3_8b": 8.03,  # huggingface.co/meta-llama, safetensors
    "llama/llama3_70b": 70.55,
    "llama/llama3.1_405b": 405.85,
    "llama/llama3.2_1b": 1.236,
    "llama/llama3.2_3b": 3.213,
    "mistral/7b": 7.24,  # huggingface.co/mistralai, safetensors
    "mistral/nemo_12b": 12.25,
    "mixtral/8x7b": 46.7,
    "mixtral/8x22b": 140.6,
    "qwen2/qwen2_0.5b": 0.494,  # huggingface.co/Qwen, safetensors
    "qwen2/qwen2_1.5b": 1.544,
    "qwen2/qwen2_7b": 7.616,
    "qwen2/qwen2_72b": 72.71,
    "qwen2/4b": 3.95,
    "qwen2/7b": 7.72,
    "qwen2/14b": 14.17,
    "qwen2/72b": 72.29,
    "gemma/2b": 2.506,  # Gemma Team 2024, table 2, with embeddings
    "gemma/7b": 8.538,
    "baichuan2/7b": 7.506,  # huggingface.co/baichuan-inc
    "baichuan2/13b": 13.90,
    "chatglm/6b": 6.244,  # huggingface.co/THUDM/chatglm3-6b
    "t5/11b": 11.0,
    "bert/0.11b": 0.110,  # Devlin et al. 2018
    "bert/large": 0.3351,  # huggingface.co/google-bert/bert-large-uncased
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_parameters_are_the_published_ones(model: str) -> None:
    billions = catalogue.preset(model).shape.num_parameters / 1e9
    assert billions == pytest.approx(PUBLISHED[model], rel=0.001, abs=0.0006)


@pytest.mark.parametrize("model", catalogue.preset_names())
def test_a_preset_says_its_source_and_has_the_size_of_its_name(model: str) -> None:
    preset = catalogue.preset(model)
    assert len(preset.source) > 20
    assert preset.family == model.partition("/")[0]
    named = parameters_of_size(model.rpartition("/")[2].rpartition("_")[2])
    rounded = ("gemma", "baichuan2", "qwen2", "chatglm", "llama/llama3.2")  # as their authors named them
    if named is not None and not model.startswith(rounded):
        assert preset.shape.num_parameters == pytest.approx(named, rel=0.05)


#: Families that have a rule for other sizes, and the sizes it is asked for here.
SIZES = {
    "gpt3": (5e6, 1.1e12),
    "bert": (3e6, 250e9),
    "t5": (3e6, 250e9),
    "mt5": (30e6, 250e9),
    "llama": (5e6, 700e9),
    "mistral": (5e6, 700e9),
    "qwen2": (30e6, 700e9),
    "mixtral": (10e6, 800e9),
    "gemma": (100e6, 15e9),
    "baichuan2": (30e6, 30e9),
    "chatglm": (10e6, 12e9),
}


def test_every_family_has_a_rule() -> None:
    assert set(SIZES) == set(catalogue.families())


@settings(deadline=None)
@given(data=st.data(), family=st.sampled_from(sorted(SIZES)))
def test_a_custom_size_is_met_within_two_percent(data: st.DataObject, family: str) -> None:
    low, high = SIZES[family]
    millions = round(data.draw(st.floats(low, high)) / 1e6, 1)
    found = catalogue.preset(f"{family}/{millions}m")
    shape = found.shape
    assert shape.num_parameters == pytest.approx(millions * 1e6, rel=SIZE_TOLERANCE)
    assert shape.num_attention_heads % shape.num_query_groups == 0
    assert found.kv_channels is not None or shape.hidden_size % shape.num_attention_heads == 0
    if shape.num_parameters > 1e9:  # what every layout of a real model needs
        assert shape.hidden_size % 64 == 0
        assert shape.ffn_hidden_size % 128 == 0


@pytest.mark.parametrize(
    ("model", "layers", "hidden", "heads"),
    [
        # Brown et al. 2020, table 2.1: the rule finds GPT-3's own shapes.
        ("gpt3/0.35b", 24, 1024, 16),
        ("gpt3/6.7b", 32, 4096, 32),
        ("gpt3/13b", 40, 5120, 40),
        ("gpt3/175b", 96, 12288, 96),
    ],
)
def test_the_rule_knows_gpt3(model: str, layers: int, hidden: int, heads: int) -> None:
    shape = catalogue.preset(model).shape
    assert (shape.num_layers, shape.hidden_size, shape.num_attention_heads) == (layers, hidden, heads)


def test_a_size_is_found_whatever_its_unit() -> None:
    assert catalogue.preset("gpt3/0.126b") == catalogue.preset("gpt3/126m") == catalogue.preset("gpt3/126M")
    assert catalogue.preset("mixtral/7b").name == "mixtral_8x7b"  # the predecessor's name for it


def test_another_sequence_length_keeps_the_tokens_of_a_batch() -> None:
    usual, long = catalogue.preset("gpt3/20b"), catalogue.preset("gpt3/20b_seq8192")
    assert (usual.global_batch_size, long.global_batch_size) == (2048, 512)
    assert long.shape.max_position_embeddings == 8192


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("gpt4/5b", "gpt4/5b: unknown model preset"),
        ("gpt3/5c", "did you mean gpt3/5b?"),
        ("gpt3/unknown_size", "`hptool recommend --family gpt3` says"),
        ("gpt3/2000b", "sizes up to 1105b"),
        ("gpt3/0.001m", "allowed are sizes from 0.43m on"),
        ("gpt3/0b", "allowed are sizes from"),
        ("gpt3/-5b", "unknown model preset"),
    ],
)
def test_a_name_that_stands_for_nothing_is_one_clear_error(model: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        catalogue.preset(model)
    assert words in str(caught.value)
    assert len(caught.value.problems) == 1


@given(gbs=st.integers(1, 10**5), gpus=st.integers(1, 10**5))
def test_a_batch_that_fits_is_near_and_divides(gbs: int, gpus: int) -> None:
    fitting = fitting_batch(gbs, gpus)
    odd = gpus // (gpus & -gpus)
    assert fitting % odd == 0
    assert abs(fitting - gbs) <= max(odd, gbs / 8)


def test_the_batch_of_160_gpus() -> None:
    assert fitting_batch(2048, 160) == 1920
    assert fitting_batch(2048, 1024) == 2048


@pytest.mark.parametrize(("steps", "warmup"), [(71525, 1000), (150_000, 1500), (10**6, 2000), (3000, 300)])
def test_warm_up_is_one_percent_within_bounds(steps: int, warmup: int) -> None:
    assert warmup_steps(catalogue.preset("gpt3/5b"), steps) == warmup


def test_the_public_gpt2_reproduction_is_there() -> None:
    gpt2 = catalogue.preset("gpt3/gpt2_124m")
    assert (gpt2.lr, gpt2.global_batch_size * gpt2.seq_length, gpt2.warmup_steps) == (6e-4, 524_288, 715)


def test_a_model_that_is_no_preset_is_remarked_on() -> None:
    assert catalogue.remark("gpt3/126m") is None
    assert catalogue.remark("gpt3/0.126b") is None
    assert catalogue.remark("gpt3/126m_seq4096") is None
    assert catalogue.remark("mine.yaml") is None
    said = catalogue.remark("gpt3/125m")
    assert said is not None
    assert said.startswith("gpt3/125m is no preset (the nearest is gpt3/")


SEARCHES = ROOT.parent / "shared" / "facts" / "search_configs.yaml"


@pytest.mark.skipif(not SEARCHES.is_file(), reason="the list of the predecessor's searches is not at hand")
def test_every_search_of_the_predecessor_has_its_preset_under_its_name() -> None:
    searches = files.read_yaml(SEARCHES)
    sized = {name: entry for name, entry in searches.items() if entry["model_size_in_b"] is not None}
    assert len(searches) == 46
    for name, entry in sized.items():
        found = catalogue.preset(name)
        assert catalogue.remark(name) is None, name
        if name != "llama/llama2_7b_nemo":  # the same model on two nodes
            assert found.num_nodes == entry["num_nodes"], name
        assert found.time_limit_days == entry["max_training_days"], name
        assert found.tokens == entry["num_tokens_in_b"] * 10**9, name
        assert found.seq_length == entry["seq_length"], name
    for name in set(searches) - set(sized):
        with pytest.raises(InputError, match="hptool recommend"):
            catalogue.preset(name)
