"""The timed runs that stand for the full training: their nodes, their work, and what is expected of them."""

from dataclasses import fields, replace

import numpy as np
import pytest

from hptool.base_config import BaseConfig
from hptool.candidates import Layout, Layouts, Recompute, SearchSpace
from hptool.facts import Cluster
from hptool.plan import Plan, SearchRequest, make_plan
from hptool.predict import Predictions, predict, stack
from hptool.timed_runs import fewest_nodes, landscape, timed_run
from tests.conftest import preset_config
from tests.worker.runs import tiny_config, tiny_family


def experts(layout: Layout) -> BaseConfig:
    """A tiny model with experts on four nodes of four."""
    size = {"trainer__num_nodes": 4, "trainer__devices": 4, "model__global_batch_size": 32}
    return tiny_config(**tiny_family("moe", **size)).with_layout(replace(layout, mbs=1))


@pytest.mark.parametrize(
    ("layout", "nodes"),
    [
        (Layout(), 1),
        (Layout(ep=4), 1),
        (Layout(tp=2, ep=4), 2),
        (Layout(tp=2, ep=2, pp=2), 2),
        (Layout(pp=4, ep=4), 4),
        (Layout(cp=4, ep=4), 1),
    ],
)
def test_a_run_has_the_fewest_nodes_that_hold_all_experts(layout: Layout, nodes: int) -> None:
    full = experts(layout)
    assert fewest_nodes(Layouts.of([full.layout]), 4).tolist() == [nodes]
    run = timed_run(full, full.layout, nodes=nodes, steps=8, max_minutes=5)
    assert run.trainer.num_nodes == nodes
    assert run.gpus % (layout.tp * layout.ep * layout.pp) == 0
    # A replica works through as many microbatches as on all nodes.
    assert run.num_microbatches == full.num_microbatches


def test_a_run_takes_the_fewest_nodes_and_each_replica_its_real_work(dgx_a100: Cluster) -> None:
    config = preset_config("5b", dgx_a100, 12)
    for layout, nodes, replicas in (
        (Layout(tp=8), 1, 1),
        (Layout(tp=2), 1, 4),
        (Layout(tp=8, pp=2), 2, 1),
        (Layout(tp=4, pp=3), 3, 2),
    ):
        full = config.with_layout(layout)
        assert fewest_nodes(Layouts.of([full.layout]), 8).tolist() == [nodes]
        run = timed_run(config, layout, nodes=nodes, steps=50, max_minutes=5)
        assert run.trainer.num_nodes == nodes
        assert run.dp == replicas
        assert run.num_microbatches == full.num_microbatches
        assert run.model.global_batch_size * full.dp == full.model.global_batch_size * run.dp
        assert (run.trainer.max_steps, run.trainer.max_time) == (50, "00:00:05:00")


def test_a_run_on_all_nodes_is_the_full_training_but_for_its_length(dgx_a100: Cluster) -> None:
    full = preset_config("5b", dgx_a100, 4).with_layout(Layout(tp=2, mbs=2))
    run = timed_run(full, full.layout, nodes=4, steps=50, max_minutes=5)
    assert run.model == full.model
    assert run.workload == full.workload


# ---------------------------------------------------------------- what is expected of them

SPACE = SearchSpace(vpp=(1,), mbs=(1, 2), recompute=((Recompute.NONE, None),))


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A model whose optimizer does not fit into few nodes, under most of its layouts."""
    return make_plan(SearchRequest(model="gpt3/20b", cluster="dgx-a100", nodes=32, space=SPACE))


def same(a: Predictions, b: Predictions, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> bool:
    columns = [f.name for f in fields(Predictions) if f.name not in ("layouts", "memory", "step_time")]
    return all(np.allclose(getattr(a, name)[rows], getattr(b, name)[rows]) for name in columns)


def test_each_row_is_the_run_of_the_layout_in_that_row(plan: Plan) -> None:
    made, nodes = landscape(plan.config, plan.predictions, plan.cluster, plan.framework)
    assert made.run.layouts.rows() == made.target.layouts.rows() == plan.candidates.layouts.rows()
    for row in range(0, len(nodes), 17):
        layout = made.run.layouts.row(row)
        # The prediction of this one run, by the same path as that of a full training.
        run = timed_run(plan.config, layout, nodes=int(nodes[row]), steps=8, max_minutes=5)
        alone, _ = landscape(run, one(plan, run), plan.cluster, plan.framework)
        assert alone.run.step_time_s[0] == pytest.approx(made.run.step_time_s[row])
        assert alone.run.memory_gib[0] == pytest.approx(made.run.memory_gib[row])


def one(plan: Plan, config: BaseConfig) -> Predictions:
    return predict(Layouts.of([config.layout]), stack([(config.workload, plan.cluster, plan.framework)]))


def test_layouts_get_more_nodes_until_they_fit_as_surely_as_on_all(plan: Plan) -> None:
    made, nodes = landscape(plan.config, plan.predictions, plan.cluster, plan.framework)
    fewest = fewest_nodes(made.target.layouts, plan.cluster.gpus_per_node)
    assert np.all(nodes % fewest == 0)
    assert np.all(nodes <= plan.nodes)
    assert np.all((made.run.p_fit >= made.target.p_fit - 0.05) | (nodes == plan.nodes))
    more = np.flatnonzero(nodes > fewest)
    assert len(more)
    # With fewer they were not as sure to fit, or they would have got them.
    for row in more[:: max(1, len(more) // 10)]:
        layout = made.target.layouts.row(int(row))
        fewer = timed_run(plan.config, layout, nodes=int(nodes[row]) // 2, steps=8, max_minutes=5)
        if fewer.trainer.num_nodes % fewest[row] == 0:
            assert one(plan, fewer).p_fit[0] < made.target.p_fit[row] - 0.05


def test_a_run_on_all_nodes_is_expected_to_take_what_the_training_takes(plan: Plan) -> None:
    made, nodes = landscape(plan.config, plan.predictions, plan.cluster, plan.framework)
    on_all = np.flatnonzero(nodes == plan.nodes)
    assert len(on_all)
    assert same(made.run, made.target, on_all)


def test_a_run_on_fewer_nodes_takes_no_longer_and_no_less_memory(plan: Plan) -> None:
    made, _ = landscape(plan.config, plan.predictions, plan.cluster, plan.framework)
    assert np.all(made.run.step_time_s <= made.target.step_time_s * 1.05)
    assert np.all(made.run.memory_gib >= made.target.memory_gib * (1 - 1e-9))


def test_on_one_node_a_run_is_the_training() -> None:
    plan = make_plan(SearchRequest(model="gpt3/tiny", cluster="local"))
    made, nodes = landscape(plan.config, plan.predictions, plan.cluster, plan.framework)
    assert set(nodes.tolist()) == {1}
    assert same(made.run, made.target, np.arange(len(nodes)))
