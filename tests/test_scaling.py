"""Scaling laws: published fits met, properties of every fit, and each reason not to trust one."""

import math
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from hptool import files, scaling
from hptool.errors import InputError
from hptool.scaling import Fit, Law, Laws, SeedRuns, doubts, fit_law, next_runs, optimal_parameters

#: The law that runs are made from: of the size of the published ones.
TRUE = Law(name="true", source="made up", e=1.8, a=480.0, b=2100.0, alpha=0.345, beta=0.365)


def published(name: str) -> Law:
    laws = files.read(files.data_directory("base_configs") / "scaling_laws.yaml", Laws).laws
    return next(law for law in laws if law.name == name)


def made(parameters: ArrayLike, tokens: ArrayLike, noise: float = 0.0, law: Law = TRUE) -> SeedRuns:
    """Runs that a law would give, with some relative noise, the same each time."""
    n, d = np.broadcast_arrays(np.asarray(parameters, dtype=np.float64), np.asarray(tokens, dtype=np.float64))
    loss = np.array([law.loss(*pair) for pair in zip(n.tolist(), d.tolist(), strict=True)])
    wobble = np.exp(noise * np.random.default_rng(3).standard_normal(len(n)))
    return SeedRuns(
        source="runs.csv", parameters=n.copy(), tokens=d.copy(), loss=loss * wobble, line=np.arange(len(n)) + 2
    )


def grid(levels: Sequence[float], ratios: Sequence[float], noise: float = 0.0, law: Law = TRUE) -> SeedRuns:
    """Runs at each compute and each number of tokens per parameter."""
    flop, ratio = (axis.ravel() for axis in np.meshgrid(levels, ratios))
    parameters = np.sqrt(flop / 6 / ratio)
    return made(parameters, ratio * parameters, noise, law)


LEVELS, RATIOS = [1e18, 2e18, 4e18, 8e18, 1.6e19, 3.2e19], [5.0, 10.0, 20.0, 40.0, 80.0]


@pytest.fixture(scope="module")
def epoch_240(chinchilla: SeedRuns) -> Fit:
    """The fit of all but the five highest losses."""
    keep = np.ones(len(chinchilla), dtype=np.bool_)
    keep[np.argsort(chinchilla.loss)[-5:]] = False
    return fit_law(chinchilla.select(keep), keep_outliers=True)


# ---------------------------------------------------------------- published figures


def test_epochs_replication_is_met_in_each_parameter(epoch_240: Fit) -> None:
    # The point fit of github.com/epoch-research/analyzing-chinchilla.
    reference = {"e": 1.81724, "a": 477.84, "b": 2143.86, "alpha": 0.34731, "beta": 0.36718}
    assert {name: getattr(epoch_240.law, name) for name in reference} == pytest.approx(reference, rel=1e-3)


def test_the_shipped_default_is_that_fit(epoch_240: Fit) -> None:
    assert published("epoch").figures == pytest.approx(epoch_240.law.figures, rel=1e-3)


def test_intervals_are_as_wide_as_the_published_standard_errors(epoch_240: Fit) -> None:
    # Besiroglu et al. 2024, table of 4000 bootstraps: E 0.03, A 124.58, B 1293.23, alpha 0.02, beta 0.02.
    errors = np.std(epoch_240.resampled, axis=0)
    assert errors == pytest.approx(np.array([0.03, 124.58, 1293.23, 0.02, 0.02]), rel=0.35)


@pytest.mark.parametrize(("name", "ratio"), [("epoch", 17.6), ("hoffmann", 61.8)])
def test_tokens_per_parameter_at_1e24_flop(name: str, ratio: float) -> None:
    parameters = published(name).optimal_parameters(1e24)
    assert 1e24 / 6 / parameters**2 == pytest.approx(ratio, rel=5e-3)


def test_chinchilla_at_the_compute_of_gopher() -> None:
    # Hoffmann et al. 2022, table 3: approach 3 gives some 40B parameters for Gopher's 5.76e23 FLOP.
    assert published("hoffmann").optimal_parameters(5.76e23) == pytest.approx(40e9, rel=0.1)


def test_just_the_outliers_of_the_replication_are_left_out_and_named(chinchilla: SeedRuns) -> None:
    fit = fit_law(chinchilla, resamples=2)
    highest = np.sort(np.argsort(chinchilla.loss)[-5:])
    assert [run.line for run in fit.dropped] == chinchilla.line[highest].tolist()
    assert all(run.error > 0.05 for run in fit.dropped)
    assert "outliers_dropped" in {doubt.kind for doubt in doubts(fit)}
    (message,) = [doubt.message for doubt in doubts(fit) if doubt.kind == "outliers_dropped"]
    assert "lines 2, 3, 4, 5, 6" in message


def test_outliers_that_are_kept_move_the_optimum(chinchilla: SeedRuns) -> None:
    fit = fit_law(chinchilla, keep_outliers=True, resamples=2)
    assert not fit.dropped
    # `shared/scaling`: the replication's 17.6 tokens a parameter at 1e24 FLOP become 6.8.
    assert 1e24 / 6 / fit.law.optimal_parameters(1e24) ** 2 == pytest.approx(6.8, rel=0.1)


def test_a_fit_of_240_runs_with_its_interval_takes_less_than_two_seconds(chinchilla: SeedRuns) -> None:
    start = time.process_time()
    fit_law(chinchilla)
    assert time.process_time() - start < 2


# ---------------------------------------------------------------- the optimum is one


def huber(law: Sequence[float], runs: SeedRuns) -> float:
    """The loss of the fit, written out anew."""
    e, a, b, alpha, beta = law
    size = np.abs(np.log(runs.loss) - np.log(e + a / runs.parameters**alpha + b / runs.tokens**beta))
    return float(np.where(size <= 1e-3, size**2 / 2, 1e-3 * (size - 5e-4)).sum())


def test_no_step_from_the_fit_goes_down(epoch_240: Fit) -> None:
    law, runs = epoch_240.law.figures, epoch_240.runs
    best = huber(law.tolist(), runs)
    assert best <= huber([1.81724, 477.84, 2143.86, 0.34731, 0.36718], runs)
    random = np.random.default_rng(5)
    # The factors move with their exponents, or every step would be uphill.
    mean_x, mean_y = np.log(runs.parameters).mean(), np.log(runs.tokens).mean()
    for scale in (1e-2, 1e-3, 1e-4, 1e-5):
        for _ in range(300):
            e, a, b, alpha, beta = scale * random.standard_normal(5)
            step = law * np.exp([e, a + alpha * law[3] * mean_x, b + beta * law[4] * mean_y, alpha, beta])
            assert huber(step.tolist(), runs) >= best * (1 - 1e-9)


@settings(max_examples=20, deadline=None)
@given(
    e=st.floats(0.5, 3),
    a=st.floats(0.2, 1),
    b=st.floats(0.2, 1),
    alpha=st.floats(0.2, 0.6),
    beta=st.floats(0.2, 0.6),
)
def test_runs_without_noise_give_their_law_back(e: float, a: float, b: float, alpha: float, beta: float) -> None:
    law = Law(name="x", source="x", e=e, a=a * 1e8**alpha, b=b * 2e9**beta, alpha=alpha, beta=beta)
    fit = fit_law(grid(LEVELS, RATIOS, law=law), resamples=2)
    assert fit.law.figures == pytest.approx(law.figures, rel=1e-3)
    assert fit.rms < 1e-6


@settings(max_examples=15, deadline=None)
@given(times=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_another_unit_of_loss_changes_only_e_a_and_b(times: float, seed: int) -> None:
    runs = grid(LEVELS, RATIOS)
    loss = runs.loss * np.exp(0.004 * np.random.default_rng(seed).standard_normal(len(runs)))
    columns = {"parameters": runs.parameters, "tokens": runs.tokens, "line": runs.line, "source": "x"}
    first = fit_law(SeedRuns(loss=loss, **columns), resamples=2).law  # type: ignore[arg-type]
    second = fit_law(SeedRuns(loss=loss * times, **columns), resamples=2).law  # type: ignore[arg-type]
    assert second.figures == pytest.approx(first.figures * [times, times, times, 1, 1], rel=1e-4)


def test_the_interval_covers_the_truth_and_widens_with_noise() -> None:
    target = 3e20
    truth = TRUE.optimal_parameters(target)
    widths = []
    for noise in (0.001, 0.01):
        interval = fit_law(grid(LEVELS, RATIOS, noise)).interval(lambda laws: optimal_parameters(laws, target))
        assert interval is not None
        low, high = interval
        assert low / 1.5 < truth < high * 1.5
        widths.append(math.log(high / low))
    assert 3 * widths[0] < widths[1]


def test_one_point_far_off_is_left_out_and_does_not_matter() -> None:
    runs = grid(LEVELS, RATIOS, 0.002)
    loss = runs.loss.copy()
    loss[7] *= 1.3
    spoilt = SeedRuns(source="x", parameters=runs.parameters, tokens=runs.tokens, loss=loss, line=runs.line)
    fit = fit_law(spoilt, resamples=2)
    assert [run.line for run in fit.dropped] == [9]
    assert fit.dropped[0].error == pytest.approx(0.3, abs=0.02)
    assert len(fit.runs) == len(runs) - 1
    # Few runs cannot tell: nothing is left out, and the residual is told instead.
    few = fit_law(spoilt.select(np.arange(len(loss)) < 12), resamples=2)
    assert not few.dropped


# ---------------------------------------------------------------- the law


@given(compute=st.floats(1e15, 1e28), shift=st.floats(-1, 1).filter(lambda x: abs(x) > 1e-3))
def test_no_other_size_of_the_same_compute_has_less_loss(compute: float, shift: float) -> None:
    best = TRUE.optimal_parameters(compute)
    other = best * math.exp(shift)
    assert TRUE.loss(best, compute / 6 / best) <= TRUE.loss(other, compute / 6 / other)


@given(parameters=st.floats(1e6, 1e13), factor=st.floats(0.05, 20))
def test_tokens_for_a_loss_and_the_loss_of_tokens_agree(parameters: float, factor: float) -> None:
    tokens = TRUE.optimal_tokens(parameters)
    assert TRUE.optimal_parameters(6 * parameters * tokens) == pytest.approx(parameters, rel=1e-6)
    loss = TRUE.loss(parameters, tokens)
    found = TRUE.tokens_for(factor * parameters, loss)
    if math.isfinite(found):
        assert TRUE.loss(factor * parameters, found) == pytest.approx(loss, rel=1e-9)
        # At equal loss no other size is cheaper than the optimal one.
        assert factor * found >= tokens * (1 - 1e-9)


def test_a_size_too_small_for_a_loss_reaches_it_on_no_tokens() -> None:
    loss = TRUE.loss(1e10, TRUE.optimal_tokens(1e10))
    assert math.isinf(TRUE.tokens_for(1e8, loss))


def test_n_off_by_two_costs_a_sixth_of_the_compute() -> None:
    # `shared/scaling`: N off by 2x costs about 16 % of compute, 1.5x about 6 %.
    law = published("epoch")
    tokens = law.optimal_tokens(1e10)
    loss = law.loss(1e10, tokens)
    costs = {factor: factor * law.tokens_for(factor * 1e10, loss) / tokens for factor in (2.0, 1.5)}
    assert costs == pytest.approx({2.0: 1.16, 1.5: 1.06}, abs=0.02)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_law_has_parameters_above_0(value: float) -> None:
    with pytest.raises(ValueError, match=r"beta: .* given, allowed is more than 0"):
        Law(name="x", source="x", e=1, a=1, b=1, alpha=1, beta=value)


# ---------------------------------------------------------------- doubts


def kinds(runs: SeedRuns, compute: float | None = None) -> set[str]:
    return {doubt.kind for doubt in doubts(fit_law(runs, resamples=4), compute)}


def test_a_good_fit_is_not_doubted() -> None:
    runs = grid(LEVELS, RATIOS, 0.002)
    assert kinds(runs) == set()
    assert kinds(runs, 9 * float(runs.compute.max())) == set()


@pytest.mark.parametrize(("count", "ok"), [(0, False), (1, False), (5, False), (6, True)])
def test_fewer_than_six_runs_are_refused(count: int, ok: bool) -> None:  # noqa: FBT001 (a table of cases)
    runs = grid(LEVELS, RATIOS).select(np.isin(np.arange(30), [0, 7, 14, 16, 23, 29][:count]))
    if ok:
        assert fit_law(runs, resamples=2).law.e > 0
        return
    with pytest.raises(InputError, match=f"{count} runs? given, allowed is 6 or more"):
        fit_law(runs)


def test_twenty_nine_runs_are_few_and_thirty_are_not() -> None:
    runs = grid(LEVELS, RATIOS, 0.002)
    assert "few_runs" in kinds(runs.select(np.arange(30) < 29))
    assert "few_runs" not in kinds(runs)


@pytest.mark.parametrize(
    ("runs", "kind"),
    [
        (grid([1e19], np.geomspace(2, 200, 30).tolist(), 0.002), "one_compute_level"),
        (made(np.geomspace(1e7, 1e9, 30), 20 * np.geomspace(1e7, 1e9, 30), 0.002), "fixed_ratio"),
        (made(1e8, np.geomspace(1e8, 1e11, 30), 0.002), "one_size"),
        (made(np.geomspace(1e7, 1e9, 30), 1e10, 0.002), "one_token_count"),
    ],
)
def test_runs_that_do_not_vary_enough_are_told_and_not_trusted(runs: SeedRuns, kind: str) -> None:
    fit = fit_law(runs, resamples=4)
    (doubt,) = [doubt for doubt in doubts(fit) if doubt.kind == kind]
    assert doubt.severe
    # An interval of resamples would not show what no run says.
    assert (fit.interval(lambda laws: laws[..., 0]) is None) == (kind != "one_compute_level")


@pytest.mark.parametrize(
    ("times", "kind", "severe"),
    [
        (9.9, None, False),
        (10.1, "extrapolated_10x", False),
        (99, "extrapolated_10x", False),
        (101, "extrapolated_100x", True),
    ],
)
def test_extrapolation_is_told(times: float, kind: str | None, severe: bool) -> None:  # noqa: FBT001 (a table of cases)
    fit = fit_law(grid(LEVELS, RATIOS, 0.002), resamples=2)
    found = [doubt for doubt in doubts(fit, times * float(fit.runs.compute.max())) if "extrapol" in doubt.kind]
    assert [(doubt.kind, doubt.severe) for doubt in found] == ([(kind, severe)] if kind else [])


def test_residuals_over_two_percent_are_told() -> None:
    assert "large_residuals" not in kinds(grid(LEVELS, RATIOS, 0.01))
    assert "large_residuals" in kinds(grid(LEVELS, RATIOS, 0.05))


def test_runs_that_only_get_worse_with_size_end_at_the_edge() -> None:
    runs = grid(LEVELS, RATIOS)
    worse = SeedRuns(
        source="x", parameters=runs.parameters, tokens=runs.tokens, loss=np.log(runs.parameters), line=runs.line
    )
    assert "at_the_edge" in kinds(worse)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(1, 1e18), st.floats(1, 1e18), st.floats(1e-6, 1e6)), min_size=6, max_size=12))
def test_any_runs_give_finite_figures(rows: list[tuple[float, float, float]]) -> None:
    parameters, tokens, loss = (np.array(column) for column in zip(*rows, strict=True))
    runs = SeedRuns(source="x", parameters=parameters, tokens=tokens, loss=loss, line=np.arange(len(rows)))
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        fit = fit_law(runs, resamples=4)
        compute = 100 * float(runs.compute.max())
        doubts(fit, compute)
        suggested = next_runs(fit, compute)
    assert np.isfinite(fit.resampled).all()
    assert all(math.isfinite(run.parameters) and run.parameters > 0 for run in suggested)


# ---------------------------------------------------------------- the next runs


def test_next_runs_climb_at_most_twofold_and_narrow_the_optimum() -> None:
    fit = fit_law(grid(LEVELS, RATIOS, 0.005), resamples=2)
    largest = float(fit.runs.compute.max())
    runs = next_runs(fit, 100 * largest, count=5)
    assert len({(run.parameters, run.tokens) for run in runs}) == 5
    assert max(run.compute for run in runs) == pytest.approx(2 * largest)
    assert all(run.compute <= 2.0001 * largest for run in runs)
    assert all(run.compute == pytest.approx(6 * run.parameters * run.tokens) for run in runs)
    assert all(run.spread_after < run.spread_before for run in runs)
    assert [run.spread_after for run in runs[:-1]] == pytest.approx([run.spread_before for run in runs[1:]])


def test_the_first_of_the_next_runs_helps_more_than_any_seed_run_again() -> None:
    fit = fit_law(grid(LEVELS, RATIOS, 0.005), resamples=2)
    target = 100 * float(fit.runs.compute.max())

    def spread(runs: SeedRuns) -> float:
        """Of log N over fits to noise made anew: what the suggestion promises to lower."""
        found = []
        for seed in range(60):
            wobble = np.exp(0.005 * np.random.default_rng(seed).standard_normal(len(runs)))
            loss = np.array([fit.law.loss(*pair) for pair in zip(runs.parameters, runs.tokens, strict=True)])
            noisy = SeedRuns(
                source="x", parameters=runs.parameters, tokens=runs.tokens, loss=loss * wobble, line=runs.line
            )
            found.append(math.log(fit_law(noisy, resamples=1).law.optimal_parameters(target)))
        return float(np.std(found))

    def with_runs(parameters: Sequence[float], tokens: Sequence[float]) -> SeedRuns:
        own = fit.runs
        return made([*own.parameters, *parameters], [*own.tokens, *tokens])

    first, second = next_runs(fit, target, count=2)
    helped = spread(with_runs([first.parameters, second.parameters] * 4, [first.tokens, second.tokens] * 4))
    middle = float(np.median(fit.runs.parameters))
    repeated = spread(with_runs([middle] * 8, [20 * middle] * 8))
    assert helped < 0.95 * repeated


def test_runs_of_one_ratio_are_advised_other_ratios() -> None:
    sizes = np.geomspace(1e7, 1e9, 12)
    fit = fit_law(made(sizes, 20 * sizes, 0.002), resamples=2)
    runs = next_runs(fit, 10 * float(fit.runs.compute.max()))
    assert all(run.middle == "the runs" for run in runs)
    assert {run.ratio_over_middle for run in runs} - {1.0}
    assert all(2 < run.tokens / run.parameters < 200 for run in runs)


def test_the_convention_is_that_of_the_law() -> None:
    assert "6·N·D" in scaling.COMPUTE_CONVENTION
    assert grid([1e18], [20.0]).compute == pytest.approx(1e18)
