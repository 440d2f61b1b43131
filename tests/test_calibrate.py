"""`hptool calibrate` without a measurement: what it refuses, what it writes, and who reads that."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from rich.console import Console

from hptool import calibrate, files, launch
from hptool.base_config import BaseConfig
from hptool.cli import main
from hptool.errors import InputError, LaunchError
from hptool.facts import GpuSpec, Link, MeasuredPoint
from hptool.measurement import Failure, FailureKind
from hptool.predict.curves import Benchmarks
from hptool.worker.refusals import refuse_impossible
from tests.searches import finish, processes_of, wait_for
from tests.test_curves import true_points

H100_AS_TORCH_CALLS_IT = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launching is a failure of the test."""

    def refuse(*_: object) -> None:
        pytest.fail("something was launched")

    monkeypatch.setattr(launch, "launcher", refuse)


def hptool(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["calibrate", *map(str, words)], env={"COLUMNS": "100"})


def see(monkeypatch: pytest.MonkeyPatch, *names: str, memory_gib: float = 79.2) -> None:
    """Has torch see these CUDA devices."""
    seen = [{"name": name, "multiprocessors": 132, "memory_gib": memory_gib} for name in names]
    monkeypatch.setattr(calibrate, "_devices", lambda _: seen)


def benchmarks(**changes: Any) -> Benchmarks:
    found = Benchmarks(
        device=H100_AS_TORCH_CALLS_IT,
        multiprocessors=132,
        memory_gib=79.2,
        versions={"python": "3.11.7", "torch": "2.13.0", "hptool": "0.1.0", "cuda": "13.0", "nccl": "2.28.9"},
        took_s=151.234,
        nodes=2,
        gpus_per_node=8,
        precision="bf16",
        points=tuple(true_points()),
    )
    return replace(found, **changes)


def calibrated(monkeypatch: pytest.MonkeyPatch, found: Benchmarks, **request: Any) -> calibrate.Calibrated:
    """All of the path but the measuring, which finds `found`."""
    monkeypatch.setattr(calibrate, "_measured", lambda *_: found)
    return calibrate.calibrate(calibrate.CalibrateRequest(**request), print, lambda _: None)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cluster", "locl"], "locl: unknown cluster profile; did you mean local?"),
        (["--cluster", "/nowhere/x.yaml"], "/nowhere/x.yaml: cannot be read: No such file or directory"),
        (["--cluster", "local", "--nodes", "2"], "--nodes: 2 given, allowed is 1 to 1 (local)"),
        (["--cluster", "dev-slurm", "--nodes", "5"], "--nodes: 5 given, allowed is 1 to 4 (dev-slurm)"),
        (["--cluster", "local", "--nodes", "0"], "--nodes: 0 given, allowed is 1 to 1"),
        (["--device", "cpu", "--nodes", "2"], "--nodes: 2 given, allowed is 1 to 1 (without --cluster: this machine)"),
        (
            ["--cluster", "local", "--device", "cuda"],
            "--device: cuda given, but the GPU of local is cpu; allowed is cpu",
        ),
        (["--cluster", "dgx-h100", "--device", "cpu"], "--device: cpu given, but the GPU of dgx-h100 is h100-80gb"),
        (["--cluster", "local", "--max-minutes", "0"], "--max-minutes: 0.0 given, allowed is more than 0"),
        (["--cluster", "local", "--max-minutes", "inf"], "--max-minutes: inf given, allowed is more than 0"),
        (["--cluster", "local", "--peak-tflops", "bf16"], "--peak-tflops: 'bf16' given, allowed is such as bf16=989.4"),
        (["--cluster", "local", "--peak-tflops", "int8=2"], "--peak-tflops: 'int8=2' given, allowed is such as"),
        (["--cluster", "local", "--peak-tflops", "bf16=-1"], "--peak-tflops: 'bf16=-1' given, allowed is such as"),
        (["--cluster", "local", "--output", "facts.txt"], "facts.txt given, allowed is a path that ends in .yaml"),
        (["--cluster", "local", "--output", "/proc/x/cpu.yaml"], "/proc/x/cpu.yaml: cannot be written: No such file"),
        (["--cluster", "local", "--output", "/dev/null/cpu.yaml"], "/dev/null/cpu.yaml: cannot be written: "),
    ],
)
@pytest.mark.usefixtures("nothing_starts")
def test_bad_input_is_one_clear_error_before_anything_starts(words: list[str], said: str, elsewhere: Path) -> None:
    done = hptool(*words)
    assert done.exit_code == 2, done.output
    assert said in done.output
    assert done.output.count("hptool: error:") == 1
    assert list(elsewhere.iterdir()) == []


@pytest.mark.usefixtures("nothing_starts")
def test_without_a_gpu_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch)
    done = hptool("--device", "cuda")
    assert done.exit_code == 2
    assert "--device: cuda given, but torch sees no CUDA device on this machine; allowed is cpu" in done.output


@pytest.mark.usefixtures("nothing_starts")
def test_a_gpu_that_nobody_knows_needs_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, "NVIDIA L4")
    done = hptool()
    assert done.exit_code == 2
    assert "--peak-tflops: not given, but NVIDIA L4 is in no file of cluster/gpus" in done.output
    done = hptool("--peak-tflops", "fp8=242")
    assert done.exit_code == 2
    assert "--peak-tflops: fp8 given, but NVIDIA L4 is in no file" in done.output


@pytest.mark.usefixtures("nothing_starts")
def test_a_directory_in_the_place_of_the_output_is_refused(elsewhere: Path) -> None:
    (elsewhere / "facts.yaml").mkdir()
    done = hptool("--cluster", "local", "--output", "facts.yaml")
    assert done.exit_code == 2
    assert "facts.yaml: is there, and no plain file" in done.output


# ---------------------------------------------------------------- what is written


def test_in_a_checkout_the_facts_that_hptool_comes_with_are_replaced_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, elsewhere: Path
) -> None:
    see(monkeypatch, *[H100_AS_TORCH_CALLS_IT] * 8)
    said = "these took the place of the facts that hptool comes with (git checkout brings those back)"
    assert said not in calibrated(monkeypatch, benchmarks(nodes=1)).notes
    shutil.copytree(files.data_directory("cluster"), elsewhere / "checkout" / "cluster")
    monkeypatch.chdir(elsewhere / "checkout")
    original = files.data_directory
    there = {"cluster": elsewhere / "checkout" / "cluster"}
    monkeypatch.setattr(files, "data_directory", lambda name: there.get(name) or original(name))
    made = calibrated(monkeypatch, benchmarks(nodes=1))
    assert said in made.notes
    assert made.path == elsewhere / "checkout" / "cluster" / "gpus" / "h100-80gb.yaml"


def test_a_poorer_calibration_does_not_replace_a_richer_one(monkeypatch: pytest.MonkeyPatch, elsewhere: Path) -> None:
    see(monkeypatch, *[H100_AS_TORCH_CALLS_IT] * 8)
    whole = benchmarks(nodes=1)
    made = calibrated(monkeypatch, whole)
    before = made.path.read_text()
    poorer = replace(whole, points=whole.points[:-3], left_out=("a", "b", "c"))
    with pytest.raises(LaunchError, match=r"h100-80gb.yaml: holds \d+ measured operations, and now there was time for"):
        calibrated(monkeypatch, poorer)
    assert made.path.read_text() == before
    assert calibrated(monkeypatch, poorer, output=elsewhere / "other.yaml").path == elsewhere / "other.yaml"
    nothing = replace(whole, points=whole.points[:1])
    with pytest.raises(LaunchError, match="too little was measured to fit anything"):
        calibrated(monkeypatch, nothing, output=elsewhere / "third.yaml")
    assert not (elsewhere / "third.yaml").exists()


def test_the_data_sheet_stays_and_the_curves_are_measured(monkeypatch: pytest.MonkeyPatch, elsewhere: Path) -> None:
    see(monkeypatch, *[H100_AS_TORCH_CALLS_IT] * 8)
    made = calibrated(monkeypatch, benchmarks(nodes=1))
    path = elsewhere / "cluster" / "gpus" / "h100-80gb.yaml"
    assert made.path == path
    shipped = files.read(files.data_directory("cluster") / "gpus" / "h100-80gb.yaml", GpuSpec)
    spec = files.read(path, GpuSpec)
    assert spec == made.spec
    kept = ("name", "aliases", "memory_gib", "reserved_gib", "peak_tflops", "memory_gb_per_s", "multiprocessors")
    assert all(getattr(spec, name) == getattr(shipped, name) for name in kept)
    assert spec.launch_overhead_us == pytest.approx(7.0, rel=0.01)
    assert spec.efficiency.gemm == pytest.approx(0.7, rel=0.02)
    assert spec.intra_node.efficiency == pytest.approx(0.8, rel=0.02)
    measured = spec.measured
    assert measured is not None
    assert measured.device == H100_AS_TORCH_CALLS_IT
    assert {"python", "torch", "cuda", "nccl", "hptool"} <= set(measured.versions)
    assert len(measured.points) == len(true_points())
    assert measured.points[0].kind == "gemm"
    assert measured.cluster is None  # of no profile: a profile's links stay its own
    assert max(measured.fit_errors.values()) < 0.02
    assert spec.source.startswith("Measured by hptool")
    assert spec.source.endswith(shipped.source)
    assert list(elsewhere.rglob("*calibrate*")) == []  # the job's files are gone


def test_calibrating_again_does_not_pile_up_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, *[H100_AS_TORCH_CALLS_IT] * 8)
    first = calibrated(monkeypatch, benchmarks())
    second = calibrated(monkeypatch, benchmarks())
    assert second.spec.source == first.spec.source
    # Now the facts in use are the measured ones.
    assert all(each.ratio in (None, pytest.approx(1.0, rel=0.01)) for each in second.differences)


def test_an_unknown_gpu_is_described_by_torch_and_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, "NVIDIA L4", memory_gib=22.2)
    copying = MeasuredPoint(kind="copy", sizes={"bytes": 2**28}, time_us=2 * 2**28 / 250e9 * 1e6)
    found = benchmarks(device="NVIDIA L4", multiprocessors=58, nodes=1, gpus_per_node=1, points=(copying,))
    made = calibrated(monkeypatch, found, peak_tflops=("bf16=121", "fp32=30.3"))
    assert made.path.name == "nvidia-l4.yaml"
    spec = files.read_gpu("NVIDIA L4", "test")  # found by torch's name from here on
    assert spec.peak_tflops == {"bf16": 121.0, "fp32": 30.3}
    assert (spec.memory_gib, spec.multiprocessors, spec.default_precision) == (22.2, 58, "bf16")
    assert spec.memory_gb_per_s == pytest.approx(250, rel=0.01)
    assert all(each.in_use is None for each in made.differences)


def test_differences_are_shown_in_80_columns_and_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, *[H100_AS_TORCH_CALLS_IT] * 8)
    made = calibrated(monkeypatch, benchmarks(left_out=("gemm",)))
    figures = {each.figure: each for each in made.differences}
    assert figures["launch_overhead_us"].in_use == 5.0
    assert figures["launch_overhead_us"].measured == pytest.approx(7.0, rel=0.01)
    assert figures["launch_overhead_us"].ratio == pytest.approx(1.4, rel=0.01)
    console = Console(width=80, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    made.show(console)
    text = console.export_text()
    table = [line for line in text.splitlines() if not line.startswith(("error", "facts", "note", "not measured"))]
    assert max(map(len, table)) <= 80
    assert "launch_overhead_us" in text
    assert "1.40" in text
    assert "no time for 1 operations" in text
    document = json.loads(json.dumps(made.document()))
    told = {each["figure"]: each for each in document["figures"]}
    assert told["launch_overhead_us"]["ratio"] == pytest.approx(1.4, rel=0.01)
    assert document["fit_errors"].keys() >= {"gemm", "attention", "memory", "launch", "intra_node", "inter_node"}


def test_what_was_not_measured_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, H100_AS_TORCH_CALLS_IT)
    points = tuple(point for point in true_points() if point.kind == "tiny_layer")
    made = calibrated(monkeypatch, benchmarks(points=points, nodes=1, gpus_per_node=1))
    figures = {each.figure for each in made.differences}
    assert "launch_overhead_us" in figures
    assert not {name for name in figures if name.startswith(("efficiency.", "intra_node.", "inter_node."))}


def test_another_device_than_the_profiles_is_remarked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made = calibrated(monkeypatch, benchmarks(device="NVIDIA A100-SXM4-80GB"), cluster="dgx-h100")
    assert any("which is no alias of h100-80gb" in note for note in made.notes)


def test_ranks_start_from_a_config_of_their_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, *["NVIDIA L4"] * 3)
    plan = calibrate._plan(calibrate.CalibrateRequest(peak_tflops=("bf16=121",)), lambda _: None)
    config = files.parse(files.parse_yaml(calibrate._config_text(plan.cluster, plan.nodes), "x"), BaseConfig, "x")
    refuse_impossible(config, "x")
    assert (config.trainer.accelerator, config.precision, config.gpus, config.dp) == ("gpu", "bf16", 3, 3)


def test_no_time_at_all_is_an_error_and_no_file(monkeypatch: pytest.MonkeyPatch, elsewhere: Path) -> None:
    with pytest.raises(LaunchError, match=r"nothing was measured: .* give more --max-minutes"):
        calibrated(monkeypatch, benchmarks(points=()), device="cpu")
    assert not (elsewhere / "cluster").exists()


class Ended:
    """A launcher whose job is over."""

    poll_s = 0.01

    def status(self, job_ids: list[str]) -> dict[str, launch.JobStatus]:
        return {i: launch.JobStatus(state=launch.JobState.ENDED, detail="Slurm ended it") for i in job_ids}

    def log_path(self, job_id: str) -> Path:
        return Path(f"{job_id}.out")


def test_a_job_that_fails_says_why_and_where_its_log_is(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_LATE_S", 0.0)
    host: Any = Ended()
    with pytest.raises(LaunchError, match=r"the job left no measurement: Slurm ended it; its log: 7\.out"):
        calibrate._awaited(host, "7", elsewhere, lambda _: None)
    failure = Failure(kind=FailureKind.OOM, message="out of memory", rank=1, log_path="logs/rank-1.log")
    (elsewhere / "failure-rank1.json").write_text(files.json_text(failure))
    with pytest.raises(LaunchError, match=r"the job failed \(oom\): out of memory; its log: logs/rank-1\.log"):
        calibrate._awaited(host, "7", elsewhere, lambda _: None)


# ---------------------------------------------------------------- who reads it


def facts_here(elsewhere: Path, **changes: Any) -> Path:
    """cluster/gpus/cpu.yaml here, with these figures of its own."""
    shipped = yaml.safe_load((files.data_directory("cluster") / "gpus" / "cpu.yaml").read_text())
    path = elsewhere / "cluster" / "gpus" / "cpu.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**shipped, **changes}))
    return path


def test_facts_here_come_before_those_that_hptool_comes_with(elsewhere: Path) -> None:
    assert files.read_cluster("local").gpu.launch_overhead_us == 40.0
    facts_here(elsewhere, launch_overhead_us=12.5)
    assert files.read_cluster("local").gpu.launch_overhead_us == 12.5
    assert files.read_gpu("cpu", "test").launch_overhead_us == 12.5
    assert files.read_gpu("h100", "test").name == "h100-80gb"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"launch_overhead_us": "much"}, "cpu.yaml: launch_overhead_us: 'much' given"),
        ({"efficiency": {"gemm": 2.0, "attention": 0.5, "memory": 0.5}}, "cpu.yaml: efficiency: efficiency.gemm: 2.0"),
        ({"launch_overhed_us": 1.0}, "cpu.yaml: launch_overhed_us: unknown key; did you mean launch_overhead_us?"),
        ({"measured": {"device": "x"}}, "cpu.yaml: measured.date: required key is missing"),
    ],
)
def test_broken_facts_here_name_their_file_and_key(elsewhere: Path, changes: Mapping[str, Any], said: str) -> None:
    facts_here(elsewhere, **changes)
    with pytest.raises(InputError) as error:
        files.read_cluster("local")
    assert said in str(error.value)


def test_a_profile_names_facts_by_their_path_beside_it(elsewhere: Path, tmp_path: Path) -> None:
    facts_here(elsewhere, launch_overhead_us=12.5).rename(tmp_path / "mine.yaml")
    profile = yaml.safe_load((files.data_directory("cluster") / "local.yaml").read_text())
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({**profile, "gpu": "mine.yaml"}))
    assert files.read_cluster(str(tmp_path / "site.yaml")).gpu.launch_overhead_us == 12.5
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({**profile, "gpu": str(tmp_path / "mine.yaml")}))
    assert files.read_cluster(str(tmp_path / "site.yaml")).gpu.launch_overhead_us == 12.5
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({**profile, "gpu": "none.yaml"}))
    with pytest.raises(InputError, match=r"site\.yaml: gpu: none\.yaml given, but there is no such file beside the"):
        files.read_cluster(str(tmp_path / "site.yaml"))


def test_recommend_takes_facts_by_their_path(elsewhere: Path, tmp_path: Path) -> None:
    facts_here(elsewhere).rename(tmp_path / "mine.yaml")
    words = ["recommend", "--gpus", "2", "--days", "1", "--gpu", str(tmp_path / "mine.yaml"), "--model", "gpt3/tiny"]
    done = CliRunner().invoke(main, words[:3] + words[5:])
    assert done.exit_code == 0, done.output


def test_measured_links_hold_in_the_profile_they_were_measured_in(elsewhere: Path) -> None:
    measured = {
        "device": "a CPU", "date": "2026-11-22", "versions": {}, "took_s": 1.0, "nodes": 1, "gpus_per_node": 2,
        "precision": "fp32", "fit_errors": {}, "cluster": "local", "links": ["intra_node"],
        "points": [{"kind": "copy", "sizes": {"bytes": 1}, "time_us": 1.0}],
    }  # fmt: skip
    facts_here(elsewhere, measured=measured, intra_node={"bandwidth_gb_per_s": 3.5, "latency_us": 70.0})
    local, slurm = files.read_cluster("local"), files.read_cluster("dev-slurm")
    assert local.intra_node == Link(bandwidth_gb_per_s=3.5, latency_us=70.0)
    assert local.inter_node.latency_us == 900.0  # which nobody measured
    assert slurm.intra_node.latency_us == 900.0  # measured elsewhere
    assert local.gpu.measured is not None
    assert local.gpu.measured.points == ()  # or each plan of a search would hold them


def test_a_profile_without_links_has_its_gpus(tmp_path: Path) -> None:
    profile = yaml.safe_load((files.data_directory("cluster") / "local.yaml").read_text())
    del profile["intra_node"], profile["inter_node"]
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({**profile, "gpu": "h100"}))
    cluster = files.read_cluster(str(tmp_path / "site.yaml"))
    assert cluster.intra_node == files.read_gpu("h100", "test").intra_node


# ---------------------------------------------------------------- all of it, on this machine


def start(here: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hptool", "calibrate", "--cluster", "local", *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here, start_new_session=True
    )


def test_this_machine_is_measured_and_found_from_here(elsewhere: Path) -> None:
    process = start(elsewhere, "--json", "--max-minutes", "0.5")
    out, err = finish(process)
    assert process.returncode == 0, err
    answer = json.loads(out)
    spec = files.read(elsewhere / "cluster" / "gpus" / "cpu.yaml", GpuSpec)
    assert answer["path"] == str(elsewhere / "cluster" / "gpus" / "cpu.yaml")
    assert spec.measured is not None
    assert spec.measured.cluster == "local"
    # However slow or busy the machine: between a nanosecond and ten milliseconds for an operation of the host.
    assert 1e-3 < spec.launch_overhead_us < 1e4
    for name in ("gemm", "attention", "memory"):
        assert 0 < getattr(spec.efficiency, name) <= 1
    assert files.read_cluster("local").gpu.launch_overhead_us == spec.launch_overhead_us
    assert "measuring" in err
    assert not (elsewhere / "results").exists()


def test_ctrl_c_leaves_no_file_and_no_process(elsewhere: Path) -> None:
    process = start(elsewhere)
    wait_for(lambda: list(elsewhere.glob("results/*/progress.json")), otherwise=lambda: str(process.poll()))
    os.kill(process.pid, signal.SIGINT)
    out, err = finish(process)
    assert process.returncode == 130, (out, err)
    assert "interrupted; nothing was written" in err
    assert list(elsewhere.iterdir()) == []
    assert processes_of(elsewhere) == []
