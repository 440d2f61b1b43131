"""Tables of served points as papers and vendors publish them: CSV rows to points, models, clusters and engines.

As `tables` is for training: a row gives what it knows, the rest is a stated default (`DEFAULTS`), and a row that cannot
be predicted keeps its place, with the reason. The text columns `gpu`, `engine` and `interconnect` are looked up in
`cluster/`. Nothing measured is read here, nor what `notes` say.
"""

import csv
import difflib
import fnmatch
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import pandas as pd

from hptool import files, tables
from hptool.candidates import IntColumn
from hptool.cells import Row, RowError, count, optional, shown, switch, word
from hptool.facts import Cluster, Engine, GpuSpec, ModelShape, Network, Precision
from hptool.predict.inference import most_running
from hptool.serving import ServingPoints

T = TypeVar("T")

#: By these a table of served points is told from one of training runs.
MARKS = ("batch", "input_len", "output_len")

#: Columns without which nothing can be predicted.
REQUIRED = ("hidden", "layers", "heads", "gpu", *MARKS)

#: What an empty cell (or a column that is not there) stands for.
DEFAULTS = {
    "batch": "as many requests as memory holds, of an engine that takes them in flight",
    "kv_heads": "heads",
    "head_dim": "hidden / heads, or as the model is published (base_configs/families.yaml)",
    "ffn": "4·hidden, or 8/3·hidden rounded up to 256 where gated",
    "gated": "0",
    "vocab": "50257",
    "num_experts, experts_per_token, expert_ffn, shared_ffn": "as the model is published, or none",
    "encoder_layers": "none",
    "tp, pp": "1",
    "gpus": "tp·pp",
    "precision": "the usual one of the GPU",
    "cuda_graphs": "as the engine",
    "engine": "one like the others, trusted less",
    "interconnect": "the links of the machine in which the GPU usually comes",
    "series": "what calibrations are learned for within an engine: none",
}

#: Everything of a row that its points do not say. Rows that agree in these share one scenario.
_SCENARIO = (
    *("model", "hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "gated", "vocab", "num_experts"),
    *("experts_per_token", "expert_ffn", "shared_ffn", "encoder_layers", "gpu", "gpus", "interconnect", "engine"),
)

#: How published tables say that a precision is not known.
_UNSTATED = ("", "unstated", "unknown", "nan")

#: The most requests that engines run at once where memory holds more: the default of TensorRT-LLM (max_batch_size).
_MOST_REQUESTS = 2048

#: The engine that stands for those that are not known.
_UNKNOWN = "other"

#: GPT-2's vocabulary, of which most published GPT models are a padding.
_VOCABULARY = 50257


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What rows with the same model, cluster and engine share."""

    shape: ModelShape
    cluster: Cluster
    engine: Engine


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServedRows:
    """The points of a table's rows: `row[i]` is the row number of point i, `scenario[i]` its entry of `scenarios`.

    `rejection` has an entry for every row of the table, empty where there is a point.
    """

    points: ServingPoints
    row: IntColumn
    scenario: IntColumn
    scenarios: Sequence[Scenario]
    rejection: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """What the words of a table are looked up in, in small letters."""

    gpus: Mapping[str, GpuSpec]
    engines: Sequence[tuple[re.Pattern[str], Engine]]
    networks: Sequence[Network]
    models: tables.Families


def is_serving(path: Path) -> bool:
    """Whether the first line of a CSV file names served points: at least two of `MARKS`."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            names = [name.strip() for name in next(csv.reader(file), [])]
    except (OSError, UnicodeDecodeError, csv.Error):  # as `read_table` will say
        return False
    return sum(mark in names for mark in MARKS) >= len(MARKS) - 1


def engine_of(text: str) -> Engine:
    """The engine of `cluster/engines/` with the longest pattern that matches; `other` where none does."""
    return next(engine for pattern, engine in _facts().engines if pattern.match(text.strip().lower()))


def resolve(frame: pd.DataFrame) -> ServedRows:
    """The points and scenarios of a table's rows, with every default filled in."""
    number, first = tables.alike(frame, _SCENARIO)
    keys = [name for name in _SCENARIO if name in frame]
    found = [
        _attempt(dict(zip(keys, record, strict=True))) for record in frame[keys].iloc[first].itertuples(index=False)
    ]
    scenarios = [s for s in found if isinstance(s, Scenario)]
    entry = np.cumsum([isinstance(s, Scenario) for s in found]) - 1
    own = ("tp", "pp", "gpus", "precision", "cuda_graphs", *MARKS)
    cells = [name for name in own if name in frame]
    columns: dict[str, list[int | str | bool]] = {name: [] for name in ServingPoints.__dataclass_fields__}
    rows, entries, rejection = [], [], [""] * len(frame)
    for i, record in enumerate(frame[cells].itertuples(index=False)):
        scenario = found[number[i]]
        try:
            if not isinstance(scenario, Scenario):
                raise RowError(scenario)
            point = _point(dict(zip(cells, record, strict=True)), scenario)
        except ValueError as error:
            rejection[i] = str(error)
            continue
        rows.append(i)
        entries.append(int(entry[number[i]]))
        for name, cell in point.items():
            columns[name].append(cell)
    kinds = {"precision": np.str_, "cuda_graphs": np.bool_}
    points = ServingPoints(**{name: np.array(cell, kinds.get(name, np.int64)) for name, cell in columns.items()})
    return ServedRows(
        points=points,
        row=np.array(rows, dtype=np.int64),
        scenario=np.array(entries, dtype=np.int64),
        scenarios=scenarios,
        rejection=rejection,
    )


@functools.cache
def _facts() -> _Facts:
    engines = files.read_engines()
    aliases = [(alias.lower(), name) for name, engine in engines.items() for alias in (*engine.aliases, name)]
    aliases = [*sorted(aliases, key=lambda pair: (len(pair[0]), pair[1]), reverse=True), ("*", _UNKNOWN)]
    return _Facts(
        gpus={_plain(name): gpu for name, gpu in files.read_gpus().items()},
        engines=[(re.compile(fnmatch.translate(alias)), engines[name]) for alias, name in aliases],
        networks=files.read_networks(),
        models=tables.read_families(),
    )


def _plain(name: str) -> str:
    """A name in small letters with one kind of space."""
    return re.sub(r"[\s_/-]+", "-", name.strip().lower())


def _attempt(row: Row) -> Scenario | str:
    try:
        text = word(row, "engine")
        engine = engine_of(text)
        # What is learned of one engine that is not known is nothing about another.
        engine = replace(engine, name=text) if engine.name == _UNKNOWN and text else engine
        return Scenario(shape=_shape(row), cluster=_cluster(row), engine=engine)
    except ValueError as error:  # RowErrors, and what the types refuse
        return str(error)


def _cluster(row: Row) -> Cluster:
    facts, name = _facts(), word(row, "gpu")
    if _plain(name) not in facts.gpus:
        close = difflib.get_close_matches(_plain(name), facts.gpus, n=1)
        known = ", ".join(sorted({spec.name for spec in facts.gpus.values()}))
        hint = f"did you mean {facts.gpus[close[0]].name}?" if close else f"allowed are {known}"
        raise RowError(f"gpu: unknown GPU {shown(name)}; {hint}")
    gpu, gpus = facts.gpus[_plain(name)], optional(row, "gpus") or 1
    text = word(row, "interconnect").lower()
    network = next((n for n in facts.networks if any(w.lower() in text for w in n.words)), None)
    return Cluster(
        name=gpu.name,
        source="a published table",
        gpu=gpu,
        nodes=-(-gpus // gpu.gpus_per_node),
        gpus_per_node=gpu.gpus_per_node,
        intra_node=(network and network.intra_node) or gpu.intra_node,
        inter_node=network.inter_node if network else gpu.inter_node,
        scheduler="slurm",
    )


def _shape(row: Row) -> ModelShape:
    models, model = _facts().models, _plain(word(row, "model"))
    gated = switch(row, "gated", default=False)
    hidden = count(row, "hidden")
    heads = count(row, "heads", max(1, hidden // 128))
    if heads > hidden:
        raise RowError(f"heads: {heads} given, allowed is at most hidden, {hidden}")
    kv_heads = count(row, "kv_heads", heads)
    if kv_heads > heads:
        raise RowError(f"kv_heads: {kv_heads} given, allowed is at most the {heads} heads")
    if re.match(r"(deepseek-?(v[23]|r1)|kimi)", model.rpartition("-ai-")[2]):
        raise RowError("multi-latent attention cannot be predicted yet")
    ffn = count(row, "ffn", -(-8 * hidden // 3 // 256) * 256 if gated else 4 * hidden)
    shape = ModelShape(
        num_layers=count(row, "layers"),
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=kv_heads,
        kv_channels=count(row, "head_dim", _published(model, models.head_widths) or max(1, hidden // heads)),
        seq_length=1,
        max_position_embeddings=1,
        vocab_size=count(row, "vocab", _VOCABULARY),
        tied_embeddings=False,
        has_bias=False,
        gated_mlp=gated,
        rms_norm=True,
        learned_positions=False,
        encoder_num_layers=optional(row, "encoder_layers") or 0,
        encoder_seq_length=1 if optional(row, "encoder_layers") else 0,
    )
    known = _published(model, models.experts) or (0, 0, 0, 0, 0)
    experts = optional(row, "num_experts") or known[0]
    if not experts:
        return shape
    each = count(row, "experts_per_token", known[1] or None)
    if each > experts:
        raise RowError(f"experts_per_token: {each} given, allowed is at most the {experts} experts")
    return replace(
        shape,
        num_experts=experts,
        experts_per_token=each,
        expert_ffn_hidden_size=optional(row, "expert_ffn") or known[2] or ffn,
        shared_ffn_hidden_size=optional(row, "shared_ffn") or known[3],
        num_dense_layers=known[4],
    )


def _published(model: str, known: Mapping[str, T]) -> T | None:
    """What is known of a model by the longest of the names that its own contains."""
    names = [name for name in known if re.search(rf"(^|[^a-z0-9.]){re.escape(name)}([^a-z0-9.]|$)", model)]
    return known[max(names, key=len)] if names else None


def _point(row: Row, scenario: Scenario) -> dict[str, int | str | bool]:
    gpu, engine = scenario.cluster.gpu, scenario.engine
    tp, pp = count(row, "tp", 1), count(row, "pp", 1)
    gpus = count(row, "gpus", tp * pp)
    if tp * pp > gpus:
        raise RowError(f"tp·pp: {tp * pp} given, allowed is at most the {gpus} GPUs")
    heads = scenario.shape.num_attention_heads
    if heads % tp:
        raise RowError(f"tp: {tp} given, allowed is what divides the {heads} heads")
    if pp > scenario.shape.pipeline_layers:
        raise RowError(f"pp: {pp} given, allowed is at most the {scenario.shape.pipeline_layers} layers")
    precision = word(row, "precision").lower()
    precision = gpu.default_precision if precision in _UNSTATED else precision
    if precision not in gpu.peak_tflops:
        allowed = " or ".join(sorted(gpu.peak_tflops))
        raise RowError(f"precision: {shown(precision)} given, allowed on {gpu.name} is {allowed}")
    point: dict[str, int | str | bool] = {
        "tp": tp,
        "pp": pp,
        "batch": optional(row, "batch") or 0,
        "input_len": count(row, "input_len"),
        "output_len": count(row, "output_len"),
        "precision": cast("Precision", precision),
        "cuda_graphs": switch(row, "cuda_graphs", default=engine.cuda_graphs),
    }
    if not point["batch"]:
        if not (engine.in_flight and engine.paged_kv):
            raise RowError("batch: nothing given, allowed is a whole number of 1 or more")
        one = ServingPoints(**{name: np.array([cell or 1]) for name, cell in point.items()})
        most = float(most_running(one, scenario.shape, scenario.cluster, engine)[0])
        point["batch"] = max(1, min(int(most), _MOST_REQUESTS))
    return point
