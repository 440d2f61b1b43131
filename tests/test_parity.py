"""The predecessor's known answers beside ours: each case agrees, is a defect of its, or has a reason in a table.

`parity_cases.yaml` holds inputs and outputs of the predecessor's own functions. Ours come from the product's functions,
converted as each comparison below says; what then differs, `parity_reasons.yaml` has to explain, and nothing else.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from hptool import catalogue, files, launch, rates
from hptool.base_config import BaseConfig
from hptool.candidates import Layout, Recompute, SearchLimits, SearchSpace, Workload, enumerate_layouts, refusal
from hptool.errors import InputError
from hptool.facts import Cluster, ModelShape
from hptool.plan import WORKER_FRAMEWORK
from hptool.predict import predict, stack
from hptool.predict.flops import FORWARD_AND_BACKWARD, attention_flops, model_flops_per_step
from hptool.presets import Preset, Site, lightning_time, parameters_of_size
from hptool.recommend import Budget, Size, recommend
from hptool.recommendation import request
from hptool.serving import Lengths, ServingLayout
from hptool.serving_candidates import ServingCandidates, ServingSpace, enumerate_points
from hptool.serving_plan import ServingPlan, ServingRequest, make_serving_plan
from hptool.serving_report import PREDECESSOR_COLUMNS, predecessor_row
from hptool.units import TERA
from tests.conftest import ROOT

WHOLE = ROOT.parent / "shared" / "facts" / "parity_cases.yaml"
PART = ROOT / "tests" / "data" / "parity_cases.yaml"

#: Of the whole file; a change that makes fewer agree has to say why.
AGREEING = 781

Given = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What the predecessor was given and what it answered."""

    group: str
    number: int
    given: Given
    answer: Any
    is_defect: bool

    @property
    def name(self) -> str:
        return f"{self.group}-{self.number:03}"

    @property
    def is_refused(self) -> bool:
        """The predecessor raised, or returned nothing."""
        return self.answer is None or (isinstance(self.answer, dict) and "raises" in self.answer)


class Comparison(NamedTuple):
    """How a group is compared: our answer, and the aspects in which another differs from it."""

    ours: Callable[[Given], Any]
    differing: Callable[[Any, Any], set[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why the answers differ in these aspects, in these cases: `all` of a group, or numbers and ranges of them."""

    reason: str
    differing: tuple[str, ...]
    cases: Mapping[str, str | tuple[int | str, ...]]

    def covers(self, case: Case) -> bool:
        listed = self.cases.get(case.group, ())
        return listed == "all" or case.number in numbers(listed)


def numbers(listed: str | Sequence[int | str]) -> set[int]:
    """`[1, 4-6]` is 1, 4, 5 and 6."""
    found = set()
    for item in listed:
        first, _, last = str(item).partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


# ---------------------------------------------------------------- models

#: What the predecessor's successor calls our families.
FAMILIES: Mapping[str, str] = {"qwen": "qwen2"}


def own_name(family: str) -> str:
    return FAMILIES.get(family, family)


@functools.cache
def model(family: str, size_b: float, seq_length: int | None = None) -> Preset:
    """What `--model gpt3/5b` names, or `gpt3/5b_seq8192` where it usually has another length."""
    name = f"{own_name(family)}/{size_b}b"
    found = catalogue.preset(name)
    if seq_length is None or found.seq_length == seq_length:
        return found
    return catalogue.preset(f"{name}_seq{seq_length}")


def of_family(family: str, layers: int, **dimensions: Any) -> Preset:
    """A model like the smallest of its family, toys left out, but for these dimensions."""
    usual = next(p for p in catalogue.presets(own_name(family)).values() if not p.toy)
    encoder_layers = layers if usual.encoder_num_layers else None
    return replace(usual, num_layers=layers, encoder_num_layers=encoder_layers, **dimensions)


def model_of_case(given: Given) -> Preset:
    return model(given["model_name"], given["model_size_in_b"], given["seq_length"])


# ---------------------------------------------------------------- sizes, days and rates

#: The predecessor counts 8 FLOPs a parameter and token, 2 of them for recomputation; of its rate 6/8 are model FLOPs.
MODEL_PART = 6 / 8


def budget_of(given: Given) -> Budget:
    return Budget(gpus=given["gpu_count"], days=given.get("max_training_days", 1))


def size_of(name: str, shape: ModelShape, given: Given) -> Size:
    """The model at the rate of the case, on its tokens as `--tokens` reads them."""
    tokens = request.read_tokens(f"{given['num_tokens_in_b']}B")
    assert isinstance(tokens, float)
    return replace(rates._size(name, shape, tokens), tflops_per_gpu=given["tflops_per_gpu"] * MODEL_PART)


def attention_share(shape: ModelShape) -> float:
    """FLOPs of the decoder's attention scores, which the predecessor leaves out, over 6 a parameter and token."""
    length = shape.seq_length
    scores = FORWARD_AND_BACKWARD * shape.num_layers * attention_flops(shape, length, length, causal=shape.causal)
    return scores / (6 * shape.num_parameters * length)


def recommended_size(given: Given) -> float:
    """Billions of parameters that fill the budget, were there no attention."""
    budget = budget_of(given)
    shapes = {name: catalogue.preset(name).shape for name in rates.recommended(own_name(given["model_name"]))}
    found = recommend(budget, [size_of(name, shape, given) for name, shape in shapes.items()])
    nearest = min(shapes.values(), key=lambda shape: abs(math.log(shape.num_parameters / found.filling)))
    return found.filling * (1 + attention_share(nearest)) / 1e9


def training_days(given: Given) -> float:
    """Days of the model on these GPUs, were there no attention."""
    preset = model(given["model_name"], given["model_size_in_b"])
    days = size_of(preset.name, preset.shape, given).days(budget_of(given).gpus)
    return days / (1 + attention_share(preset.shape))


def near(tolerance: float, rounding: float) -> Callable[[Any, Any], set[str]]:
    """Numbers within this part of each other, and within the predecessor's rounding."""

    def differing(ours: float, theirs: float) -> set[str]:
        return set() if abs(ours - theirs) <= tolerance * abs(theirs) + rounding else {"value"}

    return differing


def parameters(given: Given) -> float:
    """Billions of parameters without the final norms and the biases of T5's words, which the predecessor leaves out."""
    shape = of_family(
        given["model_name"],
        given["num_layers"],
        vocab_size=given["vocab_size"],
        seq_length=given["seq_length"],
        hidden_size=given["hidden_size"],
        ffn_hidden_size=given["ffn_size"] or 4 * given["hidden_size"],
        num_attention_heads=given["att_heads"],
        kv_channels=given["kv_channels"],
    ).shape
    stacks = 2 if shape.encoder_num_layers else 1
    biases_of_words = shape.vocab_size if shape.encoder_num_layers else 0
    return (shape.num_parameters - stacks * shape.norm_parameters - biases_of_words) / 1e9


def tflops(given: Given) -> tuple[float, float]:
    """TFLOP/s of all GPUs and of one, with the masked half of causal attention, which the predecessor counts."""
    hidden, length = given["hs"], given["enc_seq_len"]
    stacks = 2 if given["dec_seq_len"] else 1
    shape = of_family(
        given["model_name"],
        given["layers"] // stacks,
        vocab_size=given["vocab"],
        seq_length=length,
        seq_length_dec=given["dec_seq_len"],
        hidden_size=hidden,
        ffn_hidden_size=given["ffn_hs"] or 4 * hidden,
        num_attention_heads=max(1, hidden // 64),
        num_query_groups=None,
        kv_channels=min(64, hidden),
    ).shape
    masked = shape.num_layers * attention_flops(shape, shape.seq_length, shape.seq_length, causal=True) * shape.causal
    flops = model_flops_per_step(shape, given["gbs"]) + given["gbs"] * FORWARD_AND_BACKWARD * masked
    rate = flops / given["time_per_step"] / TERA
    return rate, rate / (given["nodes"] * given["gpus_per_node"])


def other_rate(ours: tuple[float, float], theirs: Given) -> set[str]:
    rounded = (theirs["aggregate"], theirs["per_gpu"])
    return {"value"} if any(near(0, 0.0051)(a, b) for a, b in zip(ours, rounded, strict=True)) else set()


#: Models that ours calls so, by the class of the recipe from whose name the predecessor's successor took their size.
RECIPES = {
    "Llama3Config8B": "llama/llama3_8b",
    "MixtralConfig8x7B": "mixtral/8x7b",
    "MixtralConfig8x22B": "mixtral/8x22b",
    "Qwen2Config500M": "qwen2/qwen2_0.5b",
    "Qwen2Config1P5B": "qwen2/qwen2_1.5b",
    "Llama31Config405B": "llama/llama3.1_405b",
    "GPTConfig126M": "gpt3/126m",
    "MistralNeMoConfig12B": "mistral/nemo_12b",
    "Llama32Config1B": "llama/llama3.2_1b",
}


def size_of_recipe(given: Given) -> float:
    """Billions of parameters, counted."""
    name = RECIPES.get(given["recipe_class"])
    if name is None:
        raise InputError(f"{given['recipe_class']}: no preset")
    return catalogue.preset(name).shape.num_parameters / 1e9


# ---------------------------------------------------------------- shapes and configs


def shape_of(given: Given) -> Preset:
    return model_of_case(given)


def other_shape(ours: Preset, theirs: Given) -> set[str]:
    def given(*names: str) -> Any:
        return next(theirs[name] for name in names if name in theirs)

    hidden = given("hidden_size", "hs")
    width = (hidden, given("num_attention_heads", "att"), given("ffn_hidden_size", "ffn") or 4 * hidden)
    aspects = {
        "layers": ours.num_layers == given("num_layers", "layers"),
        "width": (ours.hidden_size, ours.num_attention_heads, ours.ffn_hidden_size) == width,
        "kv_channels": ours.kv_channels == given("kv_channels", "kv"),
        "lr": ours.lr == given("lr"),
    }
    return {name for name, same in aspects.items() if not same}


def base_config(given: Given) -> BaseConfig:
    preset = replace(model_of_case(given), tokens=round(given["num_tokens_in_b"] * 1e9))
    site = Site(cluster=a100(80), num_nodes=given["nodes"], time_limit_days=given["max_training_days"])
    text = catalogue.config_text(preset, site, Layout())
    return files.parse(files.parse_yaml(text, preset.name), BaseConfig, preset.name)


def other_config(ours: BaseConfig, theirs: Given) -> set[str]:
    """But for the layout, which the predecessor computes and never writes."""
    stack_, optim, sched = ours.stack, ours.model.optim, ours.model.optim.sched
    hidden = theirs["hidden_size"]
    ffn = theirs["ffn"] if isinstance(theirs["ffn"], int) else 4 * hidden
    aspects = {
        "name": _size_in(ours.run.name) == _size_in(theirs["run_name"]),
        "time_limit": span(ours.run.time_limit) == span(theirs["time_limit"]),
        "max_time": span(ours.trainer.max_time) == span(theirs["max_time"]),
        "num_nodes": ours.trainer.num_nodes == theirs["num_nodes"],
        "precision": ours.precision == theirs["precision"],
        "max_steps": ours.trainer.max_steps == theirs["max_steps"],
        "batch": ours.model.global_batch_size == theirs["gbs"],
        "layers": stack_.num_layers == theirs["num_layers"],
        "width": (stack_.hidden_size, stack_.num_attention_heads, stack_.ffn_hidden_size)
        == (hidden, theirs["heads"], ffn),
        "kv_channels": stack_.kv_channels == theirs["kv"],
        "init_method_std": stack_.init_method_std == theirs["init_method_std"],
        "lr": (optim.lr, sched.min_lr) == (theirs["lr"], theirs["min_lr"]),
        "warmup": (sched.warmup_steps, sched.warmup_ratio) == (theirs["warmup_steps"], theirs["warmup_ratio"]),
        "constant_steps": sched.constant_steps == (theirs["constant_steps"] or 0),
        "sequence_parallel": ours.model.sequence_parallel == theirs["sequence_parallel"],
        "seq_length": ours.model.data.seq_length == theirs["seq"],
    }
    return {name for name, same in aspects.items() if not same}


def _size_in(name: str) -> float | None:
    """Of `gpt3_843m_seq4096` the 843 million."""
    return parameters_of_size(name.split("_")[1])


def span(text: str | None) -> timedelta:
    """`2-12:00:00` and `02:12:00:00`."""
    days, hours, minutes, seconds = (int(x) for x in re.split("[-:]", text or ""))
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


def job_minutes(given: Given) -> tuple[float, float]:
    """How long a run may take by its trainer, and by its scheduler without the time that it leaves for starting."""
    minutes = given["max_minutes_per_run"]
    run = launch.Run(name="run", directory=Path("results/x/runs/run"), nodes=1, max_minutes=minutes)
    scheduled = launch.run_parameters(run, a100(80))["time"] - launch.jobs.SCHEDULER_MARGIN_MINUTES
    return span(lightning_time(timedelta(minutes=minutes))).total_seconds() / 60, scheduled


def other_minutes(ours: tuple[float, float], theirs: str) -> set[str]:
    return set() if set(ours) == {span(theirs).total_seconds() / 60} else {"value"}


# ---------------------------------------------------------------- layouts

LIMITS = files.read(files.data_directory("base_configs") / "search_space.yaml", SearchLimits)
FRAMEWORK = files.read_framework(WORKER_FRAMEWORK)
NO_RECOMPUTE = SearchSpace(vpp=(1,), recompute=((Recompute.NONE, None),))

#: A node, and the replicas that share a batch where a case does not say how many GPUs there are.
NODE = 8


@functools.cache
def a100(memory_gb: int) -> Cluster:
    """Nodes of the GPUs that the predecessor's tables are of, or of those that have this memory."""
    return rates.cluster_of({40: "a100-40gb", 80: "a100-80gb", 141: "h200"}[memory_gb], None)


def workload(preset: Preset, gbs: int, gpus: int) -> Workload:
    return Workload(shape=preset.shape, gbs=gbs, gpus=gpus, gpus_per_node=NODE, dropout=preset.dropout > 0)


@functools.cache
def all_layouts(space: SearchSpace, work: Workload) -> frozenset[Layout]:
    return frozenset(enumerate_layouts(space, work, LIMITS).layouts.rows())


def batch_and_memory(given: Given) -> tuple[Preset, Cluster]:
    return model_of_case(given), a100(given["gpu_memory_gb"])


def other_start(ours: tuple[Preset, Cluster], theirs: Sequence[int]) -> set[str]:
    """The batch, and whether the layout to start from splits our model and fits by our memory model."""
    preset, cluster = ours
    gbs, tp, pp = theirs[:3]
    found = {"batch"} if preset.global_batch_size != gbs else set()
    work = workload(preset, gbs, gpus=tp * pp * NODE)
    space = SearchSpace(tp=(tp,), pp=(pp,), vpp=(1,), cp=(1,), mbs=(1,))
    layouts = enumerate_layouts(space, work, LIMITS).layouts
    if not len(layouts):
        return found | {"split"}
    predictions = predict(layouts, stack([(work, replace(cluster, nodes=tp * pp), FRAMEWORK)]))
    return found | (set() if predictions.p_fit.max() > 1 / 2 else {"memory"})


def grid_of_case(given: Given) -> tuple[Preset, SearchSpace]:
    """The model, and the axes as the user listed them; what was `auto` is ours to choose."""
    preset = model_of_case(given)
    encoder_layers = given["num_layers"] if preset.encoder_num_layers else None
    preset = replace(preset, num_layers=given["num_layers"], encoder_num_layers=encoder_layers)
    wishes = given.get("overrides") or given.get("train_cfg") or {}
    names = {"tp": "tensor", "pp": "pipeline", "cp": "context", "ep": "expert"}
    keys = {axis: f"{name}_parallel_sizes" for axis, name in names.items()} | {"mbs": "micro_batch_sizes"}
    listed = {axis: wishes.get(key, "auto") for axis, key in keys.items()}
    axes = {axis: tuple(values) for axis, values in listed.items() if values != "auto"}
    return preset, replace(NO_RECOMPUTE, **axes)


def other_grid(ours: tuple[Preset, SearchSpace], theirs: Given) -> set[str]:
    """Which of the predecessor's layouts could start and are not among ours; eight replicas share the batch."""
    preset, space = ours
    missing = set()
    for pp in theirs["pp"]:
        for cp in theirs["cp"]:
            work = workload(preset, preset.global_batch_size, gpus=pp * (cp or 1) * NODE * NODE)
            known = all_layouts(space, work)
            layouts = [
                Layout(tp=tp, pp=pp, cp=cp or 1, ep=ep or 1, mbs=mbs)
                for tp in theirs["tp"]
                for ep in theirs["ep"]
                for mbs in theirs["mbs"]
                if theirs["min_mp"] <= tp * pp * (cp or 1) * (ep or 1) <= theirs["max_mp"]
            ]
            missing |= {x for x in layouts if x not in known and refusal(x, work) is None}
    return {_kind(layout) for layout in missing}


def _kind(layout: Layout) -> str:
    """Why a layout may be missing."""
    if layout.mbs.bit_count() > 1:
        return "micro batches of no power of two"
    return "large micro batches" if layout.mbs > max(LIMITS.mbs) else "layouts"


def candidates_of_case(given: Given) -> tuple[Workload, Preset]:
    family, _, size = given["search_config"].partition("/")
    is_known = size != "unknown_size"
    preset = catalogue.preset(given["search_config"]) if is_known else model(family, given["model_size_in_b"])
    gbs, gpus = given.get("gbs", preset.global_batch_size), given.get("gpu_count", NODE)
    return workload(preset, gbs, gpus), preset


def other_candidates(ours: tuple[Workload, Preset], theirs: Given) -> set[str]:
    """Whether all of its layouts are ours too, but for those that it was found to launch in vain."""
    work, preset = ours
    layouts = [Layout.parse(re.sub("[ce]pNone", "", words).strip().replace(" ", "-")) for words in theirs["layouts"]]
    # The user of these searches lists the sizes of context parallelism.
    space = replace(NO_RECOMPUTE, cp=tuple({layout.cp for layout in layouts}), mbs=(1,))
    known = all_layouts(space, work)
    absent = [layout for layout in layouts if layout not in known]
    in_vain = {"world_not_divisible", "mp_gt_world"} & set(theirs["infeasible_reasons"])
    is_refused = all(refusal(layout, work) for layout in absent)
    found = set() if is_refused and bool(absent) == bool(in_vain) else {"layouts"}
    return found | ({"batch"} if preset.global_batch_size != work.gbs else set())


def recomputation(given: Given) -> tuple[int, Sequence[Layout]]:
    """The layers of a stage, and all layouts on this pipeline."""
    preset = of_family(given["model_name"], given["num_layers"])
    pp = given["pp"]
    work = workload(preset, gbs=pp * NODE**3, gpus=pp * NODE)
    found = enumerate_layouts(SearchSpace(tp=(1,), pp=(pp,), cp=(1,), mbs=(1,)), work, LIMITS)
    return preset.shape.pipeline_layers // pp, found.layouts.rows()


def other_recomputation(ours: tuple[int, Sequence[Layout]], theirs: Given) -> set[str]:
    """Whether we try its virtual pipeline, and for each of its numbers of layers one within an eighth of the chunk.

    An eighth is rounded up to layers. The predecessor's None is what its base config has: selective recomputation or
    none. Its partial recomputation by microbatches is NeMo's alone.
    """
    layers, layouts = ours
    vpp = theirs["virtual_pipelines"] or 1
    chunk = layers // vpp
    tried = {x.recompute: 0 for x in layouts if x.vpp == vpp and not x.recompute.is_full}
    if not tried:
        return {"virtual pipeline"}
    counts = {0} if Recompute.NONE in tried else set()
    counts |= {chunk for x in layouts if x.vpp == vpp and x.recompute is Recompute.UNIFORM}
    counts |= {x.recompute_num_layers for x in layouts if x.vpp == vpp and x.recompute is Recompute.BLOCK}
    for count in theirs["act_ckpt_layers"]:
        if count is None and not {Recompute.NONE, Recompute.SELECTIVE} <= set(tried):
            return {"recomputation"}
        if count is not None and min(abs(count - mine) for mine in counts) > chunk / 8 + 0.5:
            return {"recomputation"}
    return set()


# ---------------------------------------------------------------- serving

#: What the predecessor asked of every model that it served.
REQUESTS = Lengths(input_len=60, output_len=20)


@functools.cache
def serving_plan() -> ServingPlan:
    """All ways to serve a model of 96 heads and 96 layers on nodes of eight."""
    asked = ServingSpace(tp=(1, 2, 4, 8, 16, 32), pp=(1, 2, 3, 4, 8), batch_sizes=(1,))
    return make_serving_plan(
        ServingRequest(model="gpt3/175b", cluster="dgx-a100", nodes=32, workload=(REQUESTS,), space=asked)
    )


def serving_nodes(given: Given) -> int:
    """Nodes of a replica; 0 where it cannot be there."""
    plan, layout = serving_plan(), ServingLayout(tp=given["tp"], pp=given["pp"])
    assert plan.cluster.gpus_per_node == given["gpus_per_node"]
    space = ServingSpace(tp=(layout.tp,), pp=(layout.pp,), cuda_graphs=(False,))
    found = enumerate_points(space, [REQUESTS], plan.config.shape, plan.cluster, nodes=plan.nodes, precision="bf16")
    return plan.nodes_of(layout) if found.points else 0


def serving_points(given: Given) -> ServingCandidates:
    """The points of one of its searches, on as many nodes as there are; its models are wider where heads ask for it."""
    heads, shape = given["heads"], catalogue.preset(given["search_config"]).shape
    width = heads * shape.kv_channels
    groups = {"num_attention_heads": heads, "num_query_groups": heads}
    shape = replace(shape, num_layers=given["layers"], hidden_size=width, ffn_hidden_size=4 * width, **groups)
    space = ServingSpace(
        tp=tuple(given["tp"]), pp=tuple(given["pp"]), batch_sizes=tuple(given["batch_sizes"]), cuda_graphs=(False,)
    )
    plan = serving_plan()
    return enumerate_points(space, [REQUESTS], shape, plan.cluster, nodes=plan.nodes, precision="bf16")


def other_points(ours: ServingCandidates, theirs: Given) -> set[str]:
    """Which layouts are tried, on how many nodes those are that both try, and how many points both have of them."""
    mine = {(point.layout.tp, point.layout.pp): point.layout for point in ours.points}
    kept = [(tp, pp) for tp, pp in theirs["kept_tp_pp"]]
    both = [split for split in kept if split in mine]
    nodes = dict(zip(kept, theirs["nodes"], strict=True))
    batches = theirs["n_jobs"] // len(kept)
    aspects = {
        "fewer layouts": set(kept) <= mine.keys(),
        "more layouts": mine.keys() <= set(kept),
        "nodes": all(serving_plan().nodes_of(mine[split]) == nodes[split] for split in both),
        "batches": len(ours.points) == batches * len(mine),
    }
    return {name for name, same in aspects.items() if not same}


def served_samples(given: Given) -> float:
    """As the table says it that has its columns."""
    words = {"tp": given["tp"], "pp": given["pp"], "batch": given["batch_size"], "latency_ms": given["latency_ms"]}
    return predecessor_row(**words)[PREDECESSOR_COLUMNS[-1]]


# ---------------------------------------------------------------- the cases

#: Sizes and days have two decimals.
SIZE = Comparison(recommended_size, near(0.05, 0.0051))
DAYS = Comparison(training_days, near(0.04, 0.0051))
PARAMETERS = Comparison(parameters, near(2e-4, 5.1e-7))
SHAPE = Comparison(shape_of, other_shape)
GRID = Comparison(grid_of_case, other_grid)
START = Comparison(batch_and_memory, other_start)

COMPARISONS: Mapping[str, Comparison] = {
    "estimate_model_size": SIZE,
    "estimate_training_days": DAYS,
    "gbs_tp_pp_cp_ep": START,
    "param_count_b": PARAMETERS,
    "shape_for_size": SHAPE,
    "grid": GRID,
    "act_ckpt_ranges": Comparison(recomputation, other_recomputation),
    "tflops": Comparison(tflops, other_rate),
    "base_config": Comparison(base_config, other_config),
    "candidate_set": Comparison(candidates_of_case, other_candidates),
    "job_time_limit": Comparison(job_minutes, other_minutes),
    "inference_nodes": Comparison(serving_nodes, near(0, 0)),
    "inference_grid": Comparison(serving_points, other_points),
    "inference_throughput": Comparison(served_samples, near(0, 0.00051)),
    "nemo2_model_size": SIZE,
    "nemo2_training_days": DAYS,
    "nemo2_grid": GRID,
    "nemo2_shape": SHAPE,
    "nemo2_size_from_class_name": Comparison(size_of_recipe, near(0.05, 0)),
    "unit_estimate_model_size": SIZE,
    "unit_training_days": DAYS,
    "unit_gbs_tp_pp": START,
    "unit_param_count_b": PARAMETERS,
    "unit_shape": SHAPE,
    "unit_grid": GRID,
}

#: The one defect that has its own test.
UNCOMPARED = ("results_sort",)


@functools.cache
def cases(path: Path) -> Mapping[str, Sequence[Case]]:
    document = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    return {
        group: [
            Case(
                group=group,
                number=int(entry["id"].rpartition("-")[2]),
                given=entry["in"],
                answer=entry["out"],
                is_defect="ancestor_bug" in entry,
            )
            for entry in entries
        ]
        for group, entries in document.items()
    }


def known_cases() -> Mapping[str, Sequence[Case]]:
    """All cases where they are at hand, else the committed part of them."""
    return cases(WHOLE if WHOLE.is_file() else PART)


@functools.cache
def reasons() -> Sequence[Reason]:
    path = ROOT / "tests" / "data" / "parity_reasons.yaml"
    entries = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    return [files.parse(entry, Reason, f"{path.name}: {i}") for i, entry in enumerate(entries, start=1)]


def differences(case: Case) -> set[str]:
    """The aspects in which the answers differ; that only one side has an answer is one of its own."""
    comparison = COMPARISONS.get(case.group)
    if comparison is None:
        return {"uncompared"}
    try:
        ours = comparison.ours(case.given)
    except (InputError, ValueError):
        return set() if case.is_refused else {"only theirs answers"}
    return {"only ours answers"} if case.is_refused else comparison.differing(ours, case.answer)


@functools.cache
def outcomes(group: str) -> Mapping[str, set[str]]:
    """The differences of each case of a group that is no defect."""
    return {case.name: differences(case) for case in known_cases()[group] if not case.is_defect}


@pytest.mark.parametrize("group", [*COMPARISONS, *UNCOMPARED])
def test_every_case_agrees_or_has_its_reason(group: str) -> None:
    wrong = {}
    for case in known_cases()[group]:
        explained = {aspect for reason in reasons() if reason.covers(case) for aspect in reason.differing}
        if case.is_defect:
            found: set[str] = set() if not explained else {"a defect needs no reason"}
        else:
            found = outcomes(group)[case.name] ^ explained
        if found:
            wrong[case.name] = f"{sorted(found)}: {'no longer so' if found <= explained else 'no reason'}"
    assert not wrong


def test_every_reason_is_one_line_and_of_known_cases() -> None:
    known = {(case.group, case.number) for group in cases(PART).values() for case in group}
    if WHOLE.is_file():
        known = {(case.group, case.number) for group in known_cases().values() for case in group}
    for reason in reasons():
        assert "\n" not in reason.reason
        assert len(reason.reason) <= 200
        for group, listed in reason.cases.items():
            assert group in known_cases()
            if listed != "all" and WHOLE.is_file():
                assert {(group, number) for number in numbers(listed)} <= known, reason.reason


def test_the_agreement_does_not_erode() -> None:
    if not WHOLE.is_file():
        pytest.skip("all cases are not at hand")
    agreeing = Counter({group: sum(not x for x in outcomes(group).values()) for group in known_cases()})
    counted = ", ".join(f"{group} {n} of {len(known_cases()[group])}" for group, n in agreeing.items())
    assert agreeing.total() >= AGREEING, counted


def test_the_committed_cases_are_a_part_of_all() -> None:
    assert set(cases(PART)) == {*COMPARISONS, *UNCOMPARED}
    if WHOLE.is_file():
        for group, part in cases(PART).items():
            assert all(case in cases(WHOLE)[group] for case in part)
