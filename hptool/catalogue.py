"""The models that `--model` names: presets, other sizes of their families, and the texts of their configs."""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hptool import files
from hptool.candidates import Layout
from hptool.errors import InputError
from hptool.presets import Family, Preset, Site, custom_preset, parameters_of_size, render


@functools.cache
def families() -> Mapping[str, Family]:
    """The families of `base_configs/recipes.yaml`."""
    path = _directory() / "recipes.yaml"
    document = files.read_yaml(path)
    return {name: files.parse(entry, Family, f"{path}: {name}") for name, entry in document.items()}


def preset_names() -> list[str]:
    """All presets as `--model` takes them, sorted."""
    return sorted(str(p.relative_to(_directory()).with_suffix("")) for p in _directory().glob("*/*.yaml"))


def presets(family: str) -> dict[str, Preset]:
    """The presets of a family by what `--model` calls them, from the smallest; toys too."""
    names = [name for name in preset_names() if name.startswith(f"{family}/")]
    if not names:
        raise InputError(f"--family: unknown family {family!r}; {files.nearest(family, sorted(families()))}")
    read = {name: _read(name) for name in names}
    return dict(sorted(read.items(), key=lambda item: item[1].shape.num_parameters))


def preset(model: str) -> Preset:
    """What `gpt3/5b` names, by its file, one of its aliases or its size, or else a model of that size.

    `gpt3/5b_seq8192` has another sequence length and keeps the tokens of a batch. InputError where the name stands
    for nothing.
    """
    match = re.fullmatch(r"(.+)_seq([1-9][0-9]{0,8})", model)
    if match and model not in preset_names():
        return _with_seq_length(preset(match[1]), int(match[2]))
    return _read(model) if model in preset_names() else _by_size(model)


def remark(model: str) -> str | None:
    """What a user should hear of a model that is no preset: it may be a slip. None for a preset or a file."""
    if model.endswith((".yaml", ".yml")):
        return None
    found = preset(re.sub(r"_seq[0-9]+$", "", model))
    known = presets(found.family)
    if found in known.values():
        return None
    shape = found.shape
    near = min(known, key=lambda name: _apart(known[name], shape.num_parameters))
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tied_embeddings else 2) / shape.num_parameters
    mostly = f"; {embeddings:.0%} of them are embeddings" if embeddings > _MANY_EMBEDDINGS else ""
    return (
        f"{model} is no preset (the nearest is {near}): {shape.pipeline_layers} layers of {shape.hidden_size}, "
        f"{shape.num_parameters / 1e9:.3g}B parameters, by the family's rule{mostly}"
    )


#: Above this part a model is a table of words more than a network: worth a word.
_MANY_EMBEDDINGS = 0.5


def config_text(found: Preset, site: Site, layout: Layout) -> str:
    """The config of a preset as commented YAML."""
    templates = {path.name: files.read_text(path) for path in _directory().glob("*.yaml.j2")}
    return render(templates, found, site, layout)


def _directory() -> Path:
    return files.data_directory("base_configs")


@functools.cache
def _read(name: str) -> Preset:
    path = _directory() / f"{name}.yaml"
    defaults = families()[name.partition("/")[0]].defaults
    return files.parse({**defaults, **files.read_yaml(path)}, Preset, str(path))


def _by_size(model: str) -> Preset:
    family_name, _, size = model.partition("/")
    if model in families():
        names = ", ".join(name for name, found in presets(model).items() if not found.toy)
        raise InputError(f"{model}: is a family; allowed are {names}, or a size such as {model}/3b")
    if family_name not in families():
        raise InputError(f"{model}: unknown model preset; {files.nearest(model, preset_names())} {_OR_A_FILE}")
    if size == "unknown_size":
        raise InputError(f"{model}: no size; `hptool recommend --family {family_name}` says which fits a budget")
    known = presets(family_name)
    for found in known.values():
        if size in found.aliases or _names_size(found, size):
            return found
    parameters = parameters_of_size(size)
    if parameters is None:
        raise InputError(
            f"{model}: unknown model preset; {files.nearest(model, list(known))} "
            f"(or a size such as {family_name}/6.7b, {_OR_A_FILE.strip('()')})"
        )
    usual = min((p for p in known.values() if not p.toy), key=lambda p: _apart(p, parameters))
    # What one preset has and its family has not is no rule for other sizes; its nodes and days are as good as any.
    family = families()[family_name]
    plain = {
        **family.defaults,
        "family": family_name,
        "name": family_name,
        "source": family.source,
        "num_layers": 1,
        **{key: getattr(usual, key) for key in ("hidden_size", "ffn_hidden_size", "num_attention_heads")},
        "global_batch_size": usual.global_batch_size,
        "lr": usual.lr,
        "time_limit_days": usual.time_limit_days,
        "num_nodes": usual.num_nodes,
    }
    defaults = files.parse(plain, Preset, f"{family_name} in recipes.yaml")
    return custom_preset(size, family, parameters, defaults)


#: What else `--model` takes.
_OR_A_FILE = "(or give the path of a .yaml file)"


def _apart(one: Preset, parameters: float) -> float:
    """How far a size is from a preset, the same for twice and for half of it."""
    return abs(math.log(one.shape.num_parameters / max(1.0, parameters)))


def _names_size(found: Preset, size: str) -> bool:
    """`0.126b` is what `126m` is."""
    name = found.name.removeprefix(f"{found.family}_")
    own, wanted = parameters_of_size(name), parameters_of_size(size)
    return own is not None and wanted is not None and math.isclose(own, wanted)


def _with_seq_length(found: Preset, seq_length: int) -> Preset:
    """As many tokens a batch, in sequences that powers of two of replicas and micro batches share."""
    sequences = found.global_batch_size * found.seq_length / seq_length
    step = 1
    while 16 * step <= sequences:
        step *= 2
    return replace(
        found,
        name=f"{found.name}_seq{seq_length}",
        seq_length=seq_length,
        global_batch_size=max(1, round(sequences / step)) * step,
    )
