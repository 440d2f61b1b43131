"""What the enumeration calls legal starts, and trains what every other layout trains. Nothing is left to chance."""

from pathlib import Path
from typing import Any

import pytest

from hptool import files
from hptool.base_config import BaseConfig
from hptool.candidates import Layout, Recompute, SearchLimits, SearchSpace, enumerate_layouts
from tests.worker.runs import FAMILIES, Launcher, tiny_config, tiny_family

LIMITS = SearchLimits(
    mbs=(1, 4), long_mbs=4, max_microbatch_tokens=1, min_tokens_per_cp_rank=16, block_fractions=(0.5,)
)
MODES = ((Recompute.NONE, None), (Recompute.SELECTIVE, None), (Recompute.UNIFORM, None), (Recompute.BLOCK, None))


def legal(gpus: int, family: str | None = None) -> tuple[BaseConfig, list[Layout]]:
    """A config of this many ranks on one node, and all layouts that it may have."""
    changes = tiny_family(family) if family else {}
    config = tiny_config(**changes, trainer__devices=gpus, trainer__max_steps=2)
    return config, enumerate_layouts(SearchSpace(recompute=MODES), config.workload, LIMITS).layouts.rows()


TWO, TWO_LAYOUTS = legal(2)
FOUR, FOUR_LAYOUTS = legal(4)
# Of four ranks those that no two can have: three kinds of parallelism at once, four stages, TP4.
FOUR_LAYOUTS = [x for x in FOUR_LAYOUTS if x.mbs == 1 and (x.gpus_per_replica == 4 or x.vpp > 1)][::5]
TWO_LAYOUTS = TWO_LAYOUTS[::3]


def spread(layouts: list[Layout], numbers: range) -> list[Layout]:
    """One for each number, as far apart as they lie: a golden stride, so that no axis is the same in all."""
    return [layouts[int(len(layouts) * (0.618 * (i + 2) % 1))] for i in numbers]


#: Of each family one on four ranks.
FAMILY_LAYOUTS = [
    (family, config, layout)
    for i, family in enumerate(FAMILIES)
    for config, layouts in [legal(4, family)]
    for layout in spread([x for x in layouts if x.mbs == 1 and x.gpus_per_replica * x.ep > 1], range(i + 23, i + 24))
]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process with everything on one rank."""
    return list(Launcher(tmp_path_factory.mktemp("one")).run(trainer__max_steps=2).losses)


@pytest.mark.parametrize(
    ("config", "layout"),
    [(TWO, x) for x in TWO_LAYOUTS] + [(FOUR, x) for x in FOUR_LAYOUTS],
    ids=lambda value: value.name if isinstance(value, Layout) else str(value.gpus),
)
def test_a_legal_layout_trains_the_same_model(
    config: BaseConfig, layout: Layout, one_process: list[float], tmp_path: Path
) -> None:
    run = Launcher(tmp_path).start_text(files.yaml_text(config.with_layout(layout).document()))
    assert run.wait() == 0, run.failures
    assert list(run.measurement.losses) == pytest.approx(one_process, rel=1e-5)


@pytest.fixture(scope="module")
def one_process_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """As `one_process`, by family; with the micro batch of the layouts, on which the load of experts depends."""
    launcher = Launcher(tmp_path_factory.mktemp("families"))
    steps: dict[str, Any] = {"trainer__max_steps": 2, "model__micro_batch_size": 1}
    return {family: list(launcher.run(**tiny_family(family, **steps)).losses) for family in FAMILIES}


@pytest.mark.parametrize(
    ("family", "config", "layout"),
    FAMILY_LAYOUTS,
    ids=lambda value: value.name if isinstance(value, Layout) else value if isinstance(value, str) else "",
)
def test_a_legal_layout_of_a_family_trains_the_same_model(
    family: str, config: BaseConfig, layout: Layout, one_process_of: dict[str, list[float]], tmp_path: Path
) -> None:
    run = Launcher(tmp_path).start_text(files.yaml_text(config.with_layout(layout).document()))
    assert run.wait() == 0, run.failures
    assert list(run.measurement.losses) == pytest.approx(one_process_of[family], rel=1e-5)


def test_the_layouts_tried_of_families_cover_their_axes() -> None:
    for axis in ("tp", "pp", "vpp", "cp", "ep"):
        assert {getattr(layout, axis) for _, _, layout in FAMILY_LAYOUTS} >= {1, 2}, axis
    assert {family for family, _, _ in FAMILY_LAYOUTS} == set(FAMILIES)
    assert {layout.recompute for _, _, layout in FAMILY_LAYOUTS} == set(Recompute)


def test_the_layouts_tried_here_cover_every_axis() -> None:
    for axis, values in {"tp": {1, 2}, "pp": {1, 2}, "vpp": {1, 2}, "cp": {1, 2}, "mbs": {1, 4}}.items():
        assert {getattr(x, axis) for x in TWO_LAYOUTS} == values, axis
    assert {x.recompute for x in TWO_LAYOUTS} == set(Recompute)
    assert {(x.tp, x.pp, x.cp) for x in FOUR_LAYOUTS} >= {(2, 2, 1), (4, 1, 1), (1, 4, 1), (1, 2, 2), (2, 1, 2)}
