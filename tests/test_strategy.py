"""Strategies: what they learn, what they run next, when they stop, and how they fare where predictions are wrong."""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hptool import files
from hptool.candidates import Layout, Layouts, Recompute, SearchSpace, enumerate_layouts
from hptool.errors import InputError
from hptool.facts import Cluster
from hptool.predict import Predictions, predict, stack
from hptool.predict.belief import believed_fit, features
from hptool.predict.parts import Column
from hptool.strategy import (
    STRATEGIES,
    WORTH_A_RUN,
    Adaptive,
    Ending,
    InOrder,
    Landscape,
    Proposal,
    Stop,
    Strategy,
    Trial,
    make,
    outlook,
)
from tests.conftest import preset_config
from tests.test_candidates import LIMITS

#: Without recomputation, and with all of it.
SPACE = SearchSpace(vpp=(1, 2), recompute=((Recompute.NONE, None), (Recompute.UNIFORM, 1)))


def predicted(cluster: Cluster, model: str, nodes: int, space: SearchSpace = SPACE) -> Predictions:
    """All layouts of a model on so many nodes, as of a worker that nobody has fitted."""
    config = preset_config(model, cluster, nodes)
    layouts = enumerate_layouts(space, config.workload, LIMITS).layouts
    return predict(layouts, stack([(config.workload, cluster, files.read_framework("hptool-worker"))]))


@pytest.fixture(scope="module")
def landscape() -> Landscape:
    """The 20B model on four nodes, on which many layouts do not fit."""
    cluster = files.read_cluster("dgx-a100")
    p = predicted(cluster, "20b", 4)
    assert 100 < len(p) < 1000
    assert 0.1 < np.mean(p.p_fit < 0.5) < 0.9
    return Landscape(target=p, run=p, memory_gib=cluster.gpu.memory_gib)


def measured(landscape: Landscape, row: int, times: float = 1.0) -> Trial:
    """A run that took so many times what was predicted."""
    return Trial(row=row, ending=Ending.MEASURED, step_time_s=float(landscape.run.step_time_s[row]) * times)


def row_of(landscape: Landscape, **axes: int) -> int:
    wanted = Layout(**({"recompute": Recompute.NONE} | axes))  # type: ignore[arg-type]
    return landscape.target.layouts.rows().index(wanted)


# ---------------------------------------------------------------- what every strategy keeps to


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """How runs of a landscape end: `times` longer than predicted, out of memory, or failed."""

    landscape: Landscape
    times: Column
    ending: Sequence[Ending]

    def trial(self, row: int) -> Trial:
        if self.ending[row] is Ending.MEASURED:
            return measured(self.landscape, row, float(self.times[row]))
        return Trial(row=row, ending=self.ending[row])


def some_truth(landscape: Landscape, seed: int) -> Truth:
    generator = np.random.default_rng(seed)
    p = landscape.target
    fits = generator.random(len(p)) < p.p_fit
    lucky = generator.random(len(p)) < 0.9
    endings = [
        Ending.OOM if not fit else Ending.MEASURED if good else Ending.FAILED
        for fit, good in zip(fits, lucky, strict=True)
    ]
    return Truth(landscape=landscape, times=np.exp(generator.normal(0, 0.1, len(p))), ending=endings)


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_row_is_proposed_twice_and_the_same_trials_give_the_same_answer(name: str, landscape: Landscape) -> None:
    truth = some_truth(landscape, 0)
    strategy, again = make(name, landscape, seed=3), make(name, landscape, seed=3)
    trials: list[Trial] = []
    for i in range(25):
        answer = strategy.next(trials)
        assert answer == strategy.next(trials) == again.next(trials) or np.isnan(getattr(answer, "expected_gain", 0))
        if isinstance(answer, Stop):
            break
        assert answer.row not in {t.row for t in trials}
        assert (answer.expected_gain == np.inf) == all(t.ending in (Ending.OOM, Ending.FAILED) for t in trials)
        assert answer.why
        # The two before are under way, whatever becomes of them.
        trials = [*(truth.trial(t.row) for t in trials[: max(0, i - 2)]), *trials[max(0, i - 2) :]]
        trials.append(Trial(row=answer.row, ending=Ending.UNDER_WAY))
    assert len(trials) > 5


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_stops_where_no_row_is_left(name: str, landscape: Landscape) -> None:
    few = np.flatnonzero(landscape.target.layouts.recompute == Recompute.NONE)[:4]
    p = landscape.target.select(few)
    small = Landscape(target=p, run=p, memory_gib=landscape.memory_gib)
    trials = [measured(small, row) for row in range(4)]
    assert make(name, small).next(trials) == Stop(why="every layout was run")


def test_names_are_checked(landscape: Landscape) -> None:
    assert set(STRATEGIES) == {"adaptive", "ranked", "grid", "random", "optuna"}
    with pytest.raises(InputError, match="unknown strategy 'best'; allowed are adaptive, ranked"):
        make("best", landscape)


def test_optuna_says_how_to_get_it(landscape: Landscape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "hptool.optuna_strategy", raising=False)
    with pytest.raises(InputError, match=r"pip install 'hptool\[optuna\]'"):
        make("optuna", landscape)


def order(strategy: Strategy, runs: int) -> list[int]:
    """The rows of so many runs that all fail, from which nothing is to be learned but that."""
    trials: list[Trial] = []
    for _ in range(runs):
        answer = strategy.next(trials)
        assert isinstance(answer, Proposal)
        trials.append(Trial(row=answer.row, ending=Ending.FAILED))
    return [t.row for t in trials]


def test_orders_that_learn_nothing(landscape: Landscape) -> None:
    p = landscape.target
    assert order(make("ranked", landscape), 20) == p.ranking()[:20].tolist()
    assert order(make("grid", landscape), 20) == list(range(20))  # layouts are enumerated as nested loops
    one, other = order(make("random", landscape, seed=1), 20), order(make("random", landscape, seed=2), 20)
    assert one != other
    assert order(make("optuna", landscape), 5) == p.ranking()[:5].tolist()


def test_optuna_goes_where_it_is_fast(landscape: Landscape) -> None:
    # All that is cut by 8 in a node is twice as fast as predicted.
    truth = replace(some_truth(landscape, 0), times=np.where(landscape.target.layouts.tp == 8, 0.1, 1.0))
    truth = replace(truth, ending=[Ending.MEASURED] * len(landscape.target))
    strategy = make("optuna", landscape)
    trials: list[Trial] = []
    for _ in range(40):
        answer = strategy.next(trials)
        assert isinstance(answer, Proposal)
        trials.append(truth.trial(answer.row))
    later = landscape.target.layouts.tp[[t.row for t in trials[20:]]]
    assert np.mean(later == 8) > 1.5 * np.mean(landscape.target.layouts.tp == 8)


# ---------------------------------------------------------------- what is believed


def test_before_any_run_what_is_predicted_is_believed(landscape: Landscape) -> None:
    p, now = landscape.target, outlook(landscape, [])
    assert now.step_time_s == pytest.approx(p.step_time_s)
    assert now.tokens_per_s_per_gpu == pytest.approx(p.tokens_per_s_per_gpu)
    assert now.p_fit == pytest.approx(p.p_fit, abs=0.15)  # an error for all, where the misfit and factors are for rows
    assert ((now.p_fit > 0.5) == (p.p_fit > 0.5)).all()
    assert np.median(now.step_time_error) == pytest.approx(np.median(p.step_time_error), rel=0.1)


def test_runs_are_believed_where_they_were_made(landscape: Landscape) -> None:
    trials = [
        measured(landscape, 3, 1.4),
        Trial(row=5, ending=Ending.OOM),
        Trial(row=7, ending=Ending.FAILED),
        replace(measured(landscape, 9, 0.9), step_time_error=0.02),
    ]
    now = outlook(landscape, trials)
    assert now.step_time_s[[3, 9]] == pytest.approx(landscape.target.step_time_s[[3, 9]] * [1.4, 0.9])
    assert now.step_time_error[[3, 9]] == pytest.approx([0, 0.02])
    assert now.p_fit[[3, 5, 9]].tolist() == [1, 0, 1]


def test_what_all_runs_take_longer_all_layouts_are_expected_to(landscape: Landscape) -> None:
    generator = np.random.default_rng(0)
    rows = generator.permutation(len(landscape.target))[:10].tolist()
    now = outlook(landscape, [measured(landscape, row, 1.3) for row in rows])
    others = np.setdiff1d(np.arange(len(landscape.target)), rows)
    ratio = now.step_time_s[others] / landscape.target.step_time_s[others]
    assert np.median(ratio) == pytest.approx(1.3, abs=0.05)
    assert (now.step_time_error < outlook(landscape, []).step_time_error + 1e-9).mean() > 0.95


def test_what_one_size_takes_longer_it_is_expected_to_elsewhere(landscape: Landscape) -> None:
    # Pipelines are slower than predicted, by the same on all sizes of the others.
    pp = landscape.target.layouts.pp
    rows = np.random.default_rng(1).permutation(len(pp))[:12].tolist()
    now = outlook(landscape, [measured(landscape, row, 1.25 if pp[row] > 1 else 1.0) for row in rows])
    ratio = now.step_time_s / landscape.target.step_time_s
    unseen = ~np.isin(np.arange(len(pp)), rows)
    assert np.median(ratio[unseen & (pp > 1)]) > 1.05 * np.median(ratio[unseen & (pp == 1)])


def test_a_run_under_way_takes_doubt_away_and_moves_nothing(landscape: Landscape) -> None:
    known = [measured(landscape, 40, 1.2), measured(landscape, 90, 1.1)]
    before = outlook(landscape, known)
    now = outlook(landscape, [*known, Trial(row=60, ending=Ending.UNDER_WAY)])
    assert now.step_time_s == pytest.approx(before.step_time_s)
    assert now.p_fit == pytest.approx(before.p_fit)
    assert (now.step_time_error <= before.step_time_error + 1e-12).all()
    assert now.step_time_error[60] < 0.03 < before.step_time_error[60]


@pytest.mark.parametrize("wild", [10.0, 0.1])
def test_one_wild_run_moves_little(wild: float, landscape: Landscape) -> None:
    rows = np.random.default_rng(2).permutation(len(landscape.target))[:8].tolist()
    good = outlook(landscape, [measured(landscape, row) for row in rows])
    for odd in rows:
        now = outlook(landscape, [measured(landscape, row, wild if row == odd else 1.0) for row in rows])
        moved = np.abs(np.log(now.step_time_s / good.step_time_s))
        assert np.median(moved) < 0.1


def test_recomputation_has_the_misfit_of_its_cut(landscape: Landscape) -> None:
    plain = row_of(landscape, tp=8, mbs=1)
    full = row_of(landscape, tp=8, mbs=1, recompute=Recompute.UNIFORM, recompute_num_layers=1)
    other = row_of(landscape, tp=1, pp=4, mbs=1)
    now = outlook(landscape, [measured(landscape, plain, 1.2)])
    ratio = now.step_time_s / landscape.target.step_time_s
    assert ratio[full] == pytest.approx(1.2, abs=0.05)
    assert ratio[other] < ratio[full] - 0.03
    assert now.step_time_error[full] < 0.7 * now.step_time_error[other]


def test_a_smaller_run_stands_for_the_whole_cluster_by_what_that_adds() -> None:
    cluster = files.read_cluster("dgx-a100")
    space = replace(SPACE, tp=(8,), pp=(1,), mbs=(1, 2), recompute=((Recompute.NONE, None),))
    target, run = predicted(cluster, "5b", 16, space), predicted(cluster, "5b", 1, space)
    assert target.layouts.rows() == run.layouts.rows()
    # The batch is the same on both: the smaller cluster works longer, and its share of communication is another.
    two = Landscape(target=target, run=run, memory_gib=cluster.gpu.memory_gib)
    now = outlook(two, [measured(two, 0)])
    assert now.step_time_s[0] == pytest.approx(target.step_time_s[0], rel=0.02)
    assert now.step_time_error[0] > 0
    slower = outlook(two, [measured(two, 0, 1.2)])
    assert slower.step_time_s[0] == pytest.approx(1.2 * target.step_time_s[0], rel=0.05)
    back = Landscape(target=run, run=target, memory_gib=cluster.gpu.memory_gib)
    more = outlook(back, [measured(back, 0, 1.2)])
    # What is added was not measured: the factors that were learned stretch it, and the run's own misfit does not.
    added = run.step_time_s[0] - target.step_time_s[0]
    assert added < more.step_time_s[0] - 1.2 * target.step_time_s[0] < 1.2 * added


# ---------------------------------------------------------------- memory


def test_a_run_out_of_memory_makes_fuller_layouts_less_likely_to_fit(landscape: Landscape) -> None:
    p = landscape.target
    odd = int(np.argmin(np.abs(p.p_fit - 0.8)))
    fitted = int(np.argmin(np.abs(p.p_fit - 0.2)))
    open_ = (p.p_fit > 0.05) & (p.p_fit < 0.95)
    open_[[odd, fitted]] = False
    assert open_.sum() > 3
    worse = outlook(landscape, [Trial(row=odd, ending=Ending.OOM)]).p_fit
    better = outlook(landscape, [measured(landscape, fitted)]).p_fit
    before = outlook(landscape, []).p_fit
    assert (worse[open_] < before[open_]).all()
    assert (better[open_] > before[open_]).all()


def test_measured_memory_says_more_than_that_it_fitted(landscape: Landscape) -> None:
    p = landscape.target
    row = int(np.argmin(np.abs(p.memory_gib - 0.7 * landscape.memory_gib)))
    open_ = (p.p_fit > 0.05) & (p.p_fit < 0.95)

    def p_fit(gib: float | None) -> Column:
        return outlook(landscape, [replace(measured(landscape, row), memory_gib=gib)]).p_fit[open_]

    gib = float(p.memory_gib[row])
    assert (p_fit(1.1 * gib) < p_fit(gib)).all()
    assert (p_fit(0.9 * gib) > p_fit(gib)).all()
    assert p_fit(None) == pytest.approx(p.p_fit[open_], abs=0.1)  # which was expected to fit anyway


@settings(deadline=None, max_examples=30)
@given(rows=st.lists(st.integers(0, 99), unique=True, max_size=20), data=st.data())
def test_probabilities_stay_probabilities(rows: list[int], data: st.DataObject, landscape: Landscape) -> None:
    fits = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    p = landscape.target
    found = believed_fit(
        p,
        p,
        landscape.memory_gib,
        np.array(rows, dtype=np.int64),
        fits=np.array(fits, dtype=np.bool_),
        measured_gib=np.full(len(rows), np.nan),
    )
    assert np.isfinite(found).all()
    assert ((found >= 0) & (found <= 1)).all()


# ---------------------------------------------------------------- adaptive


def played(strategy: Strategy, truth: Truth, limit: int = 200) -> tuple[list[Trial], Stop | None]:
    trials: list[Trial] = []
    while len(trials) < limit:
        answer = strategy.next(trials)
        if isinstance(answer, Stop):
            return trials, answer
        trials.append(truth.trial(answer.row))
    return trials, None


def test_where_predictions_hold_a_few_runs_are_enough(landscape: Landscape) -> None:
    p = landscape.target
    fits = p.p_fit > 0.5
    endings = [Ending.MEASURED if fit else Ending.OOM for fit in fits]
    trials, stop = played(
        make("adaptive", landscape), Truth(landscape=landscape, times=np.ones(len(p)), ending=endings)
    )
    assert stop is not None
    assert "less than 1%" in stop.why
    assert len(trials) <= 15
    assert sum(t.ending is Ending.OOM for t in trials) <= 1
    assert max(p.tokens_per_s_per_gpu[t.row] for t in trials) >= 0.99 * p.tokens_per_s_per_gpu[fits].max()


def test_the_first_run_is_fast_and_likely_to_fit(landscape: Landscape) -> None:
    p = landscape.target
    first = make("adaptive", landscape).next([])
    assert isinstance(first, Proposal)
    assert first.row == p.ranking()[0]
    assert p.p_fit[first.row] > 0.5
    second = make("adaptive", landscape).next([Trial(row=first.row, ending=Ending.OOM)])
    assert isinstance(second, Proposal)
    assert second.expected_gain == np.inf  # nothing to compare with yet


def test_recomputation_that_gains_nothing_is_never_run(landscape: Landscape) -> None:
    # Selective recomputation of what a flash kernel keeps anyway costs nothing, and spares nothing.
    twin = Layouts.of([Layout(tp=8, mbs=1), Layout(tp=8, mbs=1, recompute=Recompute.SELECTIVE)])
    cluster = files.read_cluster("dgx-a100")
    config = preset_config("20b", cluster, 4)
    p = predict(twin, stack([(config.workload, cluster, files.read_framework("hptool-worker"))]))
    both = Landscape(target=p, run=p, memory_gib=landscape.memory_gib)
    stop = make("adaptive", both).next([measured(both, 0)])
    assert isinstance(stop, Stop)
    assert "recompute" in stop.why


def test_kin_of_what_failed_is_avoided(landscape: Landscape) -> None:
    p = landscape.target
    ranking = [int(i) for i in p.ranking()]
    best = ranking[0]
    strategy = make("adaptive", landscape)
    second = strategy.next([measured(landscape, best)])
    assert isinstance(second, Proposal)
    tp = p.layouts.tp[second.row]
    same = [i for i in ranking[:40] if p.layouts.tp[i] == tp and i != best][:6]
    trials = [measured(landscape, best), *(Trial(row=i, ending=Ending.FAILED) for i in same)]
    gains = {t.ending for t in trials}
    assert Ending.FAILED in gains
    then = strategy.next(trials)
    if isinstance(then, Proposal):
        assert then.expected_gain < second.expected_gain


def test_many_runs_at_once_come_to_an_end(landscape: Landscape) -> None:
    strategy = make("adaptive", landscape)
    trials: list[Trial] = []
    while isinstance(answer := strategy.next(trials), Proposal):
        trials.append(Trial(row=answer.row, ending=Ending.UNDER_WAY))
        assert len(trials) < 30
    assert len(trials) >= 3
    assert len({t.row for t in trials}) == len(trials)
    # Once they came back slower than expected, there is something to run again.
    slow = [measured(landscape, t.row, 1.3 if i == 0 else 1.0) for i, t in enumerate(trials[:2])]
    assert isinstance(strategy.next(slow), Proposal)


def test_a_gain_is_worth_going_on_for(landscape: Landscape) -> None:
    truth = some_truth(landscape, 5)
    truth = replace(truth, ending=[Ending.MEASURED] * len(landscape.target))
    strategy = make("adaptive", landscape)
    trials, _ = played(strategy, truth)
    rates = [landscape.target.tokens_per_s_per_gpu[t.row] / truth.times[t.row] for t in trials]
    gained = [i for i, rate in enumerate(rates) if i == 0 or rate > (1 + WORTH_A_RUN) * max(rates[:i])]
    for before, after in itertools.pairwise([*gained, len(trials)]):
        assert after - before <= 20
    assert len(trials) - gained[-1] >= 4  # it looks on for a while after the last gain


# ---------------------------------------------------------------- where predictions are wrong


def smooth(p: Predictions, deviation: float, generator: np.random.Generator) -> Column:
    """Errors that alike layouts share, of so many doublings as features are wide."""
    at = features(p.layouts)
    distance = ((at[:, None] - at[None]) ** 2).sum(axis=-1)
    root = np.linalg.cholesky(np.exp(-distance / 2) + 1e-6 * np.eye(len(p)))
    return np.asarray(deviation * root @ generator.normal(size=len(p)))


def independent(p: Predictions, deviation: float, generator: np.random.Generator) -> Column:
    return generator.normal(0, deviation, len(p))


SPACES = [("5b", 2), ("5b", 4), ("2b", 1), ("20b", 4), ("8b", 2)]


@pytest.fixture(scope="module")
def landscapes() -> list[Landscape]:
    """A few models, without recomputation: what is likely to fit."""
    cluster = files.read_cluster("dgx-a100")
    made = []
    for model, nodes in SPACES:
        p = predicted(cluster, model, nodes, replace(SPACE, vpp=(1,), recompute=((Recompute.NONE, None),)))
        p = p.select(np.flatnonzero(p.p_fit > 0.9))
        assert len(p) >= 15
        made.append(Landscape(target=p, run=p, memory_gib=cluster.gpu.memory_gib))
    return made


Errors = Callable[[Predictions, float, np.random.Generator], Column]


def runs_until_good(strategy: Strategy, truth: Truth) -> int:
    """Runs until one was within 2 % of the best."""
    rates = truth.landscape.target.tokens_per_s_per_gpu / truth.times
    trials: list[Trial] = []
    while not trials or rates[trials[-1].row] < 0.98 * rates.max():
        answer = strategy.next(trials)
        assert isinstance(answer, Proposal)
        trials.append(truth.trial(answer.row))
    return len(trials)


def wrong(errors: Errors, deviation: float, landscapes: Sequence[Landscape], seeds: int) -> Iterator[Truth]:
    """Landscapes whose predictions are off by so much, and nothing else is wrong with them."""
    for landscape, seed in itertools.product(landscapes, range(seeds)):
        p = landscape.target
        times = np.exp(errors(p, deviation, np.random.default_rng([seed, len(p)])))
        yield Truth(landscape=landscape, times=times, ending=[Ending.MEASURED] * len(p))


@pytest.mark.parametrize(
    ("errors", "deviation", "most"),
    [(independent, 0.08, 1.2), (independent, 0.15, 1.2), (smooth, 0.08, 0.95), (smooth, 0.15, 0.8)],
)
def test_wrong_predictions_are_learned_from_where_there_is_something_to_learn(
    errors: Errors, deviation: float, most: float, landscapes: list[Landscape]
) -> None:
    # Errors that tell nothing of one another leave nothing to learn: no order is better than that by prediction, and
    # what is learned all the same must cost little.
    adaptive, ranked = [], []
    for truth in wrong(errors, deviation, landscapes, seeds=48):  # fewer, and the tail of a few decides
        adaptive.append(runs_until_good(Adaptive(landscape=truth.landscape, worth_a_run=-np.inf), truth))
        ranked.append(runs_until_good(InOrder(order=truth.landscape.target.ranking().tolist(), why="ranked"), truth))
    assert np.mean(adaptive) <= most * np.mean(ranked)
    assert np.quantile(adaptive, 0.9) <= np.quantile(ranked, 0.9) * (1.0 if errors is smooth else 1.3)


@pytest.mark.parametrize(
    ("errors", "deviation", "share"), [(smooth, 0.08, 0.95), (smooth, 0.15, 0.95), (independent, 0.15, 0.75)]
)
def test_what_it_stops_with_is_good(
    errors: Errors, deviation: float, share: float, landscapes: list[Landscape]
) -> None:
    final, runs = [], []
    for truth in wrong(errors, deviation, landscapes, seeds=24):
        trials, stop = played(make("adaptive", truth.landscape), truth)
        assert stop is not None
        rates = truth.landscape.target.tokens_per_s_per_gpu / truth.times
        final.append(rates[[t.row for t in trials]].max() / rates.max())
        runs.append(len(trials))
    assert np.mean(np.array(final) >= 0.99) >= share
    assert np.mean(final) > 0.97
    assert np.median(runs) <= 20
