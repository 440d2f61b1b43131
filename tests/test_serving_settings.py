"""What a serving search is asked in the predecessor's YAML keys, and by options that come before them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from hptool import files
from hptool.cli import main
from hptool.errors import InputError
from hptool.serving import Lengths
from hptool.serving_plan import ServingPlan, make_serving_plan, read_serving_plan
from hptool.serving_settings import read_settings, request_of
from tests.conftest import ROOT

SHIPPED: dict[str, dict[str, Any]] = files.read_yaml(ROOT / "tests" / "data" / "inference_settings.yaml")

#: Its knobs, where the table of them is at hand.
KNOBS = ROOT.parent / "shared" / "facts" / "knobs.yaml"
CONFIGS = ROOT.parent / "shared" / "facts" / "search_configs.yaml"

#: As its own files are written, the interpolations of its launcher and what YAML might take for a number among it.
TEMPLATE = """\
train_settings:
  model_size_in_b: 5 # unit in billion parameters
  logs: ${base_results_dir}/${search_config_value}_${.gpu_memory_gb}gb

inference_settings:
  run:
    model_type: gpt3
    model_train_name: %(model)s
    gpus_per_node: 8
    data_type: "fp16" # fp32|fp16|bf16
    time_limit: 0:30:00
    results_dir: ${base_results_dir}/${search_config_value}_${search_config.train_settings.gpu_memory_gb}gb
    tensor_parallel_sizes: %(tp)s
    pipeline_parallel_sizes: %(pp)s
  benchmark:
    input_len: 60
    output_len: 20
    batch_sizes: %(batch_sizes)s
    beam_width: 1
    topk: 4
    topp: 0.0
"""


def shipped(name: str, folder: Path) -> Path:
    path = folder / "settings.yaml"
    path.write_text(TEMPLATE % SHIPPED[name])
    return path


def settings(folder: Path, **sections: Any) -> Path:
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump({"inference_settings": sections}))
    return path


def planned(path: Path, **options: Any) -> ServingPlan:
    request, _ = request_of({"settings": path, "cluster": "dgx-a100", **options})
    return make_serving_plan(request)


def search(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["search-inference", *map(str, words), "--dry-run"], env={"COLUMNS": "100"})


# ---------------------------------------------------------------- its own files


@pytest.mark.parametrize("name", SHIPPED)
def test_each_of_its_searches_can_be_made(name: str, tmp_path: Path) -> None:
    values = SHIPPED[name]
    plan = planned(shipped(name, tmp_path))
    request = plan.request
    assert request.model == values["model"].replace("_", "/")
    assert request.workload == (Lengths(input_len=60, output_len=20),)
    assert (list(request.space.tp or ()), list(request.space.pp or ())) == (values["tp"], values["pp"])
    assert list(request.space.batch_sizes or ()) == values["batch_sizes"]
    assert request.space.precision == ("fp16",)
    assert request.max_minutes_per_run == 30
    assert request.results is None, "an interpolation of its launcher is no directory"
    layouts = {(p.layout.tp, p.layout.pp) for p in plan.candidates.points}
    assert layouts <= {(tp, pp) for tp in values["tp"] for pp in values["pp"]}
    assert {tp for tp, _ in layouts} == set(values["tp"])
    assert {p.batch for p in plan.candidates.points} == set(values["batch_sizes"])


def test_its_searches_are_all_that_it_came_with() -> None:
    if not CONFIGS.is_file():
        pytest.skip("the table of its searches is not at hand")
    theirs = {name: entry["inference"] for name, entry in files.read_yaml(CONFIGS).items() if "inference" in entry}
    ours = {name: {key: entry[key] for key in ("tp", "pp", "batch_sizes")} for name, entry in SHIPPED.items()}
    assert ours == theirs


def test_all_of_its_knobs_are_read() -> None:
    if not KNOBS.is_file():
        pytest.skip("the table of its knobs is not at hand")
    theirs = {key: set(knobs) for key, knobs in files.read_yaml(KNOBS).items() if key.startswith("inference_settings.")}
    ours = yaml.safe_load(TEMPLATE % SHIPPED["gpt3/5b"])["inference_settings"]
    assert {f"inference_settings.{section}": set(keys) for section, keys in ours.items()} == theirs


def test_what_no_layout_can_have_of_its_lists_is_counted_and_no_mistake(tmp_path: Path) -> None:
    # 52 layers have no eight equal stages.
    plan = planned(shipped("gpt3/43b", tmp_path))
    assert {p.layout.pp for p in plan.candidates.points} == {1, 2, 4}
    assert "pp does not divide the 52 layers" in {r.reason for r in plan.candidates.rejections}
    # Listed on the command line it is one.
    with pytest.raises(InputError, match="--pp: 8 given, but no layout can have it: pp does not divide the 52 layers"):
        planned(tmp_path / "settings.yaml", pp=(1, 8))


def test_a_file_without_a_serving_search_says_so(tmp_path: Path) -> None:
    path = tmp_path / "t5.yaml"
    path.write_text("train_settings: {model_size_in_b: 11}\n")
    with pytest.raises(InputError, match=r"t5\.yaml: inference_settings: required key is missing"):
        read_settings(path)
    done = search("--settings", path, "--cluster", "local")
    assert done.exit_code == 2
    assert "Traceback" not in done.output


# ---------------------------------------------------------------- its keys


@pytest.mark.parametrize(
    ("section", "keys", "said"),
    [
        ("run", {"tensor_paralel_sizes": [1]}, "run.tensor_paralel_sizes: unknown key; did you mean tensor_parallel_s"),
        ("benchmark", {"batch_size": [4]}, "benchmark.batch_size: unknown key; did you mean batch_sizes?"),
        ("bench", {"batch_sizes": [4]}, "bench: unknown key; did you mean benchmark?"),
        ("run", {"data_type": "int8"}, "run.data_type: 'int8' given, allowed is 'fp32', 'fp16' or 'bf16'"),
        ("run", {"tensor_parallel_sizes": "two"}, "run.tensor_parallel_sizes: 'two' given"),
        ("run", {"tensor_parallel_sizes": [1.5]}, "run.tensor_parallel_sizes.0: 1.5 given"),
        ("benchmark", {"input_len": "long"}, "benchmark.input_len: 'long' given"),
        ("benchmark", {"beam_width": 2}, "benchmark.beam_width: 2 given, allowed is 1: beams are batches that share"),
        ("benchmark", {"beam_width": 0}, "benchmark.beam_width: 0 given, allowed is 1"),
        ("run", {"model_train_name": "gpt3_12x"}, "run.model_train_name: 'gpt3_12x' given; gpt3/12x: unknown model"),
        ("run", {"model_train_name": "nonsense"}, "run.model_train_name: 'nonsense' given; nonsense: unknown model"),
    ],
)
def test_a_mistake_in_a_file_is_named_by_its_key(section: str, keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = settings(tmp_path, **{section: keys})
    with pytest.raises(InputError) as caught:
        read_settings(path)
    assert f"{path}: inference_settings" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [("0:30:00", 30), ("1:30:00", 90), ("00:00:45", 0.75), ("1-00:00:00", 1440), ("2-12:05:30", 3605.5)],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(limit: str, minutes: float, tmp_path: Path) -> None:
    assert read_settings(settings(tmp_path, run={"time_limit": limit})).options["max_minutes_per_run"] == minutes


@pytest.mark.parametrize("limit", ["30", "0:30", "-1:00:00", "half an hour", "", "1:2:3:4", "0:x:00", "1--1:00:00"])
def test_another_time_limit_is_a_mistake(limit: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run\.time_limit: .* given, allowed is H:MM:SS or D-HH:MM:SS$"):
        read_settings(settings(tmp_path, run={"time_limit": limit}))


def test_a_time_limit_that_yaml_reads_as_a_number_has_to_be_quoted(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("inference_settings: {run: {time_limit: 1:30:00}}\n")
    with pytest.raises(
        InputError, match="5400 given, allowed is H:MM:SS or D-HH:MM:SS; YAML reads 1:30:00 as a number"
    ):
        read_settings(path)
    path.write_text("inference_settings: {run: {time_limit: '1:30:00'}}\n")
    assert read_settings(path).options["max_minutes_per_run"] == 90


@pytest.mark.parametrize("given", ["fp16", "bf16", "fp32"])
def test_what_it_computes_in(given: str, tmp_path: Path) -> None:
    asked = read_settings(settings(tmp_path, run={"data_type": given}))
    assert asked.options["precision"] == (given,)


def test_what_changes_nothing_is_said(tmp_path: Path) -> None:
    done = search(
        "--settings", shipped("gpt3/5b", tmp_path), "--cluster", "dgx-a100", "--nodes", "1", "--results",
        tmp_path / "run",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    for word in ("topk and topp", "gpus_per_node changes nothing"):
        assert word in done.stderr


def test_an_empty_search_is_its_defaults(tmp_path: Path) -> None:
    asked = read_settings(settings(tmp_path))
    options = {"workload": "60:20", "precision": ("fp16",), "max_minutes_per_run": 30.0}
    assert asked.options == options
    with pytest.raises(InputError, match="--model: required"):
        request_of({"settings": settings(tmp_path), "cluster": "dgx-a100"})


def test_a_directory_of_its_is_used_where_it_is_one(tmp_path: Path) -> None:
    run = {"results_dir": str(tmp_path / "there")}
    assert read_settings(settings(tmp_path, run=run)).options["results"] == tmp_path / "there"
    run = {"results_dir": "/logs/${search_config_value}"}
    assert "results" not in read_settings(settings(tmp_path, run=run)).options


# ---------------------------------------------------------------- options come first


def test_options_come_before_the_file(tmp_path: Path) -> None:
    path = shipped("gpt3/5b", tmp_path)
    options = {
        "model": "gpt3/126m",
        "workload": "100:50,16:4",
        "tp": (1,),
        "batch_sizes": (2,),
        "precision": ("fp32",),
        "max_minutes_per_run": 3.0,
        "results": tmp_path / "mine",
    }
    request, _ = request_of({"settings": path, "cluster": "dgx-a100", **options})
    assert request.model == "gpt3/126m"
    assert [lengths.name for lengths in request.workload] == ["100:50", "16:4"]
    assert (request.space.tp, request.space.pp, request.space.batch_sizes) == ((1,), (1, 2), (2,))
    assert request.space.precision == ("fp32",)
    assert (request.max_minutes_per_run, request.results) == (3.0, tmp_path / "mine")


def test_a_model_that_an_option_names_need_not_be_known_to_the_file(tmp_path: Path) -> None:
    path = settings(tmp_path, run={"model_train_name": "my_own_training"})
    request, _ = request_of({"settings": path, "cluster": "dgx-a100", "model": "gpt3/126m"})
    assert request.model == "gpt3/126m"


def test_a_file_and_options_make_a_search_that_goes_on(tmp_path: Path) -> None:
    words = ("--settings", shipped("gpt3/20b", tmp_path), "--cluster", "dgx-a100", "--nodes", "2")
    done = search(*words, "--max-latency-ms", "2000", "--results", tmp_path / "run")
    assert done.exit_code == 0, done.output
    plan = read_serving_plan(tmp_path / "run")
    assert plan.request.targets.max_latency_ms == 2000
    assert {(p.layout.tp, p.layout.pp) for p in plan.candidates.points} == {
        (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2)
    }  # fmt: skip
    (tmp_path / "run" / "outcomes.jsonl").touch()
    again = search(*words, "--max-latency-ms", "2000", "--results", tmp_path / "run", "--resume")
    assert again.exit_code == 0, again.output


def test_the_same_length_is_asked_once() -> None:
    request, _ = request_of({"model": "gpt3/tiny", "cluster": "local", "workload": "60:20,16:4,60:20"})
    assert [lengths.name for lengths in request.workload] == ["60:20", "16:4"]
