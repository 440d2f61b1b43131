"""No key of a config is ignored by oversight: the code reads it, or only one value is allowed, or it is listed here."""

import ast
import dataclasses
import typing
from typing import Any

import pytest

from hptool import nemo_keys
from tests.conftest import ROOT

SECTIONS = (
    nemo_keys.RunSection,
    nemo_keys.TrainerSection,
    nemo_keys.SchedSection,
    nemo_keys.OptimSection,
    nemo_keys.DataSection,
    nemo_keys.StackSection,
    nemo_keys.ModelSection,
)

#: Keys that are kept and change neither throughput nor memory nor what is learnt, and why.
WITHOUT_EFFECT = {
    "results_dir": "NeMo's launcher; hptool has --results",
    "dependency": "NeMo's launcher",
    "preprocessed_dir": "NeMo's launcher",
    "blending_alpha": "NeMo's launcher, which writes it into data_prefix as weights",
    "logger": "Lightning's",
    "use_distributed_sampler": "Lightning's; a sample is named by its number here",
    "max_epochs": "max_steps ends a training",
    "limit_test_batches": "there is no test set",
    "benchmark": "cuDNN's choice of convolutions, of which there are none",
    "enable_model_summary": "Lightning's",
    "num_sanity_val_steps": "Lightning's",
    "skip_warmup": "pages of the data are never read ahead",
    "num_workers": "samples are read before a step's clock starts",
    "index_mapping_dir": "there are no index files",
    "validation_drop_last": "validation batches are whole",
    "shuffle_documents": "samples are shuffled",
    "respect_document_boundaries": "samples are cut from the file",
    "persist_layer_norm": "a kernel of Apex; torch's norm is fused too",
    "relative_attention_num_buckets": "of relative positions, which are refused",
    "relative_attention_max_distance": "of relative positions, which are refused",
    "relative_position_bias_self_attention_only": "of relative positions, which are refused",
    "mcore_customization_config": "a section whose keys allow one value each",
    "get_attention_mask_from_fusion": "no mask is made",
    "fp8_interval": "Transformer Engine works out its scales in every step since 1.8",
    "cross_entropy_loss_fusion": "the loss is fused whatever is asked for, and rounds nothing by it",
    "native_amp_init_scale": "fp16 is refused",
    "native_amp_growth_interval": "fp16 is refused",
    "hysteresis": "fp16 is refused",
    "grad_allreduce_chunk_size_mb": "of gradients without the distributed optimizer; bucket_cap_mb is its word",
    "gradient_as_bucket_view": "torch's data parallelism; Megatron's gradients always are",
    "apex_transformer_log_level": "how much Apex says",
}


def words_of_the_code() -> set[str]:
    """Attributes and names in quotes that the product uses, but for the module that declares the keys."""
    found = set()
    for path in (ROOT / "hptool").rglob("*.py"):
        if path.name == "nemo_keys.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def allows_one_value(hint: Any) -> bool:
    """A Literal of one value, with or without None, or None alone."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return len(parts) == 1
    return hint is type(None) or (bool(parts) and all(allows_one_value(part) for part in parts))


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_is_read_or_refused_or_known_to_have_no_effect(section: type) -> None:
    hints = typing.get_type_hints(section)
    words = words_of_the_code()
    # `warmup_ratio` and the like are read by the sections' own methods.
    own = {
        node.attr
        for node in ast.walk(ast.parse((ROOT / "hptool/nemo_keys.py").read_text()))
        if isinstance(node, ast.Attribute)
    }
    for key in (f.name for f in dataclasses.fields(section)):
        assert key in words | own or allows_one_value(hints[key]) or key in WITHOUT_EFFECT, key


def test_the_list_of_keys_without_effect_is_not_stale() -> None:
    keys = {f.name for section in SECTIONS for f in dataclasses.fields(section)}
    assert set(WITHOUT_EFFECT) <= keys
