"""Tables of runs as papers and trackers publish them: CSV rows to layouts and settings.

A row gives what it knows; the rest is a stated default (`DEFAULTS`). A row that cannot be predicted keeps its place,
with the reason. The text columns `gpu`, `framework` and `interconnect` are looked up in `cluster/`.
"""

import difflib
import fnmatch
import functools
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hptool import files
from hptool.candidates import AXES, BoolColumn, IntColumn, Layouts, Recompute, Workload
from hptool.cells import MOST as _MOST
from hptool.cells import Row, RowError
from hptool.cells import count as _count
from hptool.cells import is_empty as _is_empty
from hptool.cells import optional as _optional
from hptool.cells import shown as _shown
from hptool.cells import switch as _switch
from hptool.cells import word as _word
from hptool.errors import InputError
from hptool.facts import Cluster, Framework, GpuSpec, ModelShape, Network, Precision
from hptool.predict import stack
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
    "gpus": "nodes times the GPUs of a node; with no nodes either, one node, or what dp replicas need if that is more",
    "nodes": "gpus over the GPUs of a node of that kind of GPU",
    "cp, ep": "1",
    "tp, pp, vpp, mbs, recompute": "the best predicted (dp narrows it)",
    "precision": "the usual one of the GPU",
    "framework": "one like megatron-core, trusted less",
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
    *("family", "model", "hidden", "layers", "heads", "kv_heads", "ffn", "gated_mlp", "vocab", "seq", "gpu"),
    *("interconnect", "nodes", "gpus", "gbs", "sequence_parallel", "precision", "precision_norm"),
    *("zero_stage_or_dist_opt", "flash_attention", "framework", "notes"),
)
_CUT = ("tp", "pp", "vpp", "cp", "ep", "dp", "mbs")

#: All that a prediction looks at.
COLUMNS = (*_SCENARIO, *_CUT, "recompute", "mem_kind")

#: What an empty cell may say. `None` is a word where it stands for no recomputation and no sharding.
_EMPTY = ("", "NA", "N/A", "#N/A", "n/a", "NaN", "nan", "-nan", "null", "NULL", "None", "<NA>")
_NONE_IS_A_WORD = ("recompute", "zero_stage_or_dist_opt")

#: Up to which whole numbers are exact as floats.
_MOST_EXACT = 2**53

#: Rows of which the text is made at once.
_WRITTEN_AT_ONCE = 2**14

#: Texts of which it is kept what they stand for.
_TEXTS = 4096

#: Values tried where a row leaves an axis open.
_OPEN_TP = (1, 2, 4, 8)
_OPEN_MBS = (1, 2, 4, 8, 16)
_MOST_OPEN_VPP = 12
_OPEN_BLOCKS = (0.25, 0.5)

_STAGE_OF_SHARDED_WEIGHTS = 3


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

    `scenario[i]` is its entry of `setting` and of `stack`, which names the GPU, the network and the framework: what
    calibrations are learned for. `rejection` has an entry for every row of the table, empty where there is a layout.
    """

    layouts: Layouts
    row: IntColumn
    scenario: IntColumn
    setting: Setting
    stack: Sequence[str]
    rejection: Sequence[str]


def read_table(path: Path, required: Sequence[str] = REQUIRED) -> pd.DataFrame:
    """A CSV file with at least the required columns and one row; InputError otherwise."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not content.strip():
        raise InputError(f"{path}: the file is empty")
    if b"\0" in content:
        raise InputError(f"{path}: not a CSV table: not text in UTF-8")
    names = [str(name) for name in _parsed(path, content, header=None, nrows=1, dtype=str).iloc[0]]
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise InputError(f"{path}: columns {', '.join(twice)} given twice")
    if len(names) == 1 and re.search(r"[;\t|]", names[0]):
        raise InputError(f"{path}: not a CSV table: allowed between two cells is a comma")
    if missing := [column for column in required if column not in names]:
        hints = [f"{column}: {files.nearest(column, names)}" for column in missing]
        meant = "; ".join(hint for hint in hints if "did you mean" in hint)
        raise InputError(f"{path}: columns {', '.join(missing)} missing{f' ({meant})' if meant else ''}")
    empty = {name: [word for word in _EMPTY if word != "None" or name not in _NONE_IS_A_WORD] for name in names}
    frame = _parsed(path, content, na_values=empty)
    if frame.empty:
        raise InputError(f"{path}: no rows")
    return frame


def _parsed(path: Path, content: bytes, **options: Any) -> pd.DataFrame:
    how: dict[str, Any] = {"low_memory": False, "keep_default_na": False, "skipinitialspace": True, "index_col": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(io.BytesIO(content), **how, **options)
    except pd.errors.ParserWarning as error:
        raise InputError(f"{path}: not a CSV table: the rows have more cells than the first line has names") from error
    except ValueError as error:  # what pandas raises for all that is no table, and what is not UTF-8
        reason = " ".join(str(error).removeprefix("Error tokenizing data. C error: ").split())
        raise InputError(f"{path}: not a CSV table: {reason}") from error
    return cast("pd.DataFrame", frame)


def csv_text(frame: pd.DataFrame, predicted: pd.DataFrame) -> str:
    """As CSV: cells of `frame` as they were read, without a point where they are whole, and six digits of `predicted`.

    A column that both have is that of `predicted`.
    """
    read = pd.DataFrame({name: _without_point(frame[name]) for name in frame if name not in predicted})
    pieces = []
    for start in range(0, max(1, len(frame)), _WRITTEN_AT_ONCE):
        some = slice(start, start + _WRITTEN_AT_ONCE)
        piece = pd.concat([read.iloc[some], predicted.iloc[some].apply(_six_digits)], axis=1)
        pieces.append(piece.to_csv(index=False, header=start == 0))
    return "".join(pieces)


def _six_digits(column: "pd.Series[Any]") -> "pd.Series[Any]":
    if not pd.api.types.is_float_dtype(column):
        return column
    cells = ["" if math.isnan(value) else format(value, ".6g") for value in column.tolist()]
    return pd.Series(cells, column.index, dtype=object)


def _without_point(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """Whole numbers of a column that pandas read as floats because some cells are empty."""
    if not pd.api.types.is_float_dtype(column) or not (column.dropna() % 1 == 0).all():
        return column
    return column if (column.abs() > _MOST_EXACT).any() else column.astype("Int64")


def texts(frame: pd.DataFrame, column: str) -> list[str]:
    """A column as text, empty where a cell or the column is missing; numbers that name something have no point."""
    if column not in frame:
        return [""] * len(frame)
    whole = (int(v) if isinstance(v, float) and v.is_integer() else v for v in frame[column].tolist())
    return ["" if _is_empty(value) else str(value).strip() for value in whole]


def numbers(frame: pd.DataFrame, column: str) -> NDArray[np.float64]:
    """A column as numbers, NaN where a cell is none or the column is missing."""
    if column not in frame:
        return np.full(len(frame), np.nan)
    return pd.to_numeric(frame[column], errors="coerce").to_numpy(np.float64, na_value=np.nan)


def alike(frame: pd.DataFrame, columns: Sequence[str] = COLUMNS) -> tuple[IntColumn, IntColumn]:
    """Numbers for the rows that agree in those of `columns` that there are, and the first row of each number."""
    keys = [column for column in columns if column in frame]
    number = np.asarray(frame.groupby(keys, dropna=False, sort=False).ngroup(), dtype=np.int64)
    return number, np.unique(number, return_index=True)[1].astype(np.int64)


def resolve(frame: pd.DataFrame) -> Rows:
    """The layouts and settings of a table's rows, with every default filled in."""
    facts = _facts()
    frame = _with_gpus(frame.reset_index(drop=True), facts)
    scenario, first = alike(frame, _SCENARIO)
    cells = {column: frame[column].iloc[first].tolist() for column in _SCENARIO if column in frame}
    records = (dict(zip(cells, record, strict=True)) for record in zip(*cells.values(), strict=True))
    found = [_attempt(record, facts) for record in records]
    scenarios = [s for s in found if isinstance(s, Scenario)]
    entry = np.cumsum([isinstance(s, Scenario) for s in found]) - 1
    rejection = ["" if isinstance(found[k], Scenario) else str(found[k]) for k in scenario]
    columns = _layouts(frame, scenarios, entry[scenario], rejection)
    return Rows(
        layouts=Layouts(**{axis: columns[axis] for axis in AXES}),
        row=columns["row"],
        scenario=columns["scenario"],
        setting=stack([(s.work, s.cluster, s.framework) for s in scenarios]),
        stack=[s.stack for s in scenarios],
        rejection=rejection,
    )


def _with_gpus(frame: pd.DataFrame, facts: "_Facts") -> pd.DataFrame:
    """GPUs and nodes unknown: one node, or what the replicas need."""
    empty = pd.Series(np.nan, frame.index)
    unknown = frame.get("gpus", empty).isna() & frame.get("nodes", empty).isna()
    sizes = [numbers(frame, column) for column in ("tp", "pp", "cp", "dp")]
    with np.errstate(over="ignore"):
        replicas = np.prod([np.where(np.isfinite(size), size, 1.0) for size in sizes], axis=0)
    replicas = np.where((replicas >= 1) & (replicas <= _MOST), replicas, 1.0)
    per_node = {name: spec.gpus_per_node for name, spec in facts.gpus.items()}
    node = np.array([per_node.get(name.lower(), 1) for name in texts(frame, "gpu")])
    gpus = frame.get("gpus", empty).astype(object)
    return frame.assign(gpus=gpus.where(~unknown, pd.Series(np.maximum(replicas, node), frame.index, dtype=object)))


# ---------------------------------------------------------------- scenarios


@dataclass(frozen=True, slots=True, kw_only=True)
class Families:
    """`base_configs/families.yaml`."""

    families: Mapping[str, Mapping[str, bool]]
    experts: Mapping[str, tuple[int, int, int, int, int]]
    head_widths: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """What the words of a table are looked up in, in small letters."""

    gpus: Mapping[str, GpuSpec]
    frameworks: Sequence[tuple[re.Pattern[str], Framework]]
    networks: Sequence[tuple[Sequence[str], Network]]
    models: Families


@functools.lru_cache(maxsize=_TEXTS)
def _framework(text: str) -> Framework:
    """The framework with the longest pattern that matches the text; the last one, of any text, where none does."""
    text = text.lower()
    return next(framework for pattern, framework in _facts().frameworks if pattern.match(text))


@functools.lru_cache(maxsize=_TEXTS)
def _network(text: str) -> Network | None:
    """The first network of which a word is in the text; None for the GPU's usual machine."""
    text = text.lower()
    return next((network for words, network in _facts().networks if any(word in text for word in words)), None)


@functools.cache
def read_families() -> Families:
    """What families' and models' names say where a table does not."""
    return files.read(files.data_directory("base_configs") / "families.yaml", Families)


@functools.cache
def _facts() -> _Facts:
    frameworks = files.read_frameworks()
    aliases = [(alias.lower(), name) for name, framework in frameworks.items() for alias in framework.aliases]
    aliases = [*sorted(aliases, key=lambda pair: (len(pair[0]), pair[1]), reverse=True), ("*", "other")]
    return _Facts(
        gpus=files.read_gpus(),
        frameworks=[(re.compile(fnmatch.translate(alias)), frameworks[name]) for alias, name in aliases],
        networks=[([word.lower() for word in network.words], network) for network in files.read_networks()],
        models=read_families(),
    )


def _attempt(row: Row, facts: _Facts) -> Scenario | str:
    try:
        return _scenario(row, facts)
    except ValueError as error:  # RowErrors, and what the types refuse
        return str(error)


def _scenario(row: Row, facts: _Facts) -> Scenario:
    name = _word(row, "gpu")
    if name.lower() not in facts.gpus:
        close = difflib.get_close_matches(name.lower(), facts.gpus, n=1)
        known = ", ".join(sorted({spec.name for spec in facts.gpus.values()}))
        hint = f"did you mean {close[0]}?" if close else f"allowed are {known}"
        raise RowError(f"gpu: unknown GPU {_shown(name)}; {hint}")
    gpu = facts.gpus[name.lower()]
    framework = _framework(f"{_word(row, 'framework')}; {_word(row, 'notes')}")
    shape = _shape(row, facts.models)
    nodes = _optional(row, "nodes")
    gpus = _count(row, "gpus", (nodes or 1) * gpu.gpus_per_node)
    if nodes is not None and nodes > gpus:
        raise RowError(f"nodes: {nodes} given, allowed is at most the {gpus} GPUs")
    per_node = gpus // nodes if nodes else min(gpus, gpu.gpus_per_node)
    network = _network(_word(row, "interconnect"))
    precision = (_word(row, "precision_norm") or _word(row, "precision")).lower()
    if precision in ("", "unknown"):
        precision = gpu.default_precision
    if precision not in gpu.peak_tflops:
        allowed = " or ".join(sorted(gpu.peak_tflops))
        raise RowError(f"precision: {_shown(precision)} given, allowed on {gpu.name} is {allowed}")
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
        intra_node=(network and network.intra_node) or gpu.intra_node,
        inter_node=network.inter_node if network else gpu.inter_node,
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


def _shape(row: Row, models: Families) -> ModelShape:
    family = _word(row, "family").lower() or "gpt3"
    notes = _word(row, "notes")
    if family not in models.families:
        raise RowError(
            f"family: {_shown(family)} cannot be predicted; allowed are {', '.join(sorted(models.families))}"
        )
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
    if heads > hidden:
        raise RowError(f"heads: {heads} given, allowed is at most hidden, {hidden}")
    kv_heads = _count(row, "kv_heads", heads)
    if kv_heads > heads:
        raise RowError(f"kv_heads: {kv_heads} given, allowed is at most the {heads} heads")
    ffn = _count(row, "ffn", -(-8 * hidden // 3 // 256) * 256 if words["gated_mlp"] else 4 * hidden)
    shape = ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=kv_heads,
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
        encoder, decoder, tokens = _from_notes(match) if match else (layers, layers, _DECODER_TOKENS)
        shape = replace(
            shape, num_layers=decoder, seq_length=tokens, encoder_num_layers=encoder, encoder_seq_length=seq
        )
    return shape


def _experts(row: Row, notes: str, models: Families) -> tuple[int, int, int, int, int] | None:
    """Experts, experts for each token, their width (0: ffn), that of shared ones, layers without; None: no experts."""
    if match := re.search(r"num_experts=(\d+), topk=(\d+)", notes):
        number, per_token = _from_notes(match)
        if per_token > number:
            raise RowError(f"notes: topk={per_token} given, allowed is at most num_experts={number}")
        return number, per_token, 0, 0, 0
    model = _word(row, "model").lower()
    if model in models.experts:
        return models.experts[model]
    if _word(row, "family").lower() in ("moe", "mixtral"):
        raise RowError(
            f"model: the experts of {_shown(model)} are not known; num_experts=N, topk=K in notes gives them"
        )
    return None


def _from_notes(match: re.Match[str]) -> list[int]:
    return [_count({"notes": digits}, "notes") for digits in match.groups()]


def _trainer_arguments(notes: str) -> dict[str, bool]:
    """What Megatron-LM's arguments in the notes say; the trainer's defaults are those of GPT-3."""
    return {
        "tied_embeddings": "untie-embeddings-and-output-weights=True" not in notes,
        "has_bias": "disable-bias-linear=True" not in notes,
        "rms_norm": "normalization=RMSNorm" in notes,
        "learned_positions": "position-embedding-type=" not in notes,
    }


# ---------------------------------------------------------------- layouts

#: How words for recomputation begin; published ones go on, as in `selective(per op)`.
_MODES = {"none": Recompute.NONE, "selective": Recompute.SELECTIVE, "full": Recompute.UNIFORM}
_OPEN = -1

#: How hptool itself says it, with the number of layers: in names of layouts and in reports.
_COUNTED_MODE = re.compile(r"(uniform|block)-?([0-9]{1,4})")

#: What of a scenario decides on the layouts that its rows can stand for.
_OF_SCENARIO: Mapping[str, Callable[[Scenario], int]] = {
    "layers": lambda s: s.work.shape.num_layers,
    "heads": lambda s: s.work.shape.num_attention_heads,
    "seq": lambda s: s.work.shape.seq_length,
    "experts": lambda s: max(1, s.work.shape.num_experts),
    "gbs": lambda s: s.work.gbs,
    "gpus": lambda s: s.work.gpus,
    "gpus_per_node": lambda s: s.work.gpus_per_node,
    "flash": lambda s: s.work.flash_attention,
    "recomputes": lambda s: s.framework.recomputes,
}


@dataclass(slots=True, kw_only=True, eq=False)
class _Entries:
    """Columns of equal length that grow into layouts, several entries a row where it is open; and why rows have none.

    Cells of the table are `given_AXIS`, 0 where they are empty.
    """

    columns: dict[str, IntColumn]
    rejection: list[str]

    def __getitem__(self, name: str) -> IntColumn:
        return self.columns[name]

    def __setitem__(self, name: str, column: IntColumn) -> None:
        self.columns[name] = column

    def keep(self, good: BoolColumn, reason: str) -> None:
        """Drops the other entries. A row that has none left is rejected; `reason` may name columns in braces."""
        if good.all():
            return
        before, first = np.unique(self["row"], return_index=True)
        lost = ~np.isin(before, self["row"][good])
        for row, i in zip(before[lost].tolist(), first[lost].tolist(), strict=True):
            self.rejection[row] = reason.format_map({name: column[i] for name, column in self.columns.items()})
        self.columns = {name: column[good] for name, column in self.columns.items()}

    def each(self, axes: str | Sequence[str], options: Callable[..., Sequence[Any]], key: Sequence[str]) -> None:
        """Each entry once for each of the values of `axes` that `options` gives for its columns of `key`, in order."""
        cells = np.column_stack([self[name] for name in key])
        few, own = np.unique(cells, axis=0, return_inverse=True)
        values = [options(*row) for row in few.tolist()]
        count = np.array([len(v) for v in values], dtype=np.int64)
        start, times = (np.cumsum(count) - count)[own.ravel()], count[own.ravel()]
        entry = np.repeat(np.arange(len(times)), times)
        nth = np.arange(len(entry)) - np.repeat(np.cumsum(times) - times, times)
        names = [axes] if isinstance(axes, str) else axes
        table = np.array([value for v in values for value in v], dtype=np.int64).reshape(-1, len(names))
        self.columns = {name: column[entry] for name, column in self.columns.items()}
        self.columns |= dict(zip(names, table[start[entry] + nth].T, strict=True))


def _layouts(
    frame: pd.DataFrame, scenarios: Sequence[Scenario], entry: IntColumn, rejection: list[str]
) -> Mapping[str, IntColumn]:
    """The layouts that each row can stand for, in the order of AXES; `entry` is each row's scenario.

    Fills in why a row can have none.
    """
    columns = {f"given_{name}": _counts(frame, name, rejection) for name in _CUT}
    columns |= _modes(frame, rejection)
    columns |= {"row": np.arange(len(frame)), "scenario": entry}
    known = np.array([not reason for reason in rejection], dtype=np.bool_)
    e = _Entries(columns={name: column[known] for name, column in columns.items()}, rejection=rejection)
    for name, number in _OF_SCENARIO.items():
        e[name] = np.array([int(number(s)) for s in scenarios], dtype=np.int64)[e["scenario"]]
    for axis in ("tp", "pp", "cp", "ep"):
        e[axis] = np.maximum(1, e[f"given_{axis}"])
    e.keep(e["heads"] % e["tp"] == 0, "tp: {tp} given, allowed is a divisor of the {heads} heads")
    e.keep(e["experts"] % e["ep"] == 0, "ep: {ep} given, allowed is a divisor of the number of experts, {experts}")
    e.keep(e["cp"] <= e["seq"], "cp: {cp} given, allowed is at most the sequence of {seq}")
    e.keep(e["given_vpp"] <= e["layers"], "vpp: {given_vpp} given, allowed is at most the {layers} layers")
    # In floating point, because absurd sizes overflow; where they divide the GPUs, they are exact.
    replica = e["tp"] * np.float64(1) * e["pp"] * e["cp"]
    e.keep(e["gpus"] % replica == 0, "tp·pp·cp: {tp}·{pp}·{cp} given, allowed is a divisor of the {gpus} GPUs")
    e["open"] = np.asarray((e["given_tp"] == 0) | (e["given_pp"] == 0), dtype=np.int64)
    e.each("tp", _tp_sizes, ("given_tp", "heads", "gpus_per_node"))
    e.each("pp", _pp_sizes, ("given_pp", "layers"))
    e["dp"] = e["gpus"] // (e["tp"] * e["pp"] * e["cp"])
    e.keep(e["dp"] * e["tp"] * e["pp"] * e["cp"] == e["gpus"], _NOTHING_MAKES_UP)
    e.keep((e["open"] == 0) | (e["given_dp"] == 0) | (e["given_dp"] == e["dp"]), _NOTHING_MAKES_UP)
    e.each("vpp", _vpp_sizes, ("given_vpp", "layers", "pp"))
    e.each("mbs", _mbs_sizes, ("given_mbs", "gbs", "dp"))
    too_much = (e["given_mbs"] > 0) & (e["mbs"] * e["dp"] > e["gbs"])
    e.keep(~too_much, "mbs·dp: {mbs}·{dp} given, allowed is at most the global batch of {gbs}")
    e["chunk"] = np.maximum(1, e["layers"] // (e["pp"] * e["vpp"]))
    of = ("mode", "mode_layers", "recomputes", "flash", "chunk")
    e.each(("recompute", "recompute_num_layers"), _recomputations, of)
    return e.columns


_NOTHING_MAKES_UP = "no tp, pp and dp make up the GPUs as the row gives them"


def _tp_sizes(given: int, heads: int, gpus_per_node: int) -> Sequence[int]:
    return [given] if given else [size for size in _OPEN_TP if heads % size == 0 and size <= gpus_per_node]


def _pp_sizes(given: int, layers: int) -> Sequence[int]:
    if given:
        return [given]
    small = [size for size in range(1, math.isqrt(layers) + 1) if layers % size == 0]
    return sorted({*small, *(layers // size for size in small)})


def _vpp_sizes(given: int, layers: int, pp: int) -> Sequence[int]:
    if given:
        return [given]
    if pp == 1 or layers % pp:
        return [1]
    return [chunks for chunks in range(1, _MOST_OPEN_VPP + 1) if layers // pp % chunks == 0]


def _mbs_sizes(given: int, gbs: int, dp: int) -> Sequence[int]:
    return [given] if given else [size for size in _OPEN_MBS if gbs % (size * dp) == 0] or [1]


def _recomputations(mode: int, given: int, recomputes: bool, flash: bool, layers: int) -> Sequence[tuple[int, int]]:  # noqa: FBT001 (cells)
    """Modes with their counts of layers, of which a chunk has `layers`; `given` is what a cell says of them."""
    if mode == Recompute.BLOCK and given >= layers:
        return [(Recompute.UNIFORM, 1)]  # the same
    if mode != _OPEN:
        return [(mode, min(layers, given or 1) if mode >= Recompute.UNIFORM else 0)]
    if recomputes:
        return [(Recompute.UNIFORM, 1)]
    blocks = [(Recompute.BLOCK, max(1, round(fraction * layers))) for fraction in _OPEN_BLOCKS]
    return [(Recompute.NONE, 0), (Recompute.UNIFORM, 1), *blocks, *([] if flash else [(Recompute.SELECTIVE, 0)])]


def _counts(frame: pd.DataFrame, name: str, rejection: list[str]) -> IntColumn:
    """A column of whole numbers of 1 or more, 0 where a cell is empty; rejects rows with other cells."""
    cells = numbers(frame, name).copy()  # pandas gives what cannot be written to
    good = (cells >= 1) & (cells <= _MOST) & (cells == np.floor(cells))
    for i in np.flatnonzero(~good & frame[name].notna()).tolist() if name in frame else ():
        try:
            cells[i] = _optional({name: frame[name].iloc[i]}, name) or math.nan
        except RowError as error:
            cells[i] = math.nan
            rejection[i] = rejection[i] or str(error)
    return np.nan_to_num(cells).astype(np.int64)


def _modes(frame: pd.DataFrame, rejection: list[str]) -> dict[str, IntColumn]:
    """The modes of recomputation of a column of words, `_OPEN` where none is given, and their layers, 0 where not said.

    Rejects rows with other words.
    """
    modes, layers = [], []
    for i, text in enumerate(texts(frame, "recompute")):
        word = text.lower()
        mode = next((int(mode) for start, mode in _MODES.items() if word.startswith(start)), _OPEN)
        counted = _COUNTED_MODE.fullmatch(word)
        if counted is not None and int(counted[2]) > 0:
            mode = int(Recompute[counted[1].upper()])
        elif mode == _OPEN and word not in ("", "unknown"):
            allowed = "none, selective, full, uniform-N, block-N or unknown"
            rejection[i] = rejection[i] or f"recompute: {_shown(text)} given, allowed is {allowed}"
        modes.append(mode)
        layers.append(int(counted[2]) if counted is not None else 0)
    return {"mode": np.array(modes, dtype=np.int64), "mode_layers": np.array(layers, dtype=np.int64)}
