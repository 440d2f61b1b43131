"""Every family from its preset to a winner, on this machine: searched, measured, trained as Megatron-core builds it."""

import json
from pathlib import Path

import pytest

from hptool import catalogue
from tests.searches import finish, processes_of, start

#: What cuts each model over the two ranks: its own kind of parallelism, where it has one.
CUTS = {
    "llama/tiny": ("--tp", "2", "--pp", "1"),
    "mixtral/tiny": ("--tp", "1", "--pp", "1", "--ep", "2"),
    "bert/tiny": ("--tp", "1", "--pp", "2"),
    "t5/tiny": ("--tp", "1", "--pp", "2"),
    "mt5/tiny": ("--tp", "2", "--pp", "1"),
}


@pytest.mark.parametrize("model", CUTS)
def test_a_search_measures_the_model_of_the_preset(model: str, tmp_path: Path) -> None:
    results = tmp_path / "run"
    words = ("--model", model, *CUTS[model], "--mbs", "2", "--max-steps-per-run", "3", "--json")
    process = start(results, *words)
    out, err = finish(process)
    assert process.returncode == 0, err
    answer = json.loads(out)
    assert answer["winner"] is not None
    (run,) = answer["runs"]
    measured = json.loads((results / "runs" / run["name"] / "measurement.json").read_text())
    assert measured["num_parameters"] == catalogue.preset(model).shape.num_parameters
    assert measured["gpus"] == 2
    assert len(measured["losses"]) == 3
    assert processes_of(results) == []
