"""Whole searches through a real Slurm: sbatch, arrays, several nodes, and everything that goes wrong there."""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.searches import finish, outcome_lines, processes_of, start, wait_for
from tests.slurm.conftest import DevSlurm, connect, run_script

pytestmark = pytest.mark.slurm

#: A run of a layout that takes longer than any test.
ENDLESS = ("--stages", "1000000", "--tp", "1", "--pp", "1", "--mbs", "1", "--nodes", "1")


def queue() -> list[str]:
    """Job ids that Slurm still means to run or runs."""
    done = subprocess.run(["squeue", "--me", "-h", "-r", "-o", "%i"], capture_output=True, text=True, check=True)
    return done.stdout.split()


def texts(directory: Path) -> str:
    """The ends of all logs and records of a training, for a test that has to say why it failed."""
    files = [path for path in sorted(directory.rglob("*")) if path.suffix in (".log", ".json", ".out", ".err", "")]
    return "\n".join(f"{path}:\n{path.read_text(errors='replace')[-1500:]}" for path in files if path.is_file())


@pytest.fixture
def results(tmp_path: Path, slurm: DevSlurm) -> Iterator[Path]:
    del slurm
    path = tmp_path / "run"
    yield path
    assert queue() == [], "a search left jobs behind"
    assert processes_of(path) == [], "a search left processes behind"


def test_layouts_of_one_and_two_nodes_are_measured_and_ranked(results: Path) -> None:
    words = ("--json", "--nodes", "2", "--tp", "2", "--pp", "1,2", "--mbs", "1,2", "trainer.max_steps=4")
    process = start(results, *words, "--verify-nodes", "2", "--verify-top", "1", cluster="dev-slurm")
    out, err = finish(process)
    assert process.returncode == 0, err
    answer = json.loads(out)
    runs = {run["name"]: run for run in answer["runs"]}
    assert all(run["outcome"] == "measured" for run in runs.values())
    assert {name: (run["nodes"], run["gpus"]) for name, run in runs.items()} == {
        "tp2-pp1-vpp1-cp1-mbs1-none": (1, 2),
        "tp2-pp1-vpp1-cp1-mbs2-none": (1, 2),
        "tp2-pp2-vpp1-cp1-mbs1-none": (2, 4),
        "tp2-pp2-vpp1-cp1-mbs2-none": (2, 4),
    }
    # The full training has two replicas of the layouts without a pipeline; their runs have one, with its share.
    assert runs["tp2-pp1-vpp1-cp1-mbs1-none"]["gbs"] * 2 == runs["tp2-pp2-vpp1-cp1-mbs1-none"]["gbs"] == 8
    assert any("fewer than 2 nodes" in note for note in answer["notes"])
    ids = [line["job_id"] for line in outcome_lines(results)]
    # What one node promises most of runs on both at the end, and only what ran on both can win: those with a pipeline
    # did so from the start.
    repeated = [line for line in outcome_lines(results) if line["run"].endswith(".2")]
    (scaled,) = [line["name"] for line in repeated if line["nodes"] == 2 and runs[line["name"]]["nodes"] == 1] or [None]
    assert len(ids) == 4 + len(repeated)
    if scaled is not None:
        assert (runs[scaled]["nodes"], runs[scaled]["at_scale_nodes"]) == (1, 2)
        assert runs[scaled]["at_scale_step_time_s"] > 0
    assert answer["winner"] == scaled or runs[answer["winner"]]["nodes"] == 2
    first = [line["job_id"] for line in outcome_lines(results) if not line["run"].endswith(".2")]
    assert (
        len({re.split("[#_]", job_id)[0] for job_id in first}) == 2
    )  # an allocation or array for each number of nodes
    assert answer["winner"] in runs
    # The winner's command trains it, on the nodes and with the options of the profile.
    ending = f"train --config {results / 'optimal.yaml'} --results {results / 'training'} --cluster dev-slurm"
    assert answer["train_command"].endswith(ending)
    subprocess.run(["bash", "-c", answer["train_command"]], check=True, timeout=60, cwd=ROOT)
    again = subprocess.run(
        ["bash", "-c", f"{answer['train_command']} --resume"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert "trains in it already" in again.stderr
    wait_for(lambda: queue() == [], timeout_s=120)
    result = results / "training" / "result.json"
    wait_for(result.exists, timeout_s=20, otherwise=lambda: texts(results / "training"))
    trained = json.loads(result.read_text())
    assert (trained["step"], trained["stopped"]) == (4, "done")
    assert len((results / "training" / "losses.csv").read_text().splitlines()) == 5
    assert (results / "training" / "runs.csv").read_text().count("\n") == 2


def test_memory_and_minutes_are_real_limits(results: Path, tmp_path: Path) -> None:
    profile = yaml.safe_load((ROOT / "cluster" / "dev-slurm.yaml").read_text())
    gpu = yaml.safe_load((ROOT / "cluster" / "gpus" / "cpu.yaml").read_text())
    profile["gpu"] = {**gpu, "memory_gib": 0.8}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(profile))
    longer = [f"model.{key}=1024" for key in ("encoder_seq_length", "data.seq_length", "max_position_embeddings")]
    process = start(
        results, "--json", "--nodes", "1", "--tp", "1", "--pp", "2", "--mbs", "1,8", "--max-minutes-per-run", "0.3",
        "--stages", "100000", "model.num_layers=2", "model.use_flash_attention=false", *longer,
        cluster=str(tmp_path / "small.yaml"),
    )  # fmt: skip
    out, err = finish(process)
    assert process.returncode == 4, err
    answer = json.loads(out)
    assert {run["mbs"]: run["outcome"] for run in answer["runs"]} == {1: "timeout", 8: "oom"}
    assert all((results / "runs" / run["name"] / "logs").is_dir() for run in answer["runs"])
    assert "1 × oom, 1 × timeout" in err


def test_a_refused_submission_ends_in_slurms_own_words(results: Path, tmp_path: Path) -> None:
    profile = yaml.safe_load((ROOT / "cluster" / "dev-slurm.yaml").read_text())
    profile["slurm"]["partition"] = "nosuch"
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(profile))
    process = start(results, "--tp", "1", "--pp", "1", "--mbs", "1", cluster=str(tmp_path / "wrong.yaml"))
    _, err = finish(process)
    assert process.returncode == 4
    assert "invalid partition specified: nosuch" in err
    assert "Traceback" not in err
    assert not list((results / "jobs").rglob("*.pkl"))
    # With the profile mended the same search goes on.
    words = ("--resume", "--json", "--tp", "1", "--pp", "1", "--mbs", "1")
    profile["slurm"]["partition"] = "main"
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(profile))
    out, err = finish(start(results, *words, cluster=str(tmp_path / "wrong.yaml")))
    assert json.loads(out)["winner"] == "tp1-pp1-vpp1-cp1-mbs1-none", err


@pytest.fixture(params=["dbd", "none"])
def accounting(request: pytest.FixtureRequest, slurm: DevSlurm) -> Iterator[str]:
    """The Slurm of the session, which accounts, or a second one that does not."""
    if request.param == "dbd":
        yield "dbd"
        return
    with tempfile.TemporaryDirectory(prefix="slurm-") as parent:  # short: socket paths are
        directory = {"HPTOOL_SLURM_DIR": f"{parent}/state", "HPTOOL_SLURM_PORT": "18817"}
        up = run_script("up", settings={**directory, "HPTOOL_SLURM_ACCOUNTING": "none"})
        assert up.returncode == 0, up.stderr
        try:
            os.environ["SLURM_CONF"] = str(connect(up).conf)
            yield "none"
        finally:
            os.environ["SLURM_CONF"] = str(slurm.conf)
            run_script("down", "--purge", settings=directory)


def test_a_job_that_someone_else_cancels_is_seen_within_seconds(results: Path, accounting: str) -> None:
    submit = {"dbd": "separate", "none": "packed"}[accounting]
    process = start(results, *ENDLESS, "--json", "--submit", submit, cluster="dev-slurm")
    wait_for(lambda: list((results / "runs").glob("*/progress.json")), timeout_s=90)
    subprocess.run(["scancel", *queue()], check=True)
    out, err = finish(process, timeout_s=60)
    assert process.returncode == 4, err
    (run,) = json.loads(out)["runs"]
    assert run["outcome"] == "lost"
    assert "CANCELLED" in run["message"]
    wait_for(lambda: queue() == [])


def test_a_dry_runs_script_runs_by_hand(results: Path) -> None:
    words = ("--dry-run", "--json", "--nodes", "1", "--tp", "1", "--pp", "2", "--mbs", "2")
    out, err = finish(start(results, *words, cluster="dev-slurm"))
    (run,) = json.loads(out)["predicted"]
    folder = results / "scripts" / run["name"]
    subprocess.run(["sbatch", "--wait", str(folder / "run.sh")], check=True, timeout=120)
    assert len(json.loads((folder / "measurement.json").read_text())["losses"]) == 6, err


def test_every_family_is_searched_side_by_side(tmp_path: Path, slurm: DevSlurm) -> None:
    del slurm
    cuts = {
        "llama/tiny": ("--tp", "2", "--pp", "1"),
        "mixtral/tiny": ("--tp", "1", "--pp", "1", "--ep", "2"),
        "bert/tiny": ("--tp", "1", "--pp", "2"),
        "t5/tiny": ("--tp", "1", "--pp", "2"),
    }
    common = ("--nodes", "1", "--mbs", "2", "--max-steps-per-run", "3", "--json")
    searches = {
        model: start(tmp_path / model.replace("/", "-"), "--model", model, *cut, *common, cluster="dev-slurm")
        for model, cut in cuts.items()
    }
    for model, process in searches.items():
        out, err = finish(process)
        assert process.returncode == 0, err
        (run,) = json.loads(out)["runs"]
        assert (run["outcome"], run["gpus"]) == ("measured", 2), model
    assert queue() == [], "a search left jobs behind"
