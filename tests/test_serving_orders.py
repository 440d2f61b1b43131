"""What a serving run is asked to do: read, written, and refused where it contradicts itself."""

import json
from typing import Any

import pytest

from hptool import files
from hptool.errors import InputError
from hptool.serving import Lengths, ServingLayout, ServingPoint, Targets
from hptool.serving_orders import PointOrder, ServingOrders

POINT = {"batch": 2, "input_len": 60, "output_len": 20}


def read(**changes: Any) -> ServingOrders:
    """Orders from a document."""
    return files.parse({"points": [POINT], **changes}, ServingOrders, "serving.json")


def test_what_is_written_is_read() -> None:
    orders = ServingOrders(
        points=(PointOrder(**POINT), PointOrder(**{**POINT, "batch": 4})),
        cuda_graphs=True,
        checkpoint="results/gpt",
        stops_early=True,
        targets=Targets(max_ttft_ms=50.0, percentile=99),
        max_seconds=600.0,
    )
    assert read(**json.loads(files.json_text(orders))) == orders
    assert [point.name for point in orders.points] == ["60:20/2", "60:20/4"]
    assert orders.larger(orders.points[0]) == orders.points[1:]
    assert orders.points[0].lengths == Lengths(input_len=60, output_len=20)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"points": []}, "points: none given, allowed is one or more"),
        ({"points": [{**POINT, "batch": 0}]}, "batch: 0 given, allowed is 1 or more"),
        ({"points": [POINT, POINT]}, "points: 60:20/2 given twice"),
        ({"repeats": 4}, "repeats: 4 given, allowed is 5 or more"),
        ({"engine": "command"}, "command: [] given, allowed is a list of words with engine command"),
        ({"command": ["vllm"]}, "command: ['vllm'] given, allowed is a list of words with engine command and none"),
        ({"engine": "command", "command": ["x", "{batches}"]}, "command: {batches} given, allowed are {batch}, "),
        ({"engine": "command", "command": ["x"], "checkpoint": "y"}, "checkpoint: given, allowed is null with engine"),
        ({"engine": "vllm"}, "engine: 'vllm' given"),
        ({"max_seconds": 0}, "max_seconds: 0.0 given, allowed is null or more than 0"),
        ({"targets": {"max_tpot_ms": -1}}, "targets.max_tpot_ms: -1.0 given, allowed is null or more than 0"),
        ({"cuda_graph": True}, "cuda_graph: unknown key; did you mean cuda_graphs?"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        read(**changes)
    assert any(said in problem for problem in caught.value.problems), caught.value.problems


def test_a_commands_words_are_filled_in_and_nothing_else() -> None:
    orders = read(engine="command", command=["run", "--batch={batch}", "{output_len}{tp}", '{"a": 1}', "$HOME; {}"])
    assert orders.words(orders.points[0], tp=8) == ["run", "--batch=2", "208", '{"a": 1}', "$HOME; {}"]


def test_orders_of_points_are_of_one_layout() -> None:
    def point(batch: int, **layout: Any) -> ServingPoint:
        lengths = Lengths(input_len=60, output_len=20)
        return ServingPoint(layout=ServingLayout(**layout), lengths=lengths, batch=batch)

    orders = ServingOrders.of([point(1, tp=2, cuda_graphs=True), point(2, tp=2, cuda_graphs=True)], repeats=7)
    assert (orders.cuda_graphs, orders.repeats) == (True, 7)
    assert [x.name for x in orders.points] == ["60:20/1", "60:20/2"]
    with pytest.raises(ValueError, match="of the layouts tp1-pp1-bf16, tp2-pp1-bf16 given"):
        ServingOrders.of([point(1), point(2, tp=2)])
