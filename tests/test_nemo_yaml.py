"""Configs that users of the predecessor have: read as they are, and what is not granted is refused by name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hptool import files
from hptool.base_config import BaseConfig
from hptool.errors import InputError
from hptool.plan import SearchRequest, make_plan
from tests.conftest import ROOT

KEYS = ROOT.parent / "shared" / "facts" / "base_config_keys.yaml"
COPIES = ROOT / "tests" / "data" / "nemo"


def recipes() -> Iterator[tuple[str, dict[str, Any]]]:
    """The predecessor's 18 base configs by the keys that they have; three of them where that list is not at hand."""
    if not KEYS.is_file():
        yield from ((path.stem, files.read_yaml(path)) for path in sorted(COPIES.glob("*.yaml")))
        return
    facts = files.read_yaml(KEYS)
    for name in facts["files"]:
        document: dict[str, Any] = {}
        for keys in facts["sections"].values():
            for key, entry in keys.items():
                absent = name in entry.get("missing_in", ()) or name not in entry.get("only_in", (name,))
                if not absent:
                    value = entry.get("all", entry.get("value", entry.get("default")))
                    document = files.with_value(document, key.split("."), entry.get("except", {}).get(name, value))
        yield name, document


RECIPES = dict(recipes())

#: What hptool does not grant of them.
REFUSED = {
    "baichuan2_7b": "model.optim.grad_sync_dtype: 'bf16' given, allowed is 'fp32'",
    "baichuan2_13b": "model.optim.grad_sync_dtype: 'bf16' given, allowed is 'fp32'",
    "llama3_70b": "model.ub_tp_comm_overlap: True given, allowed is False",
}

#: Their tokenizers are files that are not here, so the user has to say how many entries they have.
VOCABULARIES = {
    "llama2_7b": 32000,
    "llama2_13b": 32000,
    "llama2_70b": 32000,
    "llama3_8b": 128256,
    "mixtral_3b": 32000,
    "mixtral_7b": 32000,
    "mt5": 250000,
}


def read(name: str, directory: Path, *overrides: str) -> BaseConfig:
    """The config as a user's file."""
    path = directory / f"{name}.yaml"
    path.write_text(files.yaml_text(RECIPES[name]))
    document = files.apply_overrides(files.read_config_yaml(path), overrides, "override")
    return files.parse(document, BaseConfig, name)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_reads_as_it_is_or_says_what_it_lacks(name: str, tmp_path: Path) -> None:
    if name in REFUSED:
        with pytest.raises(InputError) as caught:
            read(name, tmp_path)
        assert caught.value.problems == (f"{name}: {REFUSED[name]}",)
        return
    if name in VOCABULARIES:
        with pytest.raises(InputError, match=r"model\.override_vocab_size: required key is missing"):
            read(name, tmp_path)
    vocabulary = [f"model.override_vocab_size={VOCABULARIES[name]}"] if name in VOCABULARIES else []
    config = read(name, tmp_path, *vocabulary)
    again = files.parse(files.parse_yaml(files.yaml_text(config.document()), "yaml"), BaseConfig, "yaml")
    assert again == config


def test_interpolations_are_worked_out(tmp_path: Path) -> None:
    config = read("gpt3", tmp_path)
    assert config.model.ffn_hidden_size == 4 * 768  # ${multiply:4, ${.hidden_size}}
    assert config.model.optim.bucket_cap_mb == 125  # ${training.model.grad_allreduce_chunk_size_mb}
    assert config.run.results_dir == "${base_results_dir}/${.name}"  # the launcher's, of which the file knows nothing
    assert config.model.tokenizer["vocab_file"] == "${data_dir}/bpe/vocab.json"


def test_an_interpolation_that_cannot_be_worked_out_is_refused_where_a_number_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(files.yaml_text(files.with_value(RECIPES["gpt3"], ["model", "num_layers"], "${layers}")))
    with pytest.raises(InputError, match=r"model\.num_layers: '\$\{layers\}' given"):
        files.parse(files.read_config_yaml(path), BaseConfig, "c")


@pytest.mark.parametrize("name", [name for name in ("gpt3", "t5", "llama2_70b", "mixtral_7b") if name in RECIPES])
def test_a_recipe_is_planned_as_a_model(name: str, tmp_path: Path) -> None:
    read(name, tmp_path, f"model.override_vocab_size={VOCABULARIES.get(name, 51200)}")
    needs = ["gradient_accumulation_fusion", "apply_rope_fusion", "moe_grouped_gemm"]  # of Apex and Transformer Engine
    request = SearchRequest(
        model=str(tmp_path / f"{name}.yaml"),
        cluster="dgx-a100",
        nodes=8,
        overrides=[
            f"model.override_vocab_size={VOCABULARIES.get(name, 51200)}",
            "model.data.data_prefix=null",  # of ${data_dir}, which is the launcher's
            *(f"model.{key}=false" for key in needs if key in RECIPES[name]["model"]),
        ],
    )
    plan = make_plan(request)
    assert plan.config.shape == read(name, tmp_path, *request.overrides).shape
    assert plan.predictions.p_fit[plan.predictions.ranking()[0]] > 0.5
