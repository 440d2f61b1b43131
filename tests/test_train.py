"""`hptool train`: what it refuses before anything starts, what it makes of a config, and trainings from end to end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hptool import files, seed_runs, train
from hptool.base_config import BaseConfig
from hptool.errors import InputError
from hptool.worker import orders
from hptool.worker.orders import Orders, Stop, TrainingResult
from tests.conftest import ROOT
from tests.searches import finish, processes_of, wait_for
from tests.worker.runs import tiny_document, tiny_family

TEXT = ROOT / "tests" / "data" / "gpl-3.txt"

#: A byte-level GPT on the text, on two ranks.
SMALL: dict[str, Any] = {
    "trainer__devices": 2,
    "trainer__limit_val_batches": 2,
    "trainer__log_every_n_steps": 1,
    "model__override_vocab_size": 257,
    "model__tokenizer": {"library": "byte-level"},
    "model__data__data_prefix": str(TEXT),
    "model__data__splits_string": "90,10,0",
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return written(tmp_path / "config.yaml")


def written(path: Path, **changes: Any) -> Path:
    """The small config with these changes, in a file."""
    path.write_text(files.yaml_text(tiny_document(**{**SMALL, **changes})))
    return path


def refusal(**request: Any) -> str:
    """What a request is refused with."""
    with pytest.raises(InputError) as caught:
        train.train(train.TrainRequest(**request), lambda _: None)
    return str(caught.value)


def given(config: Path, **request: Any) -> Orders:
    """The orders that a request comes to."""
    asked = train.TrainRequest(config=config, **request)
    return train._orders(asked, train._read_config(asked))


# ---------------------------------------------------------------- what a request comes to


def test_config_says_when_and_options_say_it_better(tmp_path: Path) -> None:
    config = written(
        tmp_path / "config.yaml",
        trainer__val_check_interval=30,
        trainer__limit_val_batches=7,
        trainer__max_time="00:01:00:30",
        exp_manager__checkpoint_callback_params={"every_n_train_steps": 40, "save_top_k": 5},
    )
    found = given(config)
    assert (found.validate_every, found.validation_batches) == (30, 7)
    assert (found.checkpoint_every, found.keep_checkpoints, found.max_seconds) == (40, 5, 3630.0)
    assert found.prompt is None
    found = given(config, validate_every=10, checkpoint_every=0, keep_checkpoints=1, sample_every=5)
    assert (found.validate_every, found.checkpoint_every, found.keep_checkpoints) == (10, 0, 1)
    assert (found.sample_every, found.prompt) == (5, "")


def test_checkpoints_come_with_validations_where_nothing_is_said(tmp_path: Path) -> None:
    config = written(
        tmp_path / "config.yaml",
        trainer__max_steps=400,
        trainer__val_check_interval=0.25,
        trainer__limit_val_batches=0,
        exp_manager__checkpoint_callback_params={"save_top_k": -1},
    )
    found = given(config)
    assert (found.validate_every, found.checkpoint_every, found.validation_batches) == (100, 100, 0)
    assert found.keep_checkpoints > 10**9
    assert found.max_seconds is None
    assert given(config, validate_every=50).validation_batches == 32


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__data__data_prefix": "/nowhere/set"}, "there is neither a set /nowhere/set.idx nor a text"),
        ({"model__tokenizer": {"library": "megatron"}}, "model.tokenizer.library: 'megatron' given"),
        ({"model__override_vocab_size": 200}, "model.override_vocab_size: 200 given"),
        ({"model__rampup_batch_size": [4, 3, 100]}, "model.rampup_batch_size: [4, 3, 100] given"),
        ({"model__rampup_batch_size": [8, 4, 100]}, "model.rampup_batch_size: [8, 4, 100] given"),
        ({"model__rampup_batch_size": [2, 2, 100]}, "multiples of 4"),
        ({"model__pipeline_model_parallel_size": 4}, "does not divide the 2 GPUs"),
        ({"trainer__max_time": "soon"}, "trainer.max_time: 'soon' given"),
    ],
)
def test_config_that_cannot_train_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(config=written(tmp_path / "config.yaml", **changes), results=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"validate_every": -1}, "--validate-every: -1 given, allowed is 0 or more"),
        ({"keep_checkpoints": 0}, "--keep-checkpoints: 0 given, allowed is 1 or more"),
        ({"temperature": -0.5}, "--temperature: -0.5 given"),
        ({"hellaswag": Path("/nowhere.jsonl")}, "/nowhere.jsonl: cannot be read"),
        ({"data": "/nowhere/text.txt"}, "there is neither a set"),
        ({"cluster": "dgx-a100"}, "trainer.devices: 2 given, allowed on dgx-a100 is 8"),
        ({"overrides": ("model.sed=3",)}, "model.sed: unknown key; did you mean seed?"),
    ],
)
def test_option_that_cannot_be_is_refused(request_: dict[str, Any], said: str, config: Path, tmp_path: Path) -> None:
    assert said in refusal(config=config, results=tmp_path / "out", **request_)
    assert not (tmp_path / "out").exists()


def test_bad_line_of_hellaswag_is_named_before_anything_starts(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"ctx": "x", "endings": ["a", "b"], "label": 4}\n')
    assert refusal(config=config, hellaswag=path) == f"{path}: line 1: label: 4 given, allowed is 0 to 1"


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_only_a_gpt_writes_and_chooses(family: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(files.yaml_text(tiny_document(**tiny_family(family))))
    said = refusal(config=config, prompt="x", hellaswag=tmp_path / "set.jsonl").splitlines()
    assert [line.partition(":")[0] for line in said] == ["--prompt", "--hellaswag"]
    assert all("is no GPT" in line for line in said)


def test_directory_of_something_else_is_left_alone(config: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    assert "is not empty and holds no training" in refusal(config=config, results=tmp_path / "out", resume=True)
    assert "is a file" in refusal(config=config, results=config)


def test_training_is_neither_begun_again_nor_gone_on_with_as_another(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "checkpoints" / "step-00000010").mkdir(parents=True)
    (out / orders.CONFIG).write_text(config.read_text())
    (out / orders.ORDERS).write_text("{}")
    assert "go on with --resume" in refusal(config=config, results=out)
    other = written(tmp_path / "other.yaml", model__num_layers=2)
    said = refusal(config=other, results=out, resume=True)
    assert "holds a training of another model: num_layers (4 there, 2 asked for)" in said
    heard: list[str] = []
    slower = files.parse(
        tiny_document(**{**SMALL, "model__optim__lr": 0.001, "trainer__limit_val_batches": 9}), BaseConfig, ""
    )
    train._check_held(out, slower, True, heard.append)  # noqa: FBT003 (resume)
    assert heard[0].endswith("model.optim.lr (0.01 there, 0.001 asked for)")
    assert heard[1] == f"going on from {out / 'checkpoints' / 'step-00000010'}"


# ---------------------------------------------------------------- rows of runs


def result(tokens: int, loss: float) -> TrainingResult:
    return TrainingResult(
        stopped=Stop.DONE,
        first_step=0,
        step=5,
        max_steps=5,
        parameters=1000,
        tokens=tokens,
        loss=loss,
        validation_loss=loss,
        hellaswag_accuracy=None,
        checkpoint="",
    )


def test_runs_are_collected_under_one_header(tmp_path: Path) -> None:
    path = tmp_path / "all" / "runs.csv"
    for tokens, loss in ((100, 3.25), (200, 3.0)):
        orders.check_runs(path)
        orders.add_run(path, result(tokens, loss))
    assert path.read_text() == "parameters,tokens,loss\n1000,100,3.25\n1000,200,3.0\n"


def test_table_with_other_columns_is_not_added_to(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("name,loss\n")
    assert f"{path}: the columns name,loss given" in refusal(config=config, runs=path)


# ---------------------------------------------------------------- from end to end


def start(config: Path, results: Path, *words: str) -> subprocess.Popen[str]:
    """The command as a user types it."""
    command = [sys.executable, "-m", "hptool", "train", "--config", str(config), "--results", str(results), *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )


def test_training_from_end_to_end(config: Path, tmp_path: Path) -> None:
    out, runs = tmp_path / "out", tmp_path / "runs.csv"
    questions = tmp_path / "set.jsonl"
    questions.write_text('{"ctx": "You may", "endings": ["convey", "xyzzy", "qqqqq", "!!"], "label": 0}\n')
    words = ("--validate-every", "4", "--prompt", "The", "--hellaswag", str(questions), "--runs", str(runs), "--json")
    process = start(config, out, *words, "trainer.max_steps=8")
    said, told = finish(process, timeout_s=120)
    assert process.returncode == 0, told
    assert "after step 8: validation loss" in told
    answer = json.loads(said)["result"]
    assert (answer["step"], answer["stopped"], answer["tokens"]) == (8, "done", 8 * 8 * 32)
    assert answer["hellaswag_accuracy"] in {0.0, 1.0}
    found, _ = seed_runs.read_runs(runs)
    shape = files.read(out / orders.CONFIG, BaseConfig).shape
    assert (found.parameters[0], found.tokens[0], found.loss[0]) == (
        shape.num_parameters,
        answer["tokens"],
        answer["validation_loss"],
    )
    assert scalars(out)["evaluation/validation_loss"] == {
        line["step"]: pytest.approx(line["validation_loss"])
        for line in map(json.loads, (out / orders.EVALUATIONS).read_text().splitlines())
    }
    rows = [line.split(",") for line in (out / orders.LOSSES).read_text().splitlines()]
    for place, name in enumerate(rows[0][1:], start=1):
        assert scalars(out)[f"train/{name}"] == {int(row[0]): pytest.approx(float(row[place])) for row in rows[1:]}
    # What is there is not trained again.
    process = start(config, out, "trainer.max_steps=8")
    _, told = finish(process, timeout_s=60)
    assert process.returncode == 2
    assert told == f"hptool: error: {out}: holds a training already; go on with --resume or choose another --results\n"


def scalars(directory: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: the values of each name by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415 (heavy)

    read = EventAccumulator(str(directory / orders.TENSORBOARD))
    read.Reload()
    return {name: {event.step: event.value for event in read.Scalars(name)} for name in read.Tags()["scalars"]}


def test_ctrl_c_saves_and_leaves_nothing_and_resume_goes_on(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(config, out, "trainer.max_steps=1000000")
    wait_for(lambda: (out / orders.LOSSES).exists() and (out / orders.LOSSES).read_text().count("\n") > 3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, told = finish(process, timeout_s=60)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert processes_of(out) == []
    stopped = files.parse_json((out / orders.RESULT).read_text(), TrainingResult, "")
    assert stopped.step >= 3
    process = start(config, out, "--resume", f"trainer.max_steps={stopped.step + 2}")
    said, told = finish(process, timeout_s=60)
    assert process.returncode == 0, told
    assert f"going on from {stopped.checkpoint}" in told
    assert f"trained {stopped.step + 2} of {stopped.step + 2} steps" in said
