"""The command line: frozen help, light imports, and one clear error for every kind of bad input."""

import contextlib
import fcntl
import importlib.util
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from syrupy.assertion import SnapshotAssertion

from hptool import files
from hptool.cli import main
from tests import samples


def hptool(*words: str | Path, columns: int = 100) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], env={"COLUMNS": str(columns)})


def search(tmp_path: Path, *words: str, model: str = "gpt3/tiny", cluster: str = "local") -> Result:
    return hptool("search-train", "--model", model, "--cluster", cluster, "--results", tmp_path / "run", *words)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["search-train"],
        ["status"],
        ["report"],
        ["predict"],
        ["replay"],
        ["recommend"],
        ["base-config"],
        ["train"],
        ["calibrate"],
        ["search-inference"],
    ],
)
def test_help_is_frozen(command: list[str], snapshot: SnapshotAssertion) -> None:
    assert hptool(*command, "--help").output == snapshot


def test_help_loads_neither_torch_nor_pandas() -> None:
    code = (
        "import sys\nfrom hptool.cli import main\n"
        "try: main(['search-train', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'megatron', 'pandas', 'submitit', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in done.stderr
    assert "pandas" not in done.stderr


def profile(tmp_path: Path, **changes: object) -> str:
    document = {**yaml.safe_load((files.data_directory("cluster") / "local.yaml").read_text()), **changes}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "gpt3/126x"], "gpt3/126x: unknown model preset; did you mean gpt3/126m?"),
        (["--model", "/nowhere/x.yaml"], "/nowhere/x.yaml: cannot be read: No such file or directory"),
        (["--cluster", "locl"], "locl: unknown cluster profile; did you mean local?"),
        (["--nodes", "0"], "--nodes: 0 given, allowed is 1"),
        (["--nodes", "2"], "--nodes: 2 given, allowed is 1"),
        (["--tp", "3"], "--tp: 3 given, but no layout can have it: tp does not divide the 4 attention heads"),
        (["--pp", "1,5"], "--pp: 5 given, but no layout can have it"),
        (["--cp", "0"], "--cp: 0 given, allowed is 1 or more"),
        (["--mbs", "3"], "--mbs: 3 given, but no layout can have it: mbs·dp does not divide the global batch of 8"),
        (["--tp", "x"], "'x' given, allowed is auto or whole numbers such as 1,2,4"),
        (["--recompute", "al"], "'al' given, allowed is auto, none, selective, full, uniform[-N], block[-N]"),
        (["--limit-search-runs", "0"], "--limit-search-runs: 0 given, allowed is more than 0"),
        (["--max-minutes-per-run", "-1"], "--max-minutes-per-run: -1.0 given, allowed is more than 0"),
        (["--max-steps-per-run", "1"], "--max-steps-per-run: 1 given, allowed is 2 or more"),
        (["--stages", "8,8"], "--stages: 8,8 given, allowed are rising numbers from 2 on"),
        (["--stages", "1,8"], "--stages: 1,8 given, allowed are rising numbers from 2 on"),
        (["--strategy", "adaptiv"], "--strategy: 'adaptiv' given; did you mean adaptive?"),
        (["--budget-gpu-hours", "0"], "--budget-gpu-hours: 0.0 given, allowed is more than 0"),
        (["--budget-gpu-hours", "nan"], "--budget-gpu-hours: nan given, allowed is more than 0"),
        (["--max-hours", "-1"], "--max-hours: -1.0 given, allowed is more than 0"),
        (["--verify-nodes", "2"], "--verify-nodes: 2 given, allowed is 1 to 1 (--nodes)"),
        (["--verify-nodes", "0"], "--verify-nodes: 0 given, allowed is more than 0"),
        (["--parallel", "2"], "--parallel: 2 given, allowed is 1: runs on this machine share its devices"),
        (["--submit", "array"], "--submit: array given, allowed for local (scheduler: local) is separate"),
        (["--output-top-n", "0"], "--output-top-n: 0 given, allowed is 1 or more"),
        (["model.hiden_size=64"], "model.hiden_size: unknown key; did you mean hidden_size?"),
        (["trainer.precision=fp64"], "trainer.precision: 'fp64' given, allowed is 'bf16'"),
        (["trainer.num_nodes=4"], "trainer.num_nodes: 4 given, allowed is 1"),
        (["--mbs", "1", "model.micro_batch_size=2"], "is fixed here and listed by --mbs; give one of them"),
        (
            ["model.optim.overlap_param_sync=true"],
            "overlap_param_sync: True given, allowed is False unless",
        ),
        (["nonsense"], "'nonsense': an override is written key.key=value"),
    ],
)
def test_bad_input_is_one_clear_error_and_writes_nothing(words: list[str], said: str, tmp_path: Path) -> None:
    done = search(tmp_path, *words)
    assert done.exit_code == 2
    assert said in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "run").exists()


def test_a_broken_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("run:\n  name: [x\n")
    done = search(tmp_path, model=str(tmp_path / "my.yaml"))
    assert done.exit_code == 2
    assert "my.yaml: not valid YAML (line 3" in done.output


def test_an_unknown_gpu_in_a_profile(tmp_path: Path) -> None:
    done = search(tmp_path, cluster=profile(tmp_path, gpu="h1000"))
    assert done.exit_code == 2
    assert "gpu: unknown GPU 'h1000'; did you mean h100?" in done.output


def test_all_mistakes_of_a_profile_are_told(tmp_path: Path) -> None:
    done = search(tmp_path, cluster=profile(tmp_path, nodes="two", schedular="local", gpus_per_node=0))
    assert done.exit_code == 2
    assert "nodes: 'two' given" in done.output
    assert "schedular: unknown key; did you mean scheduler?" in done.output


def test_no_feasible_layout_counts_the_reasons_and_says_what_helps(tmp_path: Path) -> None:
    # Each value is possible with others, but not these two with each other: the batch is too small for them.
    done = search(tmp_path, "--tp", "1", "--pp", "1", "--mbs", "8")
    assert done.exit_code == 3
    assert "mbs·dp does not divide the global batch of 8" in done.output
    assert "what would help" in done.output
    assert not (tmp_path / "run").exists()


def test_facts_that_were_measured_here_are_named_and_a_search_keeps_those_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--dry-run", "--json", "--resume", "--mbs", "1,2", "--recompute", "none")
    before = search(tmp_path, *words)
    assert before.exit_code == 0, before.output
    assert "facts of cpu" not in before.output
    own = tmp_path / "cluster" / "gpus" / "cpu.yaml"
    own.parent.mkdir(parents=True)
    facts = files.read_yaml(files.data_directory("cluster") / "gpus" / "cpu.yaml")
    measured = {
        "device": "a CPU", "date": "2026-11-22", "versions": {}, "took_s": 90.0, "nodes": 1, "gpus_per_node": 2,
        "precision": "fp32", "fit_errors": {},
    }  # fmt: skip
    own.write_text(files.yaml_text({**facts, "launch_overhead_us": 80.0, "measured": measured}))
    # Another search uses them and says so; the first goes on as it began.
    other = search(tmp_path / "other", *words)
    assert other.exit_code == 0, other.output
    remark = "facts of cpu: as measured on 2026-11-22 in cluster/gpus/cpu.yaml, for as long as that file is there"
    assert remark in other.stderr
    assert f"Predictions use {remark}." in json.loads(other.stdout)["notes"]
    assert json.loads(other.stdout)["predicted"] != json.loads(before.stdout)["predicted"]
    again = search(tmp_path, *words)
    assert again.exit_code == 0, again.output
    assert "the facts of cpu have changed: this search goes on with those it began with" in again.stderr
    assert json.loads(again.stdout)["predicted"] == json.loads(before.stdout)["predicted"]
    own.write_text("name: cpu\n")
    broken = search(tmp_path / "third", *words)
    assert broken.exit_code == 2
    assert "cluster/gpus/cpu.yaml: mend or remove it: facts here come first" in broken.stderr


def test_the_precision_is_a_choice_of_the_search(tmp_path: Path) -> None:
    words = ("--dry-run", "--nodes", "1", "--mbs", "1", "--recompute", "none", "--precision")
    done = search(tmp_path, *words, "fp8", model="gpt3/126m", cluster="dgx-h100")
    assert done.exit_code == 0, done.output
    written = files.read_yaml(tmp_path / "run" / "base_config.yaml")
    assert (written["trainer"]["precision"], written["model"]["fp8"]) == ("bf16", True)
    assert (written["model"]["fp8_hybrid"], written["model"]["fp8_e4m3"]) == (True, False)
    refused = search(tmp_path / "other", *words, "fp8", model="gpt3/126m", cluster="dgx-a100")
    assert refused.exit_code == 2
    allowed = "allowed on a100-80gb is bf16 or fp16 or fp32 or tf32"
    assert f"gpt3/126m: model.fp8 (--precision fp8): True given, {allowed}" in refused.stderr


def test_dry_run_ranks_and_writes_everything_and_launches_nothing(tmp_path: Path) -> None:
    done = search(tmp_path, "--dry-run", "--nodes", "4", "--json", model="gpt3/5b", cluster="dgx-a100")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    written = {p.name for p in (tmp_path / "run").iterdir()}
    assert written == {
        ".lock", "plan.json", "base_config.yaml", "candidates",
        "predictions.csv", "scripts", "report.html", "report.csv"
    }  # fmt: skip
    assert len(list((tmp_path / "run" / "candidates").iterdir())) == answer["candidates"]
    assert len(list((tmp_path / "run" / "scripts").glob("*/run.sh"))) == 10
    assert answer["winner"] is None
    assert answer["predicted"][0]["name"] in {p.name for p in (tmp_path / "run" / "scripts").iterdir()}


def test_every_candidate_is_a_config_that_passes_the_workers_checks(tmp_path: Path) -> None:
    from hptool.base_config import BaseConfig  # noqa: PLC0415
    from hptool.worker.refusals import refuse_impossible  # noqa: PLC0415

    done = search(tmp_path, "--dry-run", "--nodes", "2", model="gpt3/126m", cluster="dgx-a100")
    assert done.exit_code == 0, done.output
    paths = sorted((tmp_path / "run" / "candidates").iterdir())
    assert len(paths) > 100
    for path in [tmp_path / "run" / "base_config.yaml", *paths[::7]]:
        refuse_impossible(files.read(path, BaseConfig), str(path))


def test_a_users_own_config_is_read_by_the_same_code(tmp_path: Path) -> None:
    first = search(tmp_path, "--dry-run")
    assert first.exit_code == 0
    own = tmp_path / "own.yaml"
    (tmp_path / "run" / "base_config.yaml").rename(own)
    done = hptool(
        "search-train", "--model", own, "--cluster", "dgx-a100", "--nodes", "1", "--results", tmp_path / "again",
        "--dry-run", "--json", "trainer.precision=bf16",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    config = yaml.safe_load((tmp_path / "again" / "base_config.yaml").read_text())
    assert (config["trainer"]["devices"], config["trainer"]["accelerator"]) == (8, "gpu")


def test_an_override_of_a_searched_key_fixes_that_axis(tmp_path: Path) -> None:
    done = search(
        tmp_path, "--dry-run", "--json", "model.micro_batch_size=4", "model.activations_checkpoint_granularity=full"
    )
    assert done.exit_code == 0, done.output
    names = {p.stem for p in (tmp_path / "run" / "candidates").iterdir()}
    assert names
    assert all("-mbs4-uniform1" in name for name in names)


def test_a_directory_of_another_search_is_refused(tmp_path: Path) -> None:
    assert search(tmp_path, "--dry-run").exit_code == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    for resume in ([], ["--resume"]):
        other = search(tmp_path, "--dry-run", "--tp", "1", *resume)
        assert other.exit_code == 2
        assert "holds another search; it differs in space.tp" in other.output
    assert before == {p: p.read_bytes() for p in before}
    # The same search goes on from a dry run without further ado.
    assert search(tmp_path, "--dry-run", "--limit-search-runs", "3").exit_code == 0


def test_a_directory_in_use_says_by_whom(tmp_path: Path) -> None:
    assert search(tmp_path, "--dry-run").exit_code == 0
    with (tmp_path / "run" / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = search(tmp_path, "--dry-run")
    assert done.exit_code == 2
    assert "hptool is at work in it already (process " in done.output


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_place_for_results_that_cannot_be(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    done = hptool(
        "search-train", "--model", "gpt3/tiny", "--cluster", "local", "--results", tmp_path / place, "--dry-run"
    )
    assert done.exit_code == 2
    assert str(tmp_path / place) in done.output
    assert (tmp_path / "file").read_text() == "precious"


def test_without_megatron_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if "megatron" in name else find(name, *a))
    done = search(tmp_path)
    assert done.exit_code == 2
    assert "pip install 'hptool[worker]'" in done.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"environment": {"X; touch pwned; Y": "1"}}, "environment: 'X; touch pwned; Y' given"),
        ({"slurm": {"partition": "a\ntouch pwned"}}, "partition: 'a\\ntouch pwned' given, allowed is one line"),
        ({"slurm": {"extra_options": {"comment": "a\ntouch pwned"}}}, "comment: 'a\\ntouch pwned' given"),
        ({"slurm": {"extra_options": {"x\ntouch pwned": 1}}}, "extra_options: 'x\\ntouch pwned' given"),
    ],
)
def test_a_profile_cannot_write_lines_of_a_script(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    done = search(tmp_path, "--dry-run", cluster=profile(tmp_path, **changes))
    assert done.exit_code == 2
    assert said in done.output


def test_what_a_search_costs_is_said_before_anything_is_launched(tmp_path: Path) -> None:
    done = search(tmp_path, "--dry-run", "--nodes", "16", model="gpt3/5b", cluster="dgx-a100")
    assert done.exit_code == 0, done.output
    said = re.search(
        r"cost: up to 10 of (\d+) layouts, as many as pay: if predictions hold, some (\S+) and at most (\S+) GPU hours"
        r", and .* at most without queueing. Timing all \d+ would take (\S+) GPU hours",
        done.stderr,
    )
    assert said is not None, done.stderr
    usual, most, grid = (float(word.replace(",", "")) for word in said.groups()[1:])
    assert usual <= most < grid
    assert re.search(r"the scheduler is asked for up to \d+ .* of 1 nodes? \(8 GPUs\)", done.stderr)


@pytest.mark.parametrize(("answer", "launches"), [("n", False), ("y", True)])
def test_on_a_terminal_the_cost_is_confirmed(answer: str, tmp_path: Path, *, launches: bool) -> None:
    """Without sbatch on the path a launch ends at once, in one clear error."""
    command = [
        sys.executable, "-m", "hptool", "search-train", "--model", "gpt3/126m", "--cluster", "dgx-a100", "--nodes", "1",
        "--results", str(tmp_path / "run"),
    ]  # fmt: skip
    leader, follower = pty.openpty()
    environment = os.environ | {"PATH": "/nowhere", "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    shown = b""
    while b"Launch?" not in shown:
        shown += os.read(leader, 1000)
    assert b"GPU hours" in shown
    os.write(leader, f"{answer}\n".encode())
    with contextlib.suppress(OSError):  # a pseudo-terminal whose other side is gone says so like this
        while more := os.read(leader, 1000):
            shown += more
    assert process.wait(timeout=60) == (4 if launches else 0)
    assert (b"sbatch: not found on this machine" in shown) == launches
    assert (b"nothing was launched" in shown) != launches


@pytest.mark.parametrize("command", ["status", "report"])
def test_a_directory_without_a_search_is_one_clear_error(command: str, tmp_path: Path) -> None:
    done = hptool(command, tmp_path)
    assert done.exit_code == 2
    assert f"{tmp_path}: holds no search (there is no plan.json)" in done.output
    (tmp_path / "plan.json").write_text('{"search": {}}')
    done = hptool("report", tmp_path)
    assert done.exit_code == 2
    assert "is not the plan of a search of this version" in done.output


def test_a_report_is_made_anew_from_the_records(tmp_path: Path) -> None:
    assert search(tmp_path, "--dry-run", "--tp", "1", "--mbs", "1,2", "--recompute", "none").exit_code == 0
    before = json.loads(hptool("report", tmp_path / "run", "--json").stdout)
    assert before["winner"] is None
    run = tmp_path / "run"
    for name, outcome in (
        ("tp1-pp1-vpp1-cp1-mbs1-none", samples.measurement(0.5, 0.01)),
        ("tp1-pp1-vpp1-cp1-mbs2-none", samples.measurement(0.4, 0.0125)),
        ("tp1-pp2-vpp1-cp1-mbs1-none", samples.failure()),
    ):
        line = files.json_text(samples.record(name, outcome), indent=None).strip()
        with (run / "outcomes.jsonl").open("a") as file:
            file.write(line + "\n")
    (run / "report.html").unlink()
    done = hptool("report", run)
    assert done.exit_code == 0, done.output
    assert "winner: tp1-pp1-vpp1-cp1-mbs2-none" in done.stdout
    assert "failed: tp1-pp2-vpp1-cp1-mbs1-none: oom: out of memory" in done.stdout
    assert (run / "report.html").is_file()
    answer = json.loads(hptool("report", run, "--json").stdout)
    assert answer["spent"]["runs"] == 3
    assert answer["spent"]["gpu_hours"] == pytest.approx(3 * 2 / 60)
    steps = yaml.safe_load((run / "optimal.yaml").read_text())["trainer"]["max_steps"]
    assert answer["training"]["days"] == pytest.approx(steps * 0.4 / 86400)


def test_a_dry_run_shows_the_script_that_the_scheduler_would_get(tmp_path: Path) -> None:
    done = search(tmp_path, "--dry-run", "--nodes", "4", model="gpt3/5b", cluster="dgx-a100")
    assert done.exit_code == 0, done.output
    answer = json.loads(hptool("report", tmp_path / "run", "--json").stdout)
    script = tmp_path / "run" / "scripts" / answer["predicted"][0]["name"] / "run.sh"
    assert script.read_text() in done.stdout
    assert "#SBATCH --gpus-per-node=8" in done.stdout
    assert "#SBATCH" not in search(tmp_path / "other", "--dry-run").stdout  # on this machine there is no script
