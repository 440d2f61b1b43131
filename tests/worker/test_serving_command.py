"""Serving runs by a command of the user's: what it is told, what it may answer, and how it may fail."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hptool import files
from hptool.measurement import FailureKind, ServingMeasurement
from hptool.serving import Targets
from hptool.serving_orders import SERVING, ServingOrders
from hptool.worker import served, supervisor
from tests.worker.runs import tiny_config, tiny_document
from tests.worker.servings import TP2, points
from tests.worker.test_main import worker


def command(directory: Path, script: str, *words: str) -> tuple[str, ...]:
    """The words that run this Python script."""
    path = directory / "engine.py"
    path.write_text(f"import json, os, sys, time\n{script}\n")
    return (sys.executable, str(path), *words)


def serve(
    directory: Path, words: tuple[str, ...], named: tuple[str, ...] = ("4:3/1",), minutes: float = 1.0, **orders: Any
) -> ServingMeasurement:
    """Serves the tiny config by the command, in this process."""
    config = directory / "config.yaml"
    config.write_text(files.yaml_text(tiny_document(**TP2)))
    asked = ServingOrders(points=points(*named), engine="command", command=words, **orders)
    (directory / SERVING).write_text(files.json_text(asked))
    job = supervisor.NodeJob(config_path=str(config), run_directory=str(directory), max_minutes=minutes)
    supervisor.run_node(job)
    found = served.read(directory)
    assert found is not None
    assert files.parse_json(files.json_text(found), ServingMeasurement, "again") == found
    return found


def failure(directory: Path, script: str, **settings: Any) -> tuple[FailureKind, str]:
    """Of a command that answers nothing good."""
    found = serve(directory, command(directory, script), **settings)
    assert not found.points
    (failed,) = found.failures
    assert failed.name == "4:3/1"
    return failed.kind, failed.message


def test_it_is_told_its_point_and_its_answer_is_kept(tmp_path: Path) -> None:
    script = """
print("Loading weights...")
print(json.dumps({"latency_ms": [30.0, 10.0, 20.0], "ttft_ms": [5.0, 6.0, 7.0], "tpot_ms": 7.0, "memory_gib": 3.5,
    "tokens_per_s": 290, "engine": "mine 1.2", "device": " ".join(sys.argv[1:]), "cuda_graphs": True}, indent=1))
print("bye")
"""
    names = "{batch} {input_len} {output_len} {tp} {pp} {precision} {repeats} {}"
    found = serve(tmp_path, command(tmp_path, script, *names.split(), '{"max": 1}', "{config}"), ("4:3/2",))
    (point,) = found.points
    assert found.device == f'2 4 3 2 1 fp32 5 {{}} {{"max": 1}} {tmp_path / "config.yaml"}'
    assert (found.engine, found.cuda_graphs, found.gpus) == ("command: mine 1.2", True, 2)
    assert found.memory_kind == "as the command says"
    assert (point.latency_ms.p50, point.latency_low_ms, point.latency_high_ms) == (20, 10, 30)
    assert point.latency_ms.p99 == pytest.approx(29.8)
    assert (point.ttft_ms.p50, point.tpot_ms.p50, point.tpot_ms.p99) == (6, 7, 7)
    assert (point.tokens_per_s, point.tokens_per_s_per_gpu, point.tokens_per_s_per_user) == (290, 145, 150)
    assert (point.repeats, point.warmups, point.peak_memory_gib) == (3, 0, 3.5)
    assert "Loading weights" in (tmp_path / "logs" / "command-0.log").read_text()
    assert json.loads((tmp_path / "progress.json").read_text()) == {"step": 1, "of": 1, "tokens_per_s": 290}


@pytest.mark.parametrize(
    ("answer", "first", "token"),
    [
        ({}, 0.0, 0.0),
        ({"ttft_ms": 4.0}, 4.0, 8.0),
        ({"tpot_ms": 7.0}, 6.0, 7.0),
    ],
)
def test_what_it_leaves_out_follows_from_the_rest(
    answer: dict[str, float], first: float, token: float, tmp_path: Path
) -> None:
    found = serve(tmp_path, command(tmp_path, f"print(json.dumps({ {'latency_ms': 20} | answer }))"))
    (point,) = found.points
    assert (point.ttft_ms.p50, point.tpot_ms.p50) == (first, token)
    assert point.tokens_per_s == pytest.approx(150)
    assert (found.memory_kind, found.engine) == ("not told by the command", f"command: {Path(sys.executable).name}")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("print('hello'); print('done')", "the command printed no answer but 'done'; expected is a JSON object at the"),
        ("pass", "the command printed no answer but 'nothing'"),
        ("print('{\"latency_ms\": ')", "the command printed no answer"),
        ("print('{\"latency\": 3}')", "latency: unknown key; did you mean latency_ms?"),
        ("print('{\"latency_ms\": 0}')", "latency_ms: 0.0 given, allowed are numbers of more than 0"),
        ("print('{\"latency_ms\": []}')", "latency_ms: no number given"),
        ("print('{\"latency_ms\": NaN}')", "latency_ms"),
        ('print(\'{"latency_ms": "3 ms"}\')', "latency_ms"),
        ('print(\'{"latency_ms": 3, "ttft_ms": -1}\')', "ttft_ms: -1.0 given, allowed are numbers of 0 or more"),
    ],
)
def test_garbage_is_named_with_what_was_expected(script: str, said: str, tmp_path: Path) -> None:
    kind, message = failure(tmp_path, script)
    assert kind is FailureKind.INVALID
    assert said in message
    assert "expected is a JSON object at the end of stdout" in message


def test_a_target_needs_its_figure(tmp_path: Path) -> None:
    kind, message = failure(tmp_path, "print('{\"latency_ms\": 3}')", targets=Targets(max_ttft_ms=5.0))
    assert (kind, message) == (
        FailureKind.INVALID,
        "the command gave no ttft_ms, and max_ttft_ms is a target",
    )


def test_a_crash_is_told_by_its_last_words_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    script = "print('so far'); print('first', file=sys.stderr); sys.exit('no access with ' + os.environ['HF_TOKEN'])"
    assert failure(tmp_path, script) == (
        FailureKind.CRASH,
        "the command ended with exit code 1: no access with <masked: HF_TOKEN>",
    )
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or "hf_verysecret" not in path.read_text()


def test_out_of_memory_takes_larger_batches_along(tmp_path: Path) -> None:
    script = """
if sys.argv[1] == "2":
    sys.exit("RuntimeError: CUDA out of memory")
print(json.dumps({"latency_ms": 1 + int(sys.argv[1])}))
"""
    words = command(tmp_path, script, "{batch}")
    found = serve(tmp_path, words, ("4:3/1", "4:3/2", "4:3/4", "5:3/1"))
    assert [point.name for point in found.points] == ["4:3/1", "5:3/1"]
    assert [(failed.name, failed.kind) for failed in found.failures] == [("4:3/2", FailureKind.OOM)]
    assert found.skipped == ("4:3/4",)


def test_a_command_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    script = f"""
if sys.argv[1] == "1":
    print('{{"latency_ms": 3}}')
    sys.exit()
child = os.fork()
if child == 0:
    open({str(child)!r}, "w").write(str(os.getpid()))
time.sleep(600)
"""
    words = command(tmp_path, script, "{batch}")
    found = serve(tmp_path, words, ("4:3/1", "4:3/2", "4:3/4"), max_seconds=1.5)
    assert [point.name for point in found.points] == ["4:3/1"]
    assert [(failed.name, failed.kind) for failed in found.failures] == [("4:3/2", FailureKind.TIMEOUT)]
    assert "ended after 1.5 s of the run" in found.failures[0].message
    pid = int(child.read_text())
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{pid}/status") and "zombie" not in Path(f"/proc/{pid}/status").read_text():  # noqa: PTH110
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_command_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    result = worker(*_by_hand(tmp_path, ("/no/such/engine",)))
    assert result.returncode == 2
    assert "serving.json: command: '/no/such/engine' cannot be started: No such file or directory" in result.stderr


def test_by_hand_it_needs_no_torch(tmp_path: Path) -> None:
    script = "assert 'torch' not in sys.modules; print('{\"latency_ms\": 3}')"
    words = _by_hand(tmp_path, command(tmp_path, script))
    without = "import sys; sys.modules['torch'] = sys.modules['megatron'] = None; "
    start = f"{without}from hptool.worker.__main__ import main; main()"
    result = worker(*words, before=("-c", start))
    assert result.returncode == 0, result.stderr
    assert "4:3/1: 3 ms" in result.stdout


def _by_hand(directory: Path, words: tuple[str, ...]) -> tuple[str, ...]:
    (directory / "config.yaml").write_text(files.yaml_text(tiny_document()))
    orders = ServingOrders(points=points("4:3/1"), engine="command", command=words)
    (directory / SERVING).write_text(files.json_text(orders))
    return (str(directory / "config.yaml"), "--output", str(directory / "out"))


def test_a_command_may_cut_models_as_no_layout_here_can() -> None:
    from hptool.worker.refusals import refuse_unservable  # noqa: PLC0415 (beside its like)

    config = tiny_config(trainer__devices=8, model__tensor_model_parallel_size=8)
    refuse_unservable(config, ServingOrders(points=points("4:3/1"), engine="command", command=("x",)), "config.yaml")
