"""The models that are measured, as searches of hptool's on one device: `plan_of` is the plan that a search would make.

No config is written here: presets and sizes come from `base_configs/` (gpt3/1.3b and gpt3/2.7b have the shapes of Brown
et al. 2020, arXiv 2005.14165, table 2.1), and what differs is an override, as users give them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hptool.candidates import Recompute, SearchSpace
from hptool.facts import Cluster
from hptool.plan import Plan, SearchRequest, make_plan
from hptool.worker.supervisor import NodeJob

#: Without dropout, as large models are trained now, as published rates are measured, and as tables of runs assume.
_NO_DROPOUT = ("model.hidden_dropout=0", "model.attention_dropout=0")
_NO_T5_DROPOUT = tuple(
    f"model.{part}.{kind}_dropout=0" for part in ("encoder", "decoder") for kind in ("hidden", "attention")
)

#: A run that is not over after so long hangs: the longest here is expected to take one.
MAX_MINUTES = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model with its global batch; `mbs` are the micro batches that are tried, `recompute` the modes."""

    name: str
    preset: str
    gbs: int
    mbs: tuple[int, ...]
    recompute: tuple[tuple[Recompute, int | None], ...] | None = None
    changes: tuple[str, ...] = field(default=_NO_DROPOUT)

    @property
    def overrides(self) -> tuple[str, ...]:
        """As `hptool search-train` takes them."""
        return (*self.changes, f"model.global_batch_size={self.gbs}")

    @property
    def space(self) -> SearchSpace:
        """What is tried on one device."""
        return SearchSpace(tp=(1,), pp=(1,), vpp=(1,), cp=(1,), ep=(1,), mbs=self.mbs, recompute=self.recompute)


_NONE = ((Recompute.NONE, None),)
_ALL_MBS = (1, 2, 4, 8, 16, 32, 64)
_FEW_MBS = (1, 2, 4, 8, 16)

#: What hptool's worker is compared on with a plain PyTorch model. The batch is half of the public reproduction's
#: (github.com/karpathy/build-nanogpt: 0.5M tokens), so that a step takes about half a second.
GPT2 = Model(name="gpt2-124m", preset="gpt3/gpt2_124m", gbs=256, mbs=(16, 32, 64), recompute=_NONE)

#: Of which the utilisation is measured. Batches that take one to two seconds a step on an H100.
UTILISED = (
    Model(name="gpt3-1.3b", preset="gpt3/1.3b", gbs=32, mbs=_FEW_MBS),
    Model(name="gpt3-2.7b", preset="gpt3/2.7b", gbs=16, mbs=_FEW_MBS),
    Model(name="llama3.2-1b", preset="llama/llama3.2_1b_seq4096", gbs=16, mbs=_FEW_MBS),
    Model(name="llama3.2-3b", preset="llama/llama3.2_3b_seq4096", gbs=8, mbs=(1, 2, 4, 8)),
)

#: Whose whole grids are measured, the quick ones first.
LANDSCAPES = (
    Model(name="gpt3-126m", preset="gpt3/126m", gbs=64, mbs=_ALL_MBS),
    Model(name="bert-large", preset="bert/large", gbs=64, mbs=_ALL_MBS),
    Model(name="t5-220m", preset="t5/0.22b", gbs=64, mbs=_ALL_MBS, changes=_NO_T5_DROPOUT),
    Model(name="gpt3-1.3b", preset="gpt3/1.3b", gbs=64, mbs=_ALL_MBS),
    Model(name="gpt3-2.7b", preset="gpt3/2.7b", gbs=64, mbs=_ALL_MBS),
)

#: What stands for all of these where the suite itself is tried, on a CPU.
TINY_GPT2 = Model(name="gpt-tiny", preset="gpt3/tiny", gbs=8, mbs=(8,), recompute=_NONE)
TINY_UTILISED = (Model(name="llama-tiny", preset="llama/tiny", gbs=4, mbs=(1, 2), recompute=_NONE),)
TINY_LANDSCAPES = (Model(name="gpt-tiny", preset="gpt3/tiny", gbs=4, mbs=(2, 4), recompute=_NONE),)

#: One of each family, for what must be the same on a CPU and on a GPU.
FAMILIES = (
    Model(name="gpt3", preset="gpt3/tiny", gbs=8, mbs=(4,), recompute=_NONE),
    Model(name="llama", preset="llama/tiny", gbs=8, mbs=(4,), recompute=_NONE),
    Model(name="bert", preset="bert/tiny", gbs=8, mbs=(4,), recompute=_NONE),
    Model(name="t5", preset="t5/tiny", gbs=8, mbs=(4,), recompute=_NONE, changes=_NO_T5_DROPOUT),
)


def named(models: Sequence[Model], name: str) -> Model:
    """The model of this name; LookupError where there is none."""
    found = next((model for model in models if model.name == name), None)
    if found is None:
        msg = f"{name}: unknown model; known are {', '.join(model.name for model in models)}"
        raise LookupError(msg)
    return found


def plan_of(model: Model, cluster: Cluster, overrides: Sequence[str] = ()) -> Plan:
    """What a search for the fastest layout of the model would plan. InputError where it cannot be read."""
    request = SearchRequest(
        model=model.preset,
        cluster=cluster.name,
        space=model.space,
        overrides=(*model.overrides, *overrides),
        max_minutes_per_run=MAX_MINUTES,
    )
    return make_plan(request, cluster=cluster)


def rows_of(plan: Plan) -> dict[str, int]:
    """The rows of the plan's layouts by their names."""
    return {layout.name: row for row, layout in enumerate(plan.candidates.layouts.rows())}


def node_job(config_path: str, directory: str, owner_pid: int) -> NodeJob:
    """A measured run, as a search starts it."""
    return NodeJob(config_path=config_path, run_directory=directory, max_minutes=MAX_MINUTES, owner_pid=owner_pid)
