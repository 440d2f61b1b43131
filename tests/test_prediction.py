"""`hptool predict` for a model on a cluster: ranked, explained, traced, and refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from syrupy.assertion import SnapshotAssertion

from hptool import files
from hptool.candidates import Layout, Recompute
from tests.test_cli import hptool

BIG = ("--model", "gpt3/175b", "--cluster", "dgx-a100", "--nodes", "64")


def predict(*words: str | Path) -> Result:
    """The command on 512 A100s, which must work."""
    result = hptool("predict", *BIG, *words, columns=80)
    assert result.exit_code == 0, result.output
    return result


def as_json(*words: str) -> Any:
    return json.loads(predict(*words, "--json").stdout)


def test_layouts_are_ranked_in_80_columns() -> None:
    lines = predict("--top", "3").output.splitlines()
    assert "gpt3_175b on 64 × dgx-a100, predicted" in lines[0]
    assert [line.split()[0] for line in lines[2:5]] == ["1", "2", "3"]
    assert all(len(line) <= 80 for line in lines)
    assert any("layouts can start" in line for line in lines)


def test_json_has_every_part_of_the_best() -> None:
    found = as_json("--top", "2")
    assert found["framework"] == "hptool-worker"
    assert len(found["layouts"]) == 2
    best = found["layouts"][0]
    figures = [best[f"predicted_{name}"] for name in ("step_time_low_s", "step_time_s", "step_time_high_s")]
    assert figures == sorted(figures)
    not_parts = ("predicted_step_time", "predicted_tokens", "predicted_model", "predicted_memory_gib")
    parts = {k: v for k, v in best.items() if k.startswith("predicted_") and not k.startswith(not_parts)}
    assert sum(v for k, v in parts.items() if k.endswith("_s")) == pytest.approx(best["predicted_step_time_s"])
    assert sum(v for k, v in parts.items() if k.endswith("_gib")) == pytest.approx(best["predicted_memory_gib"])


def test_the_same_layout_leads_a_search_and_a_prediction(tmp_path: Path) -> None:
    searched = hptool("search-train", *BIG, "--results", tmp_path / "run", "--dry-run", "--json", "--tp", "8")
    predicted = hptool("predict", *BIG, "--json", "--explain", json.loads(searched.stdout)["predicted"][0]["name"])
    found = json.loads(predicted.stdout)
    assert found["parts"]["predicted_step_time_s"][0] == pytest.approx(
        json.loads(searched.stdout)["predicted"][0]["step_time_s"]
    )


def test_another_framework_takes_another_time() -> None:
    ours, theirs = as_json("--top", "1"), as_json("--top", "1", "--framework", "megatron-core")
    assert theirs["framework"] == "megatron-core"
    assert theirs["layouts"][0]["predicted_step_time_s"] != ours["layouts"][0]["predicted_step_time_s"]


def test_an_explanation_says_where_each_second_and_gib_goes(snapshot: SnapshotAssertion) -> None:
    output = predict("--explain", "tp8-pp8-uniform1").output
    assert all(len(line) <= 80 for line in output.splitlines())
    assert output == snapshot


def test_the_best_is_explained_beside_the_second() -> None:
    best, second = (row["layout"] for row in as_json("--top", "2")["layouts"])
    found = as_json("--explain", best)
    assert (found["layout"], found["rival"]) == (best, second)
    assert found["optimistic_step_time_s"] <= found["parts"]["predicted_step_time_s"][0]
    assert found["parts"]["predicted_step_time_s"][0] <= found["pessimistic_step_time_s"]


def test_a_real_rank_is_traced_without_a_gpu() -> None:
    result = hptool(
        "predict",
        "--model",
        "gpt3/126m",
        "--cluster",
        "dgx-a100",
        "--nodes",
        "1",
        "--dry-run-memory",
        "tp2-pp2",
        "--json",
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    first, last = found["traced"]
    assert first["parameters"] > 0
    assert first["peak_gib"] >= last["peak_gib"] or last["logits_gib" if "logits_gib" in last else "peak_gib"] > 0
    fullest = max(first["peak_gib"], last["peak_gib"])
    assert found["predicted"]["peak_gib"] == pytest.approx(fullest, rel=0.05)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "gpt3/175b"), "--cluster: is needed beside --model"),
        (("--cluster", "dgx-a100"), "--model: is needed beside --cluster"),
        ((*BIG, "--explain", "tp8pp8"), "'tp8pp8' given, allowed is a layout such as tp8-pp8"),
        ((*BIG, "--explain", "tp7"), "tp7-pp1-vpp1-cp1-mbs1-none cannot start: tp does not divide"),
        ((*BIG, "--dry-run-memory", "tp7"), "cannot start: tp does not divide"),
        ((*BIG, "--framework", "megatron-cor"), "unknown framework 'megatron-cor'; did you mean megatron-core?"),
        ((*BIG, "--output", "x.csv"), "--output: is for a table of runs, not for --model"),
        ((*BIG, "--calibrate", "x.csv"), "--calibrate: is for a table of runs, not for --model"),
        (("--model", "gpt3/175", "--cluster", "dgx-a100"), "unknown model preset; did you mean gpt3/175b?"),
        (("--model", "gpt3/175b", "--cluster", "dgx-a10"), "unknown cluster profile; did you mean dgx-a100?"),
        ((), "'nothing' given, allowed is the path of one CSV table, or --model and --cluster"),
        (("a.csv", "b.csv"), "'a.csv b.csv' given"),
        (("no-such.csv",), "no-such.csv: cannot be read: No such file or directory"),
        (("no-such.csv", "--explain", "tp8"), "--explain: is for --model and --cluster"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], said: str) -> None:
    result = hptool("predict", *words)
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if "error:" in line]
    assert said in line


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(tp=8, pp=8, vpp=3, cp=2, mbs=4, recompute=Recompute.SELECTIVE),
        Layout(pp=4, ep=8, recompute=Recompute.BLOCK, recompute_num_layers=12),
    ],
)
def test_a_layouts_name_reads_back(layout: Layout) -> None:
    assert Layout.parse(layout.name) == layout


def test_a_profile_for_plain_ethernet_ships() -> None:
    assert files.read_cluster("ethernet-a100").inter_node.bandwidth_gb_per_s < 2
