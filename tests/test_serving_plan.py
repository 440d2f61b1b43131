"""The plan of a serving search: its document, the configs of its runs, and what is refused before it begins."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from hptool import catalogue, files
from hptool.cli import main
from hptool.errors import InputError, NoFeasibleLayout
from hptool.facts import Precision
from hptool.nemo_keys import PRECISIONS
from hptool.results import ResultsDirectory
from hptool.serving import Lengths, ServingLayout, Targets
from hptool.serving_candidates import ServingSpace
from hptool.serving_plan import ServingPlan, ServingRequest, by_promise, make_serving_plan, read_serving_plan
from hptool.worker.refusals import refuse_unservable
from hptool.worker.served import serving_config

SHORT, LONG = Lengths(input_len=16, output_len=4), Lengths(input_len=64, output_len=16)


def request(**asked: Any) -> ServingRequest:
    given: dict[str, Any] = {"model": "gpt3/tiny", "cluster": "local", "workload": (SHORT,)}
    return ServingRequest(**given | asked)


def plan_of(**asked: Any) -> ServingPlan:
    return make_serving_plan(request(**asked))


def begun(plan: ServingPlan) -> ServingPlan:
    """A plan whose search has begun in its directory."""
    results = ResultsDirectory(plan.directory)
    results.begin(plan.document(), resume=False)
    results.close()
    return plan


# ---------------------------------------------------------------- the document


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {
            "workload": (LONG, SHORT),
            "space": ServingSpace(tp=(1, 2), pp=(1,), batch_sizes=(4, 8), precision=("fp32",), cuda_graphs=(False,)),
            "targets": Targets(max_latency_ms=500.0, max_ttft_ms=50.0, max_tpot_ms=9.5, percentile=95),
            "objective": "latency",
            "strategy": "bisect",
            "limit_search_runs": 7,
            "budget_gpu_hours": 0.5,
            "max_hours": 2.0,
            "max_minutes_per_run": 3.5,
            "repeats": 9,
            "overrides": ("model.num_layers=2",),
        },
        {"engine": "command", "command": ("time it", "--batch={batch}", '{"a": 1}'), "objective": "pareto"},
        {"model": "llama/llama2_70b", "cluster": "dgx-a100", "nodes": 2, "submit": "array", "parallel": 3},
    ],
)
def test_a_plan_is_read_back_as_it_was_made(asked: dict[str, Any], tmp_path: Path) -> None:
    made = begun(plan_of(results=tmp_path / "run", **asked))
    read = read_serving_plan(tmp_path / "run")
    assert read.document() == made.document()
    # What the directory does not hold is what has been worked out already.
    same: dict[str, Any] = {"overrides": (), "results": tmp_path / "run"}
    assert replace(read.request, **same) == replace(made.request, **same)
    assert (read.config, read.nodes, read.engine) == (made.config, made.nodes, made.engine)
    assert read.candidates == made.candidates
    assert read.predictions.latency_ms.tolist() == made.predictions.latency_ms.tolist()


def test_the_document_keeps_no_secrets(tmp_path: Path) -> None:
    cluster = replace(files.read_cluster("local"), environment={"WANDB_API_KEY": "hush-hush"})
    plan = make_serving_plan(request(results=tmp_path / "run"), cluster)
    assert "hush-hush" not in files.json_text(plan.document())


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"workload": (LONG,)}, "workload"),
        ({"space": ServingSpace(tp=(1,))}, "space.tp (None there, [1] asked for)"),
        ({"repeats": 7}, "repeats (5 there, 7 asked for)"),
        ({"model": "llama/tiny"}, "model"),
        ({"overrides": ("model.num_layers=2",)}, "config.model.num_layers (4 there, 2 asked for)"),
        ({"engine": "command", "command": ("x",)}, "command"),
        ({"max_minutes_per_run": 2.0}, "max_minutes_per_run (30.0 there, 2.0 asked for)"),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_another_search_in_the_directory_is_refused_with_what_differs(
    other: dict[str, Any], named: str, tmp_path: Path, *, resume: bool
) -> None:
    begun(plan_of(results=tmp_path / "run"))
    plan = plan_of(results=tmp_path / "run", **other)
    with pytest.raises(InputError, match="holds another search; it differs in ") as caught:
        ResultsDirectory(plan.directory).begin(plan.document(), resume=resume)
    assert named in str(caught.value)


def test_what_changes_no_measurement_may_change_on_resume_and_is_kept(tmp_path: Path) -> None:
    first = begun(plan_of(results=tmp_path / "run"))
    (tmp_path / "run" / "outcomes.jsonl").touch()
    other = plan_of(
        results=tmp_path / "run",
        targets=Targets(max_latency_ms=5.0),
        objective="pareto",
        strategy="grid",
        limit_search_runs=99,
        max_hours=1.0,
    )
    results = ResultsDirectory(other.directory)
    results.begin(other.document(), resume=True)
    results.close()
    # A report that is made anew says the same as that of the search that went on.
    read = read_serving_plan(tmp_path / "run")
    assert read.document() == other.document()
    assert (read.request.objective, read.request.targets.max_latency_ms) == ("pareto", 5.0)
    assert (read.document()["search"], read.predictions.latency_ms.tolist()) == (
        first.document()["search"],
        first.predictions.latency_ms.tolist(),
    )


@pytest.mark.parametrize("text", ["{}", '{"search": {}, "asked": {}}', '{"search": 3, "asked": {}}', "[]", "null"])
def test_a_plan_that_is_none_is_one_clear_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InputError, match=r"plan\.json"):
        read_serving_plan(tmp_path)


def test_the_directory_is_called_after_the_search() -> None:
    assert plan_of().directory == Path("results/gpt3_tiny-serving-local-1n").absolute()


def test_a_search_keeps_the_facts_with_which_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = search(tmp_path, "--json")
    assert before.exit_code == 0, before.output
    own = tmp_path / "cluster" / "gpus" / "cpu.yaml"
    own.parent.mkdir(parents=True)
    facts = files.read_yaml(files.data_directory("cluster") / "gpus" / "cpu.yaml")
    own.write_text(files.yaml_text({**facts, "memory_gb_per_s": 60.0}))
    assert (
        json.loads(search(tmp_path / "other", "--json").stdout)["predicted"] != json.loads(before.stdout)["predicted"]
    )
    again = search(tmp_path, "--json", "--resume")
    assert again.exit_code == 0, again.output
    assert "the facts of cpu have changed: this search goes on with those it began with" in again.stderr
    assert json.loads(again.stdout)["predicted"] == json.loads(before.stdout)["predicted"]


# ---------------------------------------------------------------- the config of a run

#: All that write text. The tiny ones stand for their families on one node.
DECODERS = [name for name in catalogue.preset_names() if not name.startswith("bert/")]


@pytest.mark.parametrize("model", DECODERS)
def test_every_family_has_configs_that_the_worker_takes(model: str) -> None:
    positions = catalogue.preset(model).shape.max_position_embeddings
    workload = (Lengths(input_len=min(60, positions // 2), output_len=20),)
    plan = plan_of(model=model, cluster="dgx-a100", nodes=4, workload=workload, space=ServingSpace(batch_sizes=(1,)))
    # Those of one GPU, of a part of a node, of a whole one, and of several nodes.
    by_size = {layout.gpus: layout for layout in (p.layout for p in plan.candidates.points)}
    assert 1 in by_size
    for gpus, layout in by_size.items():
        config = plan.config_of(layout)
        assert config.trainer.num_nodes == max(1, gpus // 8) == plan.nodes_of(layout)
        assert config.trainer.num_nodes * config.trainer.devices == config.gpus == gpus
        assert (config.layout.tp, config.layout.pp, config.layout.vpp, config.layout.cp) == (layout.tp, layout.pp, 1, 1)
        assert config.precision == layout.precision == "bf16"
        assert config.shape.num_parameters == plan.config.shape.num_parameters
        point = next(p for p in plan.candidates.points if p.layout == layout)
        refuse_unservable(config, plan.orders_of([point], stops_early=False), model)
        serving_config(config)


@pytest.mark.parametrize(
    ("precision", "word", "fp8"),
    [("fp32", "fp32", False), ("bf16", "bf16", False), ("fp16", "fp16", False), ("fp8", "bf16", True)],
)
def test_precision_is_said_in_nemos_words(precision: Precision, word: str, *, fp8: bool) -> None:
    asked: dict[str, Any] = {"engine": "command", "command": ("x",), "space": ServingSpace(precision=(precision,))}
    plan = plan_of(model="gpt3/126m", cluster="dgx-h100", nodes=1, **asked)
    config = plan.config_of(ServingLayout(precision=precision))
    assert (PRECISIONS[config.trainer.precision], config.model.fp8) == (word, fp8)
    assert config.precision == precision


def test_a_run_is_ended_by_its_own_minutes_and_no_point_is_begun_in_the_last_of_them() -> None:
    plan = plan_of(max_minutes_per_run=90)
    point = plan.candidates.points[0]
    assert plan.config_of(point.layout).trainer.max_time == "00:01:30:00"
    assert plan.orders_of([point], stops_early=True).max_seconds == pytest.approx(81 * 60)


def test_a_users_own_training_config_is_served(tmp_path: Path) -> None:
    plan = plan_of(model="gpt3/5b", cluster="dgx-a100", nodes=2)
    document = files.with_value(plan.config.document(), ["model", "micro_batch_size"], 4)
    for key, value in (
        ("tensor_model_parallel_size", 2),
        ("pipeline_model_parallel_size", 4),
        ("virtual_pipeline_model_parallel_size", 3),
        ("sequence_parallel", True),
        ("rampup_batch_size", [32, 32, 1000]),
        ("activations_checkpoint_granularity", "selective"),
    ):
        document = files.with_value(document, ["model", key], value)
    path = tmp_path / "own.yaml"
    path.write_text(files.yaml_text(document))
    own = plan_of(model=str(path), cluster="dgx-a100", nodes=2)
    assert own.candidates == plan.candidates
    layout = ServingLayout(tp=4, pp=3, cuda_graphs=True)
    served = own.config_of(replace(layout, pp=2))
    assert (served.layout.tp, served.layout.pp, served.layout.vpp) == (4, 2, 1)
    assert served.model.rampup_batch_size is None
    assert not served.model.sequence_parallel
    assert layout not in {p.layout for p in own.candidates.points}  # twelve GPUs are no whole nodes


def test_a_run_is_asked_what_the_search_was_asked() -> None:
    targets = Targets(max_latency_ms=500.0, percentile=95)
    plan = plan_of(workload=(SHORT, LONG), repeats=7, targets=targets)
    points = [p for p in plan.candidates.points if p.layout == ServingLayout(precision="fp32")]
    orders = plan.orders_of(points, stops_early=True)
    assert [p.name for p in orders.points] == [p.name for p in points]
    assert (orders.repeats, orders.targets, orders.stops_early, orders.engine) == (7, targets, True, "megatron")


@pytest.mark.parametrize("objective", ["throughput-per-gpu", "latency", "pareto"])
def test_what_promises_most_comes_first_and_what_may_not_fit_last(objective: str) -> None:
    plan = plan_of(
        model="gpt3/175b",
        cluster="dgx-a100",
        nodes=1,
        workload=(Lengths(input_len=60, output_len=20),),
        objective=objective,
        targets=Targets(max_latency_ms=2000.0),
    )
    p, order = plan.predictions, by_promise(plan)
    assert sorted(order.tolist()) == list(range(len(plan.points)))
    fits = p.p_fit[order] >= 0.5
    assert not fits.all()
    assert fits.tolist() == sorted(fits.tolist(), reverse=True)
    within = [row for row in order.tolist() if p.p_fit[row] >= 0.5 and p.latency_ms[row] <= 2000.0]
    assert order[: len(within)].tolist() == within
    figures = [p.latency_ms[row] if objective == "latency" else -p.tokens_per_s_per_gpu[row] for row in within]
    assert figures == sorted(figures)


# ---------------------------------------------------------------- what is refused


def search(tmp_path: Path, *words: str) -> Result:
    first = ["search-inference", "--cluster", "local", "--results", str(tmp_path / "run"), "--dry-run"]
    model = [] if "--model" in words else ["--model", "gpt3/tiny"]
    return CliRunner().invoke(main, [*first, *model, *words], env={"COLUMNS": "100"})


COMMAND = ("--engine", "command", "--command")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "gpt3/126x"], "gpt3/126x: unknown model preset; did you mean gpt3/126m?"),
        (["--model", "/nowhere/x.yaml"], "/nowhere/x.yaml: cannot be read: No such file or directory"),
        (["--model", "bert/0.11b"], "bert/0.11b: model.bert_binary_head: False given, allowed is null: BERT writes no"),
        (["--model", "bert/0.11b", *COMMAND, "x"], "BERT writes no text to serve"),
        (["--cluster", "locl"], "locl: unknown cluster profile; did you mean local?"),
        (["--nodes", "0"], "--nodes: 0 given, allowed is 1 to 1 (local)"),
        (["--nodes", "2"], "--nodes: 2 given, allowed is 1 to 1 (local)"),
        (["--workload", "60:"], "--workload: '60:' given, allowed is INPUT:OUTPUT in tokens, such as 60:20"),
        (["--workload", "0:5"], "--workload: '0:5' given, allowed is INPUT:OUTPUT"),
        (["--workload", "5:0"], "--workload: '5:0' given, allowed is INPUT:OUTPUT"),
        (["--workload", "60:20,"], "--workload: '' given, allowed is INPUT:OUTPUT"),
        (["--workload", "-5:5"], "--workload: '-5:5' given, allowed is INPUT:OUTPUT"),
        (
            ["--workload", "16:4,100:100"],
            "--workload: 100:100 given, but no layout can answer it: prompt and answer have more tokens than the ",
        ),
        (["--tp", "3"], "--tp: 3 given, but no layout can have it: tp does not divide the 4 attention heads"),
        (["--tp", "8"], "--tp: 8 given, but no layout can have it: tp does not divide the 4 attention heads"),
        (["--tp", "1,4"], "--tp: 4 given, but no layout can have it: tp·pp is more than the 2 GPUs"),
        (["--tp", "0"], "--tp: 0 given, allowed is 1 or more"),
        (["--tp", "x"], "'x' given, allowed is auto or whole numbers such as 1,2,4"),
        (["--pp", "1,5"], "--pp: 5 given, but no layout can have it: pp does not divide the 4 layers"),
        (["--batch-sizes", "4,0"], "--batch-sizes: 0 given, allowed is 1 or more"),
        (["--precision", "fp64"], "'fp64' given, allowed is auto or some of fp32, bf16, fp16, fp8"),
        (["--precision", "fp32,fp8"], "--precision: fp8 given, but no layout can have it: cpu does not compute in fp8"),
        (["--cuda-graphs", "on"], "--cuda-graphs: on given, but no layout can have it: CUDA graphs need a GPU"),
        (["--cuda-graphs", "maybe"], "'maybe' given, allowed is auto or some of on, off"),
        (["--strategy", "bisekt"], "--strategy: 'bisekt' given; did you mean bisect?"),
        (["--objective", "speed"], "'speed' is not one of"),
        (["--percentile", "90"], "'90' is not one of"),
        (["--max-latency-ms", "0"], "--max-latency-ms: 0.0 given, allowed is more than 0"),
        (["--max-ttft-ms", "-1"], "--max-ttft-ms: -1.0 given, allowed is more than 0"),
        (["--max-tpot-ms", "nan"], "--max-tpot-ms: nan given, allowed is more than 0"),
        (["--limit-search-runs", "0"], "--limit-search-runs: 0 given, allowed is more than 0"),
        (["--budget-gpu-hours", "0"], "--budget-gpu-hours: 0.0 given, allowed is more than 0"),
        (["--max-hours", "-1"], "--max-hours: -1.0 given, allowed is more than 0"),
        (["--max-minutes-per-run", "0"], "--max-minutes-per-run: 0.0 given, allowed is more than 0"),
        (["--repeats", "4"], "--repeats: 4 given, allowed is 5 or more"),
        (["--parallel", "2"], "--parallel: 2 given, allowed is 1: runs on this machine share its devices"),
        (["--submit", "array"], "--submit: array given, allowed for local (scheduler: local) is "),
        (["--output-top-n", "0"], "--output-top-n: 0 given, allowed is 1 or more"),
        (["--engine", "command"], "--command: is given with --engine command, and only then"),
        (["--command", "x"], "--command: is given with --engine command, and only then"),
        ([*COMMAND, "echo 'x"], '--command: "echo \'x" given, allowed is a command as typed in a shell'),
        ([*COMMAND, " "], "--command: nothing given"),
        ([*COMMAND, "serve {bach}"], "--command: {bach} given, allowed are {batch}, {input_len}"),
        (["--checkpoint", "/nowhere"], "--checkpoint: /nowhere given, allowed is a directory of hptool train or one"),
        (["--settings", "/nowhere/5b.yaml"], "/nowhere/5b.yaml: cannot be read: No such file or directory"),
        (["model.hiden_size=64"], "model.hiden_size: unknown key; did you mean hidden_size?"),
        (["trainer.precision=fp64"], "trainer.precision: 'fp64' given, allowed is 'bf16'"),
        (["trainer.num_nodes=4"], "trainer.num_nodes: 4 given, allowed is 1"),
        (["nonsense"], "'nonsense': an override is written key.key=value"),
    ],
)
def test_bad_input_is_one_clear_error_and_writes_nothing(words: list[str], said: str, tmp_path: Path) -> None:
    done = search(tmp_path, *words)
    assert done.exit_code == 2, done.output
    assert said in done.output
    assert "Traceback" not in done.output
    assert isinstance(done.exception, SystemExit)
    assert not (tmp_path / "run").exists()


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    done = search(tmp_path, "--tp", "0", "--repeats", "1", "--max-latency-ms", "-3", "--strategy", "x")
    assert all(word in done.output for word in ("--tp: 0", "--repeats: 1", "--max-latency-ms: -3", "--strategy: 'x'"))
    listed = search(tmp_path, "--tp", "3,5", "--pp", "3")
    for word in ("--tp: 3", "--tp: 5", "--pp: 3"):
        assert f"{word} given, but no layout can have it" in listed.output


def test_without_a_model_the_option_is_named(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["search-inference", "--cluster", "local", "--results", str(tmp_path / "run")])
    assert done.exit_code == 2
    assert "--model: required, a preset such as gpt3/5b" in done.output


def test_a_checkpoint_is_of_a_training_and_named_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    step = tmp_path / "training" / "checkpoints" / "step-20"
    step.mkdir(parents=True)
    (step / "metadata.json").write_text("{}")
    for given in ("training", "training/checkpoints/step-20"):
        plan = plan_of(checkpoint=given)
        orders = plan.orders_of(plan.candidates.points[:1], stops_early=False)
        assert orders.checkpoint == str(tmp_path / given)
    for given in ("training/checkpoints", "."):
        with pytest.raises(InputError, match=f"--checkpoint: {given} given"):
            plan_of(checkpoint=given)
    with pytest.raises(InputError, match="--checkpoint: given, allowed is null with engine command"):
        plan_of(checkpoint="training", engine="command", command=("x",))
    # What was trained there says of what shape it is.
    other = plan_of(overrides=("model.num_layers=6",)).config
    (tmp_path / "training" / "config.yaml").write_text(files.yaml_text(other.document()))
    for given in ("training", "training/checkpoints/step-20"):
        words = rf"--checkpoint: {given} is of another model: it differs in num_layers \(6 there, 4 asked for\)"
        with pytest.raises(InputError, match=words):
            plan_of(checkpoint=given)
        assert plan_of(checkpoint=given, overrides=("model.num_layers=6",)).request.checkpoint


def test_values_that_cannot_meet_are_counted_by_reason_and_it_is_said_what_helps(tmp_path: Path) -> None:
    # Each is possible with others, but not these two with each other.
    done = search(tmp_path, "--tp", "2", "--pp", "2", "--batch-sizes", "1,2")
    assert done.exit_code == 3
    assert "no layout of gpt3_tiny can serve on 2 GPUs" in done.output
    assert "2 tp·pp is more than the 2 GPUs (e.g. tp2-pp2-fp32 60:20/1)" in done.output
    assert "what would help: an axis left at auto" in done.output
    assert not (tmp_path / "run").exists()


def test_where_nothing_can_start_no_value_is_to_blame() -> None:
    request = ServingRequest(
        model="gpt3/126m",
        cluster="dgx-h100",
        nodes=1,
        space=ServingSpace(tp=(1, 2)),
        overrides=("model.fp8=true", "model.fp8_hybrid=true"),
    )
    with pytest.raises(NoFeasibleLayout, match="hptool's own loop serves in fp32, bf16, fp16 and no fp8"):
        make_serving_plan(request)


def test_a_dry_run_writes_what_a_search_would_do_and_launches_nothing(tmp_path: Path) -> None:
    words = ["--cluster", "dgx-a100", "--nodes", "2", "--workload", "60:20,200:200", "--json"]
    done = search(tmp_path, "--model", "gpt3/20b", *words)
    assert done.exit_code == 0, done.output
    run = tmp_path / "run"
    written = {path.name for path in run.iterdir()}
    assert {"plan.json", "base_config.yaml", "predictions.csv", "scripts", "report.html"} <= written
    assert not {"submissions.jsonl", "outcomes.jsonl", "runs", "best.yaml"} & written
    (script,) = (run / "scripts").glob("*/run.sh")
    assert "#SBATCH --gpus-per-node=8" in script.read_text()
    assert (script.parent / "serving.json").is_file()
    config = yaml.safe_load((script.parent / "config.yaml").read_text())
    assert config["trainer"]["num_nodes"] * config["trainer"]["devices"] in {1, 2, 4, 8, 16}
    answer = json.loads(done.stdout)
    assert answer["spent"]["runs"] == 0
    # The same search goes on from a dry run without further ado.
    again = search(tmp_path, "--model", "gpt3/20b", *words)
    assert again.exit_code == 0, again.output
