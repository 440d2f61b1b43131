"""Warm-up, steadiness and intervals, for series of which the answer is known."""

from collections.abc import Sequence
from math import comb
from statistics import median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hptool import timing
from hptool.timing import coverage, is_steady, median_interval, relative_error, warmup_steps

seconds = st.floats(1e-3, 1e3)


@given(seconds, st.integers(0, 200))
def test_constant_steps_lose_the_first(second: float, count: int) -> None:
    assert warmup_steps([second] * count) == min(1, count // 2)
    assert is_steady([second] * count)


@given(seconds, st.integers(1, 50), st.integers(2, 60), st.floats(1.02, 100.0))
def test_slow_start_is_dropped_and_no_more(second: float, slow: int, more: int, factor: float) -> None:
    times = [second * factor] * slow + [second] * (slow + more)
    assert warmup_steps(times) == slow
    assert is_steady(times)


@given(seconds, st.integers(2, 50), st.integers(0, 1), st.floats(1.03, 100.0))
def test_slow_start_of_half_of_the_steps_leaves_too_few_to_trust(
    second: float, slow: int, more: int, factor: float
) -> None:
    times = [second * factor] * slow + [second] * (slow + more)
    assert warmup_steps(times) == slow
    assert not is_steady(times)


@given(seconds, st.floats(0.1, 20.0), st.floats(0.5, 4.0))
def test_decaying_start_is_dropped(second: float, height: float, decay_steps: float) -> None:
    times = [second * (1 + height * np.exp(-i / decay_steps)) for i in range(100)]
    dropped = warmup_steps(times)
    assert times[dropped] < second * 1.05
    assert dropped <= 12 * decay_steps + 2
    assert is_steady(times)


@given(seconds, st.integers(6, 200), st.floats(1.1, 1000.0), st.data())
def test_lone_outlier_is_no_warmup(second: float, count: int, factor: float, data: st.DataObject) -> None:
    at = data.draw(st.integers(2, count - 1))
    times = [second] * count
    times[at] *= factor
    assert warmup_steps(times) == 1
    assert is_steady(times)


@given(seconds, st.integers(3, 20), st.floats(2.0, 100.0), st.integers(8, 39))
def test_lone_outlier_hides_no_warmup(second: float, slow: int, factor: float, at: int) -> None:
    times = [second * 1.5] * slow + [second] * 40
    times[slow + at] *= factor
    assert warmup_steps(times) == slow


@given(seconds, st.integers(12, 200), st.floats(-0.5, 3.0).filter(lambda x: abs(x) > 0.1))
def test_drift_is_not_steady(second: float, count: int, drift: float) -> None:
    times = [second * (1 + drift * i / count) for i in range(count)]
    assert not is_steady(times)


def test_warmup_longer_than_half_is_not_steady() -> None:
    assert not is_steady([2.0] * 30 + [1.0] * 20)
    assert not is_steady([3.0, 2.0, 1.0, 1.0])


def test_what_is_below_the_resolution_is_no_difference() -> None:
    times = [1.0 + 1e-4 * i / 50 for i in range(50)]
    assert warmup_steps(times) == 1
    assert is_steady(times)


@pytest.mark.parametrize("count", [20, 50, 200])
def test_noise_is_steady_and_mostly_kept(count: int) -> None:
    random = np.random.default_rng(1)
    series = [(1 + 0.03 * random.exponential(size=count)).tolist() for _ in range(200)]
    assert np.mean([is_steady(times) for times in series]) > 0.95
    assert np.median([warmup_steps(times) for times in series]) <= 0.15 * count


@given(st.lists(seconds, max_size=100))
def test_warmup_is_at_most_half_and_at_least_one(times: list[float]) -> None:
    dropped = warmup_steps(times)
    assert min(1, len(times) // 2) <= dropped <= len(times) // 2
    assert isinstance(dropped, int)
    assert is_steady(times) in (True, False)


def test_truncation_is_the_marginal_standard_error_rule() -> None:
    # Far above the resolution and without lone outliers, it is White's formula as printed.
    random = np.random.default_rng(2)
    for _ in range(100):
        pairs = np.repeat(1 + 0.2 * random.standard_normal(30) + 2 * np.exp(-np.arange(30) / 3), 2).tolist()
        times = [9.0, *pairs]
        assert warmup_steps(times) == 1 + plain_mser(pairs, len(times) // 2)


def plain_mser(values: Sequence[float], limit: int) -> int:
    """The formula, term by term, of values in units of the resolution."""
    units = [round((x / float(np.median(values)) - 1) / timing.RESOLUTION) for x in values]
    errors = []
    for dropped in range(limit):
        kept = units[dropped:]
        mean = sum(kept) / len(kept)
        errors.append(sum((x - mean) ** 2 for x in kept) / len(kept) ** 2)
    return errors.index(min(errors))


@given(st.lists(seconds, min_size=1, max_size=60))
def test_interval_holds_the_median(times: list[float]) -> None:
    low, high = median_interval(times)
    assert min(times) <= low <= median(times) <= high <= max(times)
    assert {low, high} <= set(times)


def test_interval_of_few_steps_is_all_of_them() -> None:
    for count in range(1, 9):
        assert median_interval([float(i) for i in range(count)]) == (0.0, count - 1.0)
    assert [round(coverage(count), 3) for count in range(1, 7)] == [0, 0.5, 0.75, 0.875, 0.938, 0.969]
    with pytest.raises(ValueError, match="no time given"):
        median_interval([])


def test_interval_is_the_narrowest_that_covers() -> None:
    for count in range(6, 400):
        low, high = median_interval([float(i) for i in range(1, count + 1)])
        assert low + high == count + 1
        outside = sum(comb(count, below) for below in range(int(low)))
        assert coverage(count) == pytest.approx(1 - 2 * outside / 2**count)
        assert coverage(count) >= 0.95
        assert 1 - 2 * (outside + comb(count, int(low))) / 2**count < 0.95  # one further in
    assert coverage(20_000) == pytest.approx(0.95, abs=0.005)


@pytest.mark.parametrize("count", [2, 3, 5, 8, 20])
def test_interval_covers_as_often_as_it_says(count: int) -> None:
    random = np.random.default_rng(count)
    samples = random.lognormal(sigma=0.5, size=(4000, count))  # whose median is 1
    intervals = [median_interval(times) for times in samples.tolist()]
    held = np.mean([low <= 1 <= high for low, high in intervals])
    assert held == pytest.approx(coverage(count), abs=0.025)


@pytest.mark.parametrize("count", [2, 3, 5, 8, 20, 50])
def test_relative_error_is_that_of_the_median(count: int) -> None:
    random = np.random.default_rng(count)
    samples = random.normal(1, 0.01, size=(2000, count))
    errors = [relative_error(*median_interval(times), 1.0, coverage(count)) for times in samples.tolist()]
    # Wider where the interval has to be all of the steps.
    assert 0.95 < np.mean(errors) / np.std(np.median(samples, axis=1)) < 1.35


def test_relative_error_is_never_nothing() -> None:
    assert relative_error(1.0, 1.0, 1.0) == 1e-3
    assert relative_error(1.0, 1.0, 1.0, coverage(1)) == 0.1  # one step says nothing of its spread
    assert relative_error(0.9, 1.1, 1.0) == pytest.approx(0.1 / 1.96, rel=1e-3)
