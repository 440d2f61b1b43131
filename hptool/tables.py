"""Tables of runs as papers and trackers publish them: CSV rows to layouts and settings.

A row gives what it knows; the rest is a stated default (`DEFAULTS`). A row that cannot be predicted keeps its place,
with the reason. The text columns `gpu`, `framework` and `interconnect` are looked up in `cluster/`.
"""

import fnmatch
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from hptool import files
from hptool.candidates import AXES, IntColumn, Layouts, Recompute, Workload
from hptool.errors import InputError
from hptool.facts import Cluster, Framework, GpuSpec, Link, ModelShape, Network, Precision
from hptool.predict import stack
from hptool.predict.parts import take
from hptool.predict.setting import Setting

#: Columns without which nothing can be predicted.
REQUIRED = ("hidden", "layers", "heads", "seq", "gpu", "gbs")

#: What an empty cell (or a column that is not there) stands for.
DEFAULTS = {
    "family": "gpt3",
    "heads": "hidden / 128",
    "kv_heads": "heads",
    "ffn": "4·hidden, or 8/3·hidden rounded up to 256 with gated_mlp",
    "gated_mlp": "as the family",
    "vocab": "50257",
    "gpus": "nodes times the GPUs of a node, or what one replica needs if that is more",
    "nodes": "gpus over the GPUs of a node of that kind of GPU",
    "cp, ep": "1",
    "tp, pp, vpp, mbs, recompute": "the best predicted (dp narrows it)",
    "precision": "the usual one of the GPU",
    "framework": "megatron-core",
    "interconnect": "the links of the machine in which the GPU usually comes",
    "sequence_parallel, flash_attention, zero_stage_or_dist_opt": "as the framework",
}

#: GPT-2's vocabulary, of which most published GPT models are a padding.
_VOCABULARY = 50257

#: Tokens of a decoder beside an encoder of `seq` tokens, where a row does not say (T5's span corruption: 512 to 114,
#: padded to 128 by Megatron-LM's and NeMo's configs).
_DECODER_TOKENS = 128

#: Everything of a row but its layout. Rows that agree in these share one setting.
_SCENARIO = (
    "family model hidden layers heads kv_heads ffn gated_mlp vocab seq gpu interconnect nodes gpus gbs "
    "sequence_parallel precision precision_norm zero_stage_or_dist_opt flash_attention framework notes"
).split()
_LAYOUT = "tp pp vpp cp ep dp mbs recompute".split()
_WORDS = {"family", "model", "gpu", "interconnect", "precision", "precision_norm", "framework", "notes", "recompute"}
_WORDS |= {"zero_stage_or_dist_opt", "flash_attention"}

#: Values tried where a row leaves an axis open.
_OPEN_TP = (1, 2, 4, 8)
_OPEN_MBS = (1, 2, 4, 8, 16)
_MOST_OPEN_VPP = 12
_OPEN_BLOCKS = (0.25, 0.5)

_STAGE_OF_SHARDED_WEIGHTS = 3

Row = Mapping[Any, Any]


class RowError(ValueError):
    """Why a row cannot be predicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What rows with the same model, cluster and framework share."""

    work: Workload
    cluster: Cluster
    framework: Framework

    @property
    def stack(self) -> str:
        """Names hardware and software."""
        links = f"{self.cluster.intra_node.bandwidth_gb_per_s:g}+{self.cluster.inter_node.bandwidth_gb_per_s:g} GB/s"
        return f"{self.framework.name} on {self.cluster.gpu.name}, {links}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """The layouts of a table's rows: `row[i]` is the row number that layout i stands for, several where it is open.

    `rejection` has an entry for every row of the table, empty where there is a layout. `stack` names the GPU, the
    network and the framework of each layout: what calibrations are learned for.
    """

    layouts: Layouts
    setting: Setting
    row: IntColumn
    stack: Sequence[str]
    rejection: Sequence[str]


def read_table(path: Path, required: Sequence[str] = REQUIRED) -> pd.DataFrame:
    """A CSV file with at least the required columns and one row; InputError otherwise."""
    try:
        frame = pd.read_csv(path, low_memory=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a CSV table: {error}") from error
    missing = [column for column in required if column not in frame]
    if missing:
        hints = "; ".join(f"{column}: {files.nearest(column, sorted(map(str, frame.columns)))}" for column in missing)
        raise InputError(f"{path}: columns {', '.join(missing)} missing ({hints})")
    if frame.empty:
        raise InputError(f"{path}: no rows")
    return frame


def resolve(frame: pd.DataFrame) -> Rows:
    """The layouts and settings of a table's rows, with every default filled in."""
    facts = _Facts.read()
    frame = _with_gpus(frame, facts)
    columns = [column for column in _SCENARIO if column in frame]
    key = frame.groupby(columns, dropna=False, sort=False).ngroup().to_numpy()
    _, first = np.unique(key, return_index=True)
    scenarios = [_attempt(record, facts) for record in frame[columns].iloc[first].to_dict("records")]
    setting = stack([(s.work, s.cluster, s.framework) for s in scenarios if isinstance(s, Scenario)])
    entry = np.cumsum([isinstance(s, Scenario) for s in scenarios]) - 1
    rejection: list[str] = ["" if isinstance(s, Scenario) else s for s in (scenarios[k] for k in key)]
    table: list[tuple[int, ...]] = []
    row: list[int] = []
    for i, record in enumerate(frame[[column for column in _LAYOUT if column in frame]].to_dict("records")):
        if rejection[i]:
            continue
        try:
            found = list(_layouts(record, scenarios[key[i]]))
        except RowError as error:
            rejection[i] = str(error)
            continue
        if not found:
            rejection[i] = "no tp, pp and dp make up the GPUs as the row gives them"
        table += found
        row += [i] * len(found)
    cells = np.array(table, dtype=np.int64).reshape(-1, len(AXES))
    rows = np.array(row, dtype=np.int64)
    stacks = ["" if isinstance(s, str) else s.stack for s in scenarios]
    return Rows(
        layouts=Layouts(**{axis: cells[:, i].copy() for i, axis in enumerate(AXES)}),
        setting=take(setting, entry[key[rows]]),
        row=rows,
        stack=[stacks[k] for k in key[rows]],
        rejection=rejection,
    )


def _with_gpus(frame: pd.DataFrame, facts: "_Facts") -> pd.DataFrame:
    """GPUs and nodes unknown: one node, or what one replica needs."""
    sizes = frame.reindex(columns=["gpus", "nodes", "tp", "pp", "cp"]).apply(pd.to_numeric, errors="coerce")
    unknown = sizes.gpus.isna() & sizes.nodes.isna()
    for column in ("gpus", "nodes"):  # a cell that is no number is an error of its row
        if column in frame:
            unknown &= frame[column].isna()
    replica = sizes[["tp", "pp", "cp"]].fillna(1).prod(axis=1)
    node = frame.gpu.map(
        lambda name: facts.gpus[str(name).lower()].gpus_per_node if str(name).lower() in facts.gpus else 1
    )
    return frame.assign(gpus=frame.reindex(columns=["gpus"]).gpus.where(~unknown, np.maximum(replica, node)))


# ---------------------------------------------------------------- cells


def _number(row: Row, name: str) -> float | None:
    """A cell as a number; None where it is empty."""
    value = row.get(name)
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RowError(f"{name}: {value!r} given, allowed is a number") from None
    if not math.isfinite(number):
        raise RowError(f"{name}: {value!r} given, allowed is a finite number")
    return number


def _count(row: Row, name: str, default: int | None = None) -> int:
    """A cell as a whole number of 1 or more."""
    value = _number(row, name)
    if value is None and default is not None:
        return default
    if value is None or value < 1 or value != int(value):
        given = "nothing" if value is None else repr(row.get(name))
        raise RowError(f"{name}: {given} given, allowed is a whole number of 1 or more")
    return int(value)


def _optional(row: Row, name: str) -> int | None:
    return None if _number(row, name) is None else _count(row, name)


def _word(row: Row, name: str) -> str:
    value = row.get(name)
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value).strip()


def _switch(row: Row, name: str, default: bool) -> bool:  # noqa: FBT001 (a cell's default)
    """A cell as on or off; `unknown` and nothing are the default."""
    word = _word(row, name).lower()
    if word in ("", "unknown"):
        return default
    if word in ("1", "1.0", "true"):
        return True
    if word in ("0", "0.0", "false"):
        return False
    raise RowError(f"{name}: {word!r} given, allowed is 0, 1 or unknown")


# ---------------------------------------------------------------- scenarios


@dataclass(frozen=True, slots=True, kw_only=True)
class _Families:
    """`base_configs/families.yaml`."""

    families: Mapping[str, Mapping[str, bool]]
    experts: Mapping[str, tuple[int, int, int, int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """What the words of a table are looked up in."""

    gpus: Mapping[str, GpuSpec]
    frameworks: Mapping[str, Framework]
    networks: Sequence[Network]
    models: _Families

    @classmethod
    def read(cls) -> "_Facts":
        return cls(
            gpus=files.read_gpus(),
            frameworks=files.read_frameworks(),
            networks=files.read_networks(),
            models=files.read(files.data_directory("base_configs") / "families.yaml", _Families),
        )

    def framework(self, text: str) -> Framework:
        """The framework with the longest pattern that matches the text; Megatron-core where none does."""
        matches = [
            (len(pattern), name)
            for name, framework in self.frameworks.items()
            for pattern in framework.aliases
            if fnmatch.fnmatch(text.lower(), pattern.lower())
        ]
        return self.frameworks[max(matches)[1] if matches else "other"]

    def links(self, gpu: GpuSpec, text: str) -> tuple[Link, Link]:
        """Inside a node and across, as a published text says, or else as the GPU's usual machine has them."""
        for network in self.networks:
            if any(word.lower() in text.lower() for word in network.words):
                return network.intra_node or gpu.intra_node, network.inter_node
        return gpu.intra_node, gpu.inter_node


def _attempt(row: Row, facts: _Facts) -> Scenario | str:
    try:
        return _scenario(row, facts)
    except ValueError as error:  # RowErrors, and what the types refuse
        return str(error)


def _scenario(row: Row, facts: _Facts) -> Scenario:
    name = _word(row, "gpu")
    if name.lower() not in facts.gpus:
        known = {spec.name for spec in facts.gpus.values()}
        raise RowError(f"gpu: unknown GPU {name!r}; {files.nearest(name.lower(), sorted(known))}")
    gpu = facts.gpus[name.lower()]
    framework = facts.framework(f"{_word(row, 'framework')}; {_word(row, 'notes')}")
    shape = _shape(row, facts.models)
    nodes = _optional(row, "nodes")
    gpus = _count(row, "gpus", (nodes or 1) * gpu.gpus_per_node)
    if nodes is not None and nodes > gpus:
        raise RowError(f"nodes: {nodes} given, allowed is at most the {gpus} GPUs")
    per_node = gpus // nodes if nodes else min(gpus, gpu.gpus_per_node)
    intra_node, inter_node = facts.links(gpu, _word(row, "interconnect"))
    precision = (_word(row, "precision_norm") or _word(row, "precision")).lower()
    if precision in ("", "unknown"):
        precision = gpu.default_precision
    if precision not in gpu.peak_tflops:
        allowed = " or ".join(sorted(gpu.peak_tflops))
        raise RowError(f"precision: {precision!r} given, allowed on {gpu.name} is {allowed}")
    work = Workload(
        shape=shape,
        gbs=_count(row, "gbs"),
        gpus=gpus,
        gpus_per_node=per_node,
        precision=cast("Precision", precision),
        sequence_parallel=_switch(row, "sequence_parallel", framework.sequence_parallel),
        flash_attention=_switch(row, "flash_attention", framework.flash_attention),
        dropout=framework.dropout and not shape.rms_norm,
        overlap_grad_sync=framework.overlap_grad_sync,
        overlap_param_sync=framework.overlap_param_sync,
        zero_stage=_zero_stage(_word(row, "zero_stage_or_dist_opt").lower(), framework.zero_stage),
    )
    cluster = Cluster(
        name=gpu.name,
        source="a published table",
        gpu=gpu,
        nodes=nodes or max(1, gpus // per_node),
        gpus_per_node=per_node,
        intra_node=intra_node,
        inter_node=inter_node,
        scheduler="slurm",
    )
    return Scenario(work=work, cluster=cluster, framework=framework)


def _zero_stage(word: str, default: int) -> int:
    """DeepSpeed's stages, Megatron's distributed optimizer (1), FSDP (3), and optimizers that shard nothing (0)."""
    if not word:
        return default
    if match := re.fullmatch(r"zero([0-3])", word):
        return int(match[1])
    if "fsdp" in word:
        return 2 if "shard_grad_op" in word else _STAGE_OF_SHARDED_WEIGHTS
    return 1 if word.startswith("distributed") else 0


def _shape(row: Row, models: _Families) -> ModelShape:
    family = _word(row, "family").lower() or "gpt3"
    notes = _word(row, "notes")
    if family not in models.families:
        raise RowError(f"family: {family!r} cannot be predicted; allowed are {', '.join(sorted(models.families))}")
    if "multi-latent-attention=True" in notes or re.match(r"(deepseek|kimi)", _word(row, "model").lower()):
        raise RowError("multi-latent attention cannot be predicted yet")
    words = dict(models.families[family])
    has_encoder = words.pop("has_encoder", False)
    experts = _experts(row, notes, models)
    if experts is not None and "num_experts=" in notes:
        words = _trainer_arguments(notes)
    words["gated_mlp"] = _switch(row, "gated_mlp", words.get("gated_mlp", False))
    hidden, seq, layers = _count(row, "hidden"), _count(row, "seq"), _count(row, "layers")
    heads = _count(row, "heads", max(1, hidden // 128))
    ffn = _count(row, "ffn", -(-8 * hidden // 3 // 256) * 256 if words["gated_mlp"] else 4 * hidden)
    shape = ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=_count(row, "kv_heads", heads),
        kv_channels=max(1, hidden // heads),
        seq_length=seq,
        max_position_embeddings=seq,
        vocab_size=_count(row, "vocab", _VOCABULARY),
        tied_embeddings=words.get("tied_embeddings", False),
        has_bias=words.get("has_bias", False),
        gated_mlp=words["gated_mlp"],
        rms_norm=words.get("rms_norm", False),
        causal=words.get("causal", True),
        learned_positions=words.get("learned_positions", True),
    )
    if experts is not None:
        number, per_token, width, shared, dense_layers = experts
        shape = replace(
            shape,
            num_experts=number,
            experts_per_token=per_token,
            expert_ffn_hidden_size=width or ffn,
            shared_ffn_hidden_size=shared,
            num_dense_layers=dense_layers,
        )
    if has_encoder:
        match = re.search(r"encoder layers (\d+), decoder layers (\d+), decoder seq (\d+)", notes)
        encoder, decoder, tokens = map(int, match.groups()) if match else (layers, layers, _DECODER_TOKENS)
        shape = replace(
            shape, num_layers=decoder, seq_length=tokens, encoder_num_layers=encoder, encoder_seq_length=seq
        )
    return shape


def _experts(row: Row, notes: str, models: _Families) -> tuple[int, int, int, int, int] | None:
    """Experts, experts for each token, their width (0: ffn), that of shared ones, layers without; None for no experts."""
    if match := re.search(r"num_experts=(\d+), topk=(\d+)", notes):
        return int(match[1]), int(match[2]), 0, 0, 0
    model = _word(row, "model").lower()
    if model in models.experts:
        return models.experts[model]
    if _word(row, "family").lower() in ("moe", "mixtral"):
        raise RowError(f"model: the experts of {model!r} are not known; num_experts=N, topk=K in notes gives them")
    return None


def _trainer_arguments(notes: str) -> dict[str, bool]:
    """What Megatron-LM's arguments in the notes say; the trainer's defaults are those of GPT-3."""
    return {
        "tied_embeddings": "untie-embeddings-and-output-weights=True" not in notes,
        "has_bias": "disable-bias-linear=True" not in notes,
        "rms_norm": "normalization=RMSNorm" in notes,
        "learned_positions": "position-embedding-type=" not in notes,
    }


# ---------------------------------------------------------------- layouts


def _layouts(row: Row, scenario: Scenario) -> Iterator[tuple[int, ...]]:
    """The layouts that a row can stand for, in the order of AXES: one, or several where it leaves an axis open."""
    work = scenario.work
    given = {name: _optional(row, name) for name in ("tp", "pp", "vpp", "dp", "mbs")}
    cp, ep = _count(row, "cp", 1), _count(row, "ep", 1)
    layers, heads = work.shape.num_layers, work.shape.num_attention_heads
    open_tp = [size for size in _OPEN_TP if heads % size == 0 and size <= work.gpus_per_node]
    tp_sizes = open_tp if given["tp"] is None else [given["tp"]]
    pp_sizes = _divisors(layers) if given["pp"] is None else [given["pp"]]
    recompute = _word(row, "recompute").lower()
    is_open = given["tp"] is None or given["pp"] is None
    for tp, pp in itertools.product(tp_sizes, pp_sizes):
        replica = tp * pp * cp
        if work.gpus < replica or (is_open and work.gpus % replica):
            continue
        dp = work.gpus // replica
        if is_open and given["dp"] not in (None, dp):
            continue
        for vpp in _open_vpp(layers, pp) if given["vpp"] is None else [given["vpp"]]:
            open_mbs = [size for size in _OPEN_MBS if work.gbs % (size * dp) == 0] or [1]
            for mbs in open_mbs if given["mbs"] is None else [given["mbs"]]:
                for mode, count in _recompute(
                    recompute, work, max(1, layers // (pp * vpp)), recomputes=scenario.framework.recomputes
                ):
                    yield tp, pp, vpp, cp, ep, mbs, mode, count


def _recompute(word: str, work: Workload, layers: int, *, recomputes: bool) -> Iterator[tuple[Recompute, int]]:
    if word.startswith("full"):
        yield Recompute.UNIFORM, 1
    elif word.startswith("selective"):
        yield Recompute.SELECTIVE, 0
    elif word == "none":
        yield Recompute.NONE, 0
    elif word in ("", "unknown") and recomputes:
        yield Recompute.UNIFORM, 1
    elif word in ("", "unknown"):
        yield Recompute.NONE, 0
        yield Recompute.UNIFORM, 1
        for fraction in _OPEN_BLOCKS:
            yield Recompute.BLOCK, max(1, round(fraction * layers))
        if not work.flash_attention:
            yield Recompute.SELECTIVE, 0
    else:
        raise RowError(f"recompute: {word!r} given, allowed is none, selective, full or unknown")


def _open_vpp(layers: int, pp: int) -> list[int]:
    if pp == 1 or layers % pp:
        return [1]
    return [chunks for chunks in _divisors(layers // pp) if chunks <= _MOST_OPEN_VPP]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
