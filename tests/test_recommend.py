"""`hptool recommend`: what fits a budget, both directions, compute-optimal sizes, and one line for each mistake."""

import csv
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from syrupy.assertion import SnapshotAssertion

from hptool import catalogue, files
from hptool.predict.flops import model_flops_per_step
from hptool.recommend import Budget, Size, fewest, recommend
from hptool.scaling import Laws, SeedRuns
from tests.test_cli import hptool
from tests.test_scaling import LEVELS, RATIOS, grid


def ask(*words: str | Path) -> Result:
    """The command, which must work."""
    result = hptool("recommend", *words, columns=80)
    assert result.exit_code == 0, result.output
    return result


def as_json(*words: str | Path) -> Any:
    return json.loads(ask(*words, "--json").stdout)


def row(found: Any, model: str) -> Any:
    (one,) = [size for size in found["sizes"] if size["model"] == model]
    return one


# ---------------------------------------------------------------- the arithmetic


def size(billions: float, rate: float | None = 150.0, error: float = 0.0, tokens: float = 300e9) -> Size:
    """A model of 6·N FLOP a token."""
    return Size(
        name=f"{billions:g}b",
        parameters=billions * 1e9,
        active_parameters=billions * 1e9,
        flop_per_token=6e9 * billions,
        tokens=tokens,
        tflops_per_gpu=rate,
        error=error,
    )


def test_days_are_flop_over_rate() -> None:
    # 6 · 5e9 · 300e9 FLOP at 160 · 150e12 FLOP/s.
    assert size(5).days(160) == pytest.approx(9e21 / 2.4e16 / 86400)


@given(
    billions=st.floats(0.1, 1000), rate=st.floats(1, 1000), gpus=st.integers(1, 100_000), tokens=st.floats(1e6, 1e14)
)
def test_gpus_tokens_and_days_are_found_from_each_other(billions: float, rate: float, gpus: int, tokens: float) -> None:
    one = size(billions, rate, tokens=tokens)
    days = one.days(gpus)
    assert one.gpus(days) == pytest.approx(gpus)
    assert one.tokens_within(Budget(gpus=gpus, days=days)) == pytest.approx(tokens)


def test_the_largest_that_fits_is_chosen_whatever_the_order() -> None:
    found = recommend(Budget(gpus=160, days=5), [size(8), size(1), size(5), size(20), size(2)])
    assert found.chosen == size(5)
    assert [one.parameters for one in found.sizes] == sorted(one.parameters for one in found.sizes)


def test_what_would_end_in_time_by_an_even_chance_alone_does_not_fit() -> None:
    sizes = [size(5, error=0.15), size(8, error=0.15)]
    budget = Budget(gpus=160, days=sizes[1].days(160) * 1.01)
    assert 0.5 < sizes[1].chance(budget) < 0.6
    assert recommend(budget, sizes).chosen == sizes[0]
    assert recommend(budget, sizes, confidence=0.5).chosen == sizes[1]


@given(error=st.floats(0.01, 1), confidence=st.floats(0.5, 0.999))
def test_the_chance_of_the_sure_days_is_the_confidence(error: float, confidence: float) -> None:
    one = size(5, error=error)
    assert one.chance(Budget(gpus=160, days=one.sure_days(160, confidence))) == pytest.approx(confidence)


@pytest.mark.parametrize("billions", [0.3, 1.0, 3.0, 7.9, 30.0])
def test_filling_parameters_take_exactly_the_budget(billions: float) -> None:
    # Days go with parameters here, so that lines of logarithms between and beyond the sizes are exact.
    budget = Budget(gpus=160, days=size(billions).days(160))
    found = recommend(budget, [size(b) for b in (1, 2, 5, 8)])
    assert found.filling == pytest.approx(billions * 1e9)
    assert ("in proportion" in found.how) == (not 1 <= billions <= 8)


def test_filling_parameters_are_of_one_number_of_tokens() -> None:
    # A recipe of few tokens must not pull the line down.
    sizes = [size(0.124, tokens=10e9), size(1), size(2), size(5)]
    found = recommend(Budget(gpus=160, days=size(0.5).days(160)), sizes)
    assert found.filling == pytest.approx(0.5e9)
    assert found.filling_tokens == 300e9


def test_one_size_alone_and_none_at_all() -> None:
    assert recommend(Budget(gpus=160, days=size(3).days(160)), [size(6)]).filling == pytest.approx(3e9)
    nothing = recommend(Budget(gpus=160, days=5), [size(6, rate=None)])
    assert (nothing.chosen, nothing.filling, nothing.filling_tokens) == (None, 0, 0)


@given(least=st.integers(1, 5000), start=st.integers(1, 64), most=st.integers(1, 5000))
def test_the_fewest_that_are_enough_are_found(least: int, start: int, most: int) -> None:
    asked = []

    def enough(count: int) -> bool:
        asked.append(count)
        return count >= least

    found = fewest(enough, min(start, most), most)
    assert found == (max(least, min(start, most)) if least <= most else None)
    assert len(asked) <= 28


@given(holes=st.sets(st.integers(1, 300)), least=st.integers(1, 200))
def test_with_gaps_what_is_found_is_enough(holes: set[int], least: int) -> None:
    found = fewest(lambda count: count >= least and count not in holes, 1, 4096)
    assert found is not None
    assert found >= least
    assert found not in holes


@pytest.mark.parametrize(("gpus", "days"), [(0, 5), (-1, 5), (8, 0), (8, -1), (8, math.nan), (8, math.inf)])
def test_a_budget_is_more_than_nothing(gpus: int, days: float) -> None:
    with pytest.raises(ValueError, match="allowed is more than 0"):
        Budget(gpus=gpus, days=days)


# ---------------------------------------------------------------- a budget


def test_20_dgx_a100_train_5b_in_5_days(snapshot: SnapshotAssertion) -> None:
    lines = ask("--gpus", "160", "--days", "5").output.splitlines()
    assert lines[0].startswith("train gpt3/5b (5.05B parameters): ")
    assert lines[0].endswith(" of 5 days on 160 × a100-80gb")
    assert all(len(line) <= 80 for line in lines)
    # What is shown, not the figures, which are those of the predictions.
    assert [line.split()[0] for line in lines if line and line[0] != " "] == snapshot
    assert not any("tiny" in line for line in lines)


def test_the_numbers_behind_it() -> None:
    found = as_json("--gpus", "160", "--days", "5")
    best = found["recommended"]
    assert (best["model"], best["tokens"]) == ("gpt3/5b", 300e9)
    # The definition: FLOP = GPUs · rate · time, with the FLOPs of `predict/flops.py`.
    shape = catalogue.preset("gpt3/5b").shape
    assert best["flop"] == pytest.approx(300e9 / 2048 * model_flops_per_step(shape, 1))
    assert best["days"] == pytest.approx(best["flop"] / (160 * best["tflops_per_gpu"] * 1e12 * 86400))
    assert best["days_low"] < best["days"] < best["days_high"] <= 5
    assert best["chance_in_time"] >= 0.9
    assert "no recomputation" in found["model_flops_convention"]
    # Between the chosen size and the first that takes longer than the budget.
    longer = [one["parameters"] for one in found["sizes"] if one["days"] > 5]
    assert best["parameters"] < found["parameters_that_fill_the_budget"] < min(longer)
    assert found["parameters_that_fill_the_budget_surely"] < found["parameters_that_fill_the_budget"]
    assert "gpt3/tiny" not in {one["model"] for one in found["sizes"]}


def test_the_rate_is_that_of_predict() -> None:
    found = as_json("--gpus", "160", "--days", "5", "--cluster", "dgx-a100")
    predicted = json.loads(
        hptool("predict", "--model", "gpt3/5b", "--cluster", "dgx-a100", "--nodes", "20", "--json").stdout
    )["layouts"][0]
    own = row(found, "gpt3/5b")
    assert own["layout"] == predicted["layout"]
    assert own["tflops_per_gpu"] == pytest.approx(predicted["predicted_model_tflops_per_gpu"])
    assert own["days_high"] / own["days"] == pytest.approx(
        predicted["predicted_step_time_high_s"] / predicted["predicted_step_time_s"], rel=1e-3
    )


def test_a_given_rate_is_exact_and_said() -> None:
    # The predecessor's own example: 160 A100s at 140 TFLOPS for 5 days are 9.7e21 FLOP, and 5B.
    found = as_json("--gpus", "160", "--days", "5", "--tflops", "140")
    assert found["recommended"]["model"] == "gpt3/5b"
    assert found["recommended"]["days_low"] == found["recommended"]["days_high"]
    assert "140, as given" in ask("--gpus", "160", "--days", "5", "--tflops", "140").output


def test_a_budget_that_does_not_fit_is_said_first_with_what_would_help() -> None:
    words = ("--gpus", "8", "--days", "0.1")
    assert ask(*words).output.startswith("does not fit: no size of gpt3 in 0.1 days on 8 × a100-80gb; the smallest, ")
    found = as_json(*words)
    assert (found["fits"], found["recommended"]) == (False, None)
    # Its own advice must help.
    days = found["would_help"].partition(": ")[2].partition(" days")[0]
    assert as_json("--gpus", "8", "--days", str(float(days) * 1.01))["fits"]


def test_a_size_that_no_layout_holds_is_never_recommended() -> None:
    found = as_json("--gpus", "1", "--days", "1e7")
    assert "fits into memory" in row(found, "gpt3/175b")["refusal"]
    assert row(found, "gpt3/175b")["days"] is None
    assert found["recommended"]["parameters"] < 20e9


def test_families_have_their_own_tokens_and_all_take_those_given() -> None:
    for family, tokens in (("gpt3", 300e9), ("t5", 1e12), ("bert", 1.8e12), ("mixtral", 300e9)):
        found = as_json("--gpus", "128", "--days", "30", "--family", family)
        assert tokens in {one["tokens"] for one in found["sizes"]}
    given = as_json("--gpus", "128", "--days", "30", "--tokens", "1.5T")
    assert {one["tokens"] for one in given["sizes"]} == {1.5e12}
    assert as_json("--gpus", "128", "--days", "30", "--family", "t5")["sizes"][0]["tokens_of"] == "encoder"


def test_experts_that_a_token_does_not_see_are_not_active() -> None:
    one = row(as_json("--gpus", "128", "--days", "30", "--family", "mixtral"), "mixtral/8x7b")
    # Jiang et al. 2024 (arXiv 2401.04088): 47B parameters, 13B active.
    assert one["parameters"] == pytest.approx(46.7e9, rel=0.01)
    assert one["active_parameters"] == pytest.approx(12.9e9, rel=0.01)
    assert one["flop"] / one["tokens"] > 6 * 0.9 * one["active_parameters"]


def test_the_answer_takes_a_second_of_this_machine() -> None:
    start = time.process_time()
    ask("--gpus", "160", "--days", "5")
    assert time.process_time() - start < 1


def test_it_loads_neither_pandas_nor_matplotlib() -> None:
    import subprocess  # noqa: PLC0415

    code = (
        "import sys\nfrom hptool.cli import main\n"
        "try: main(['recommend', '--gpus', '8', '--days', '1'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'pandas', 'matplotlib', 'scipy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


# ---------------------------------------------------------------- one size, both directions


@pytest.mark.parametrize("gpus", [64, 512])
def test_days_for_gpus_and_gpus_for_days_agree(gpus: int) -> None:
    days = as_json("--model", "gpt3/20b", "--gpus", str(gpus))["model"]["days"]
    back = as_json("--model", "gpt3/20b", "--days", repr(days))
    assert back["gpus_exactly"] == pytest.approx(gpus, rel=0.01)
    assert back["gpus"] <= gpus
    again = as_json("--model", "gpt3/20b", "--gpus", str(back["gpus"]))
    assert again["model"]["days"] <= days * (1 + 1e-9)


def test_both_directions_agree_at_a_given_rate() -> None:
    days = as_json("--model", "gpt3/20b", "--gpus", "512", "--tflops", "150")["model"]["days"]
    back = as_json("--model", "gpt3/20b", "--days", repr(days * 1.001), "--tflops", "150")
    assert back["gpus_exactly"] == pytest.approx(512, rel=0.01)


def test_to_be_sure_takes_more_gpus() -> None:
    found = as_json("--model", "gpt3/20b", "--days", "10")
    assert found["gpus"] < found["gpus_surely"]
    assert as_json("--model", "gpt3/20b", "--gpus", str(found["gpus_surely"]), "--days", "10")["fits"]
    assert not as_json("--model", "gpt3/20b", "--gpus", str(found["gpus"]), "--days", "10")["fits"]


def test_a_size_that_does_not_fit_is_said_first() -> None:
    output = ask("--model", "gpt3/20b", "--gpus", "160", "--days", "5").output
    assert output.startswith("does not fit: gpt3/20b takes 1")
    assert ask("--model", "gpt3/20b", "--gpus", "160", "--days", "50").output.startswith("fits: gpt3/20b takes")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpus", "1"), "gpt3/175b: no layout"),
        (("--days", "0.001"), "gpt3/175b: no layout trains 300B tokens in 0.001 days on up to 131072 a100-80gb"),
        (("--cluster", "dgx-a100", "--days", "1"), "on up to 1024 a100-80gb"),
    ],
)
def test_what_cannot_be_ends_with_3_and_says_what_would_help(words: tuple[str, ...], said: str) -> None:
    result = hptool("recommend", "--model", "gpt3/175b", *words)
    assert result.exit_code == 3
    assert said in result.stderr
    assert "what would help: more" in result.stderr


# ---------------------------------------------------------------- by a scaling law


def test_compute_optimal_balances_size_and_tokens() -> None:
    found = as_json("--gpus", "160", "--days", "5", "--tokens", "compute-optimal", "--size-factor", "0.5")
    best = found["optimum"]
    assert found["law"]["name"] == "epoch"
    assert 6 * best["parameters"] * best["tokens"] == pytest.approx(best["compute"])
    assert best["compute"] == pytest.approx(160 * 5 * 86400 * best["tflops_per_gpu"] * 1e12)
    assert 15 < best["tokens"] / best["parameters"] < 25
    near = row(found, found["nearest"])
    assert near["loss"] == min(one["loss"] for one in found["sizes"])
    assert best["loss"] < near["loss"] < best["loss"] * 1.01
    half = found["size_factor"]
    assert half["parameters"] == pytest.approx(best["parameters"] / 2)
    assert half["tokens"] > 2 * best["tokens"]
    assert half["cost"] == pytest.approx(half["tokens"] / best["tokens"] / 2)
    assert half["days"] > 5


def test_laws_are_chosen_by_name() -> None:
    words = ("--gpus", "160", "--days", "5", "--tflops", "150", "--law")
    epoch, hoffmann = (as_json(*words, law)["optimum"] for law in ("epoch", "hoffmann"))
    assert epoch["compute"] == hoffmann["compute"] == pytest.approx(160 * 5 * 86400 * 150e12)
    assert hoffmann["tokens"] / hoffmann["parameters"] > 1.5 * epoch["tokens"] / epoch["parameters"]


def test_help_names_every_law() -> None:
    laws = files.read(files.data_directory("base_configs") / "scaling_laws.yaml", Laws).laws
    words = " ".join(hptool("recommend", "--help").output.split())
    assert f"{', '.join(law.name for law in laws)}. [default: {laws[0].name}]" in words


def test_a_size_so_small_that_no_tokens_help() -> None:
    words = ("--gpus", "160", "--days", "5", "--law", "epoch", "--size-factor", "0.01")
    assert as_json(*words)["size_factor"]["tokens"] is None
    assert "reach this loss on no number of tokens" in " ".join(ask(*words).output.split())


def test_a_size_gets_the_tokens_that_are_optimal_for_it() -> None:
    found = as_json("--model", "gpt3/5b", "--gpus", "128", "--tokens", "compute-optimal")
    assert 15 < found["model"]["tokens"] / found["model"]["parameters"] < 25
    assert "epoch" in found["tokens_by"]


def write(path: Path, runs: SeedRuns, names: Sequence[str] = ("parameters", "tokens", "loss")) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "note"])
        for columns in zip(runs.parameters, runs.tokens, runs.loss, strict=True):
            writer.writerow([*map(repr, map(float, columns)), "a, note"])
    return path


@pytest.fixture
def own_runs(tmp_path: Path) -> Path:
    """Thirty good runs, in the other names of the columns."""
    return write(tmp_path / "runs.csv", grid(LEVELS, RATIOS, 0.002), ("N", "D", "Loss"))


def test_own_runs_are_fitted_and_what_is_ignored_is_said(own_runs: Path) -> None:
    result = ask("--runs", own_runs)
    assert "ignored columns: note" in result.stderr
    assert result.stdout.startswith("a law fitted to 30 runs")
    assert "warning" not in result.stdout
    found = as_json("--runs", own_runs)
    assert found["trusted"]
    assert found["fit"]["ignored_columns"] == ["note"]
    assert found["law"]["E"] == pytest.approx(1.8, abs=0.1)
    for name, (low, high) in found["fit"]["interval_80"].items():
        assert low <= found["law"][name] <= high


def test_the_published_runs_through_the_command(chinchilla: SeedRuns, tmp_path: Path) -> None:
    found = as_json("--runs", write(tmp_path / "c.csv", chinchilla), "--gpus", "160", "--days", "5")
    expected = {"E": 1.81724, "A": 477.84, "B": 2143.86, "alpha": 0.34731, "beta": 0.36718}
    assert {name: found["law"][name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert len(found["fit"]["dropped"]) == 5
    low, high = found["optimum"]["parameters_interval"]
    assert low < found["optimum"]["parameters"] < high
    assert found["fit"]["supported_compute"] == pytest.approx(10 * found["fit"]["compute"][1])


def test_warnings_are_printed_and_in_the_json(own_runs: Path) -> None:
    # 30 runs up to 3e19 FLOP say little about 1e22.
    words = ("--runs", own_runs, "--gpus", "160", "--days", "5")
    lines = ask(*words).stdout.splitlines()
    assert lines[0].startswith("not to be trusted: train ")
    assert any(line.startswith("warning: ") and "is a guess" in line for line in lines)
    found = as_json(*words)
    assert not found["trusted"]
    assert [doubt["kind"] for doubt in found["warnings"]] == ["extrapolated_100x"]


def test_next_runs_are_suggested_with_their_reasons(own_runs: Path) -> None:
    words = ("--runs", own_runs, "--gpus", "8", "--days", "1", "--next-runs")
    found = as_json(*words)["next_runs"]
    assert len(found) == 4
    assert all(run["compute"] <= 6.41e19 and "tokens per parameter" in run["reason"] for run in found)
    assert "Next seed runs" in ask(*words).output


def test_a_plot_is_saved_where_asked(own_runs: Path, tmp_path: Path) -> None:
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        path = tmp_path / f"fit{suffix}"
        assert f"written: {path}" in ask("--runs", own_runs, "--plot", path).output
        assert path.read_bytes().startswith(start)
    assert {p.name for p in tmp_path.iterdir()} == {"fit.png", "fit.svg", "fit.pdf", "runs.csv"}


# ---------------------------------------------------------------- mistakes


BUDGET = ("--gpus", "160", "--days", "5")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--gpus and --days: needed, such as --gpus 160 --days 5"),
        (("--gpus", "160"), "--days: needed"),
        (("--days", "5"), "--gpus: needed"),
        (("--gpus", "160", "--days", "0"), "--days: 0 given, allowed is more than 0"),
        (("--gpus", "160", "--days", "-5"), "--days: -5 given, allowed is more than 0"),
        (("--gpus", "160", "--days", "nan"), "--days: nan given, allowed is more than 0"),
        (("--gpus", "160", "--days", "inf"), "--days: inf given, allowed is more than 0"),
        (("--gpus", "160", "--days", "x"), "'x' is not a valid float"),
        (("--gpus", "0", "--days", "5"), "--gpus: 0 given, allowed is more than 0"),
        (("--gpus", "-8", "--days", "5"), "--gpus: -8 given, allowed is more than 0"),
        (("--gpus", "100", "--days", "5"), "--gpus: 100 given, allowed are whole nodes of 8 GPUs: 96 or 104"),
        (("--gpus", "999999", "--days", "5"), "--gpus: 999999 given, allowed is 1 to 131072"),
        ((*BUDGET, "--cluster", "local"), "--gpus: 160 given, allowed is 1 to 2 (local)"),
        (("--gpus", "4", "--days", "5", "--cluster", "dgx-a100"), "allowed are whole nodes of 8 GPUs: 8"),
        ((*BUDGET, "--cluster", "dgx-a10"), "unknown cluster profile; did you mean dgx-a100?"),
        ((*BUDGET, "--gpu", "a1000"), "--gpu: gpu: unknown GPU 'a1000'; did you mean a100?"),
        ((*BUDGET, "--gpu", "h100", "--cluster", "dgx-a100"), "--gpu: is not for use with --cluster"),
        ((*BUDGET, "--tokens", "0"), "--tokens: '0' given, allowed is a number from 1 to 1e+18"),
        ((*BUDGET, "--tokens", "-3e9"), "--tokens: '-3e9' given, allowed is a number"),
        ((*BUDGET, "--tokens", "many"), "--tokens: 'many' given, allowed is a number"),
        ((*BUDGET, "--tokens", "nan"), "--tokens: 'nan' given, allowed is a number"),
        ((*BUDGET, "--tflops", "0"), "--tflops: 0 given, allowed is more than 0"),
        ((*BUDGET, "--tflops", "400"), "--tflops: 400 given, allowed is up to 312, the peak of a100-80gb"),
        ((*BUDGET, "--family", "gpt4"), "--family: unknown family 'gpt4'; did you mean gpt3?"),
        ((*BUDGET, "--confidence", "1"), "--confidence: 1 given, allowed is 0.5 or more and less than 1"),
        ((*BUDGET, "--law", "kaplan"), "--law: unknown law 'kaplan'; allowed are epoch, hoffmann, muennighoff"),
        ((*BUDGET, "--law", "epoch", "--tokens", "1T"), "--tokens: 1T given, but --law finds the tokens"),
        ((*BUDGET, "--size-factor", "0.5"), "--size-factor: needs --tokens compute-optimal (or --runs)"),
        ((*BUDGET, "--next-runs"), "--next-runs: needs --runs"),
        ((*BUDGET, "--keep-outliers"), "--keep-outliers: needs --runs"),
        ((*BUDGET, "--plot", "x.png"), "--plot: needs --runs"),
        (("--tokens", "compute-optimal"), "--gpus and --days: needed"),
        (("--model", "gpt3/20b"), "--gpus or --days: one is needed beside --model"),
        (("--model", "gpt3/20b", "--family", "gpt3", "--days", "5"), "--family: is not for use with --model"),
        (("--model", "gpt4/20b", "--days", "5"), "gpt4/20b: unknown model preset"),
        (("--model", "my.yaml", "--days", "5"), "--tokens: needed beside --model my.yaml, which is no preset"),
        (("--runs", "no-such.csv"), "no-such.csv: cannot be read: No such file or directory"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], said: str) -> None:
    result = hptool("recommend", *words)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if "rror:" in line]
    assert said in line


GOOD = "parameters,tokens,loss\n" + "".join(f"{n}e7,{n + i}e9,{4 - n / 9}\n" for i, n in enumerate(range(1, 9)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file is empty"),
        ("parameters,tokens,loss\n", "0 runs given, allowed is 6 or more"),
        ("parameters,tokens,loss\n1e7,1e9,3\n", "1 run given, allowed is 6 or more: the law has five parameters"),
        (GOOD.replace("2e7,", "nan,"), "line 3: parameters: 'nan' given, allowed is a number from 1 to 1e+18"),
        (GOOD.replace("2e7,", "ten,"), "line 3: parameters: 'ten' given, allowed is a number from 1 to 1e+18"),
        (GOOD.replace("2e7,", ","), "line 3: parameters: '' given"),
        (GOOD.replace("2e7,", "0,"), "line 3: parameters: '0' given"),
        (GOOD.replace("2e7,", "-2e7,"), "line 3: parameters: '-2e7' given"),
        (GOOD.replace("2e7,", "inf,"), "line 3: parameters: 'inf' given"),
        (GOOD.replace("2e7,", "2_000_000,"), "line 3: parameters: '2_000_000' given"),
        (GOOD.replace("2e7,", "2e7,1,"), "line 3: 4 cells given, allowed is 3, as in line 1"),
        (GOOD.replace("loss", "los"), "column loss missing; given are parameters, tokens, los"),
        (GOOD.replace("tokens", "N"), "columns parameters, N given, allowed is one of parameters or N"),
        (GOOD + '"1e7', "not a CSV table (line"),
    ],
)
def test_runs_that_are_none_are_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text)
    result = hptool("recommend", "--runs", path)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if "error:" in line]
    assert said in lines[0]
    assert len(lines) == (2 if "columns parameters, N" in said else 1)


def test_a_file_of_mistakes_tells_ten_of_them(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("N,D,loss\n" + "x,y,z\n" * 100)
    result = hptool("recommend", "--runs", path)
    lines = result.stderr.splitlines()
    assert len(lines) == 11
    assert "and 290 more mistakes" in lines[-1]


def test_plots_go_where_they_can(own_runs: Path, tmp_path: Path) -> None:
    for path, said in (
        (tmp_path / "fit.txt", "allowed is a file ending in .png, .svg, .pdf"),
        (tmp_path / "none" / "fit.png", "cannot be written: No such file or directory"),
    ):
        result = hptool("recommend", "--runs", own_runs, "--plot", path)
        assert result.exit_code == 2
        assert f"--plot: {path}" in result.stderr
        assert said in result.stderr


def test_a_byte_order_mark_and_blank_lines_are_no_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n\r\n").encode())
    assert as_json("--runs", path)["fit"]["runs"] == 8


def test_figures_of_every_answer_are_finite_json(own_runs: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    for words in (
        (*BUDGET,),
        ("--gpus", "8", "--days", "1e-6"),
        ("--runs", own_runs, *BUDGET, "--size-factor", "0.001"),
    ):
        json.loads(ask(*words, "--json").stdout, parse_constant=refuse)
    assert np.isfinite(as_json(*BUDGET)["parameters_that_fill_the_budget"])
