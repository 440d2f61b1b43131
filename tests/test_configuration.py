"""`hptool base-config`: what it writes can start and fits into memory, and what does not fit is said first."""

import json
import shutil
import sysconfig
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hptool import catalogue, files
from hptool.base_config import BaseConfig
from hptool.candidates import refusal
from hptool.cli import main
from hptool.configuration import ConfigRequest, MadeConfig, make_config
from hptool.errors import NoFeasibleLayout

MODELS = [name for name in catalogue.preset_names() if not catalogue.preset(name).toy]


def run(*words: str) -> Result:
    """`hptool base-config` with these words."""
    return CliRunner().invoke(main, ["base-config", *words])


def made(**options: object) -> tuple[MadeConfig, list[str]]:
    """A config, and what was said of it."""
    said: list[str] = []
    return make_config(ConfigRequest(**options), said.append), said  # type: ignore[arg-type]


@pytest.mark.parametrize("model", MODELS)
def test_every_preset_becomes_a_config_that_can_start_and_fits(model: str) -> None:
    found, said = made(model=model)
    config = files.parse(files.parse_yaml(found.text, model), BaseConfig, model)
    assert config.layout.name == found.layout
    assert refusal(config.layout, config.workload) is None
    assert found.p_fit > 0.5
    assert found.memory_gib < 80
    assert config.shape == catalogue.preset(model).shape
    assert ("over its time limit" in said[0]) == (not found.in_time)
    assert ("longer than its time limit" in found.text) == (not found.in_time)


def test_a_training_longer_than_its_limit_is_said_first() -> None:
    # The predecessor gave GPT-3 175B ten days on 1,024 A100s, and estimated 33.9 without a word.
    _, said = made(model="gpt3/175b")
    assert said[0].startswith("over its time limit: 18.")
    assert "10 given" in said[0]
    _, said = made(model="gpt3/175b", days=40)
    assert len(said) == 1


def test_the_config_says_which_batch_divides_over_its_gpus() -> None:
    text = made(model="gpt3/5b", nodes=20)[0].text
    assert "global_batch_size: 1920  # 2048 in the recipe; this divides over 160 devices" in text
    config = files.parse(files.parse_yaml(text, "5b"), BaseConfig, "5b")
    assert config.trainer.max_steps == 300_000_000_000 // (1920 * 2048)


def test_a_custom_size_and_sequence_length() -> None:
    found, _ = made(model="llama", size="1.5b", gpu="h100-80gb", nodes=2, seq_length=16384)
    assert found.num_parameters == pytest.approx(1.5e9, rel=0.02)
    config = files.parse(files.parse_yaml(found.text, "llama"), BaseConfig, "llama")
    assert (config.shape.seq_length, config.model.global_batch_size) == (16384, 128)
    assert config.gpus == 16


def test_a_users_config_gets_a_layout_for_these_nodes(tmp_path: Path) -> None:
    given = tmp_path / "mine.yaml"
    given.write_text(made(model="gpt3/20b", nodes=8)[0].text.replace("num_layers: 44", "num_layers: 48"))
    found, _ = made(model=str(given), cluster="dgx-h100", nodes=4)
    config = files.parse(files.parse_yaml(found.text, "mine"), BaseConfig, "mine")
    assert (config.shape.num_layers, config.gpus) == (48, 32)
    assert found.time_limit_days is None


def test_another_batch_trains_on_the_same_tokens() -> None:
    result = run("--model", "gpt3/5b", "--nodes", "20", "model.global_batch_size=1280")
    config = files.parse(files.parse_yaml(result.stdout, "5b"), BaseConfig, "5b")
    assert config.trainer.max_steps == 300_000_000_000 // (1280 * 2048)
    result = run("--model", "gpt3/5b", "--nodes", "20", "model.global_batch_size=1280", "trainer.max_steps=7")
    assert files.parse(files.parse_yaml(result.stdout, "5b"), BaseConfig, "5b").trainer.max_steps == 7


def test_overrides_reach_the_config() -> None:
    result = run("--model", "gpt3/5b", "--nodes", "4", "model.optim.lr=3e-4", "model.tensor_model_parallel_size=4")
    config = files.parse(files.parse_yaml(result.stdout, "5b"), BaseConfig, "5b")
    assert (config.model.optim.lr, config.layout.tp) == (3e-4, 4)


def test_no_layout_holds_a_model_that_is_too_large() -> None:
    with pytest.raises(
        NoFeasibleLayout, match=r"no layout of gpt3_175b fits into 8 a100-80gb: the least, tp8-.* of 79.2 GiB"
    ):
        made(model="gpt3/175b", nodes=1)


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["--model", "gpt3/5c"], "did you mean gpt3/5b?", 2),
        (["--model", "gpt4", "--size", "5b"], "--model: unknown family 'gpt4'; did you mean gpt3?", 2),
        (["--model", "gpt3/5b", "--size", "6b"], "--size: 6b given, but --model gpt3/5b has a size", 2),
        (["--model", "gpt3", "--size", "banana"], "--size: 'banana' given, allowed is a size such as 6.7b or 350m", 2),
        (["--model", "gpt3"], "gpt3: is a family; allowed are gpt3/gpt2_124m, gpt3/126m, ", 2),
        (["--model", "gpt3/5b", "--days", "0"], "--days: 0 given, allowed is more than 0", 2),
        (["--model", "gpt3/5b", "--nodes", "0"], "--nodes: 0 given, allowed is 1 to", 2),
        (["--model", "gpt3/5b", "--seq-length", "0"], "--seq-length: 0 given, allowed is 1 or more", 2),
        (["--model", "gpt3/5b", "--gpu", "a1000"], "--gpu: gpu: unknown GPU 'a1000'", 2),
        (["--model", "gpt3/5b", "--gpu", "a100", "--cluster", "dgx-a100"], "give one of them", 2),
        (["--model", "missing.yaml"], "missing.yaml: cannot be read", 2),
        (["--model", "missing.yaml", "--size", "5b"], "go with a family's presets", 2),
        (["--model", "gpt3/175b", "--nodes", "1"], "no layout of gpt3_175b fits", 3),
    ],
)
def test_bad_input_is_one_clear_error(words: list[str], message: str, code: int) -> None:
    result = run(*words)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "c.yaml"
    assert run("--model", "gpt3/126m", "--output", str(output)).exit_code == 0
    output.write_text("mine")
    result = run("--model", "gpt3/126m", "--output", str(output))
    assert (result.exit_code, output.read_text()) == (2, "mine")
    assert run("--model", "gpt3/126m", "--output", str(output), "--overwrite").exit_code == 0
    assert "gpt3_126m" in output.read_text()


def test_json_holds_the_config_and_its_figures() -> None:
    document = json.loads(run("--model", "t5/11b", "--json").stdout)
    assert document["config"]["model"]["encoder"]["num_layers"] == 24
    assert document["num_parameters"] == catalogue.preset("t5/11b").shape.num_parameters
    assert document["in_time"] is (document["training_days"] <= document["time_limit_days"])


def test_presets_are_listed_with_their_parameters() -> None:
    lines = run("--list").stdout.splitlines()
    assert len(lines) == len(catalogue.preset_names())
    assert any(line.split() == ["llama/llama3_8b", "8.03B"] for line in lines)


def test_the_command_is_installed() -> None:
    assert shutil.which("hptool", path=sysconfig.get_path("scripts")) is not None
