"""The command, as users and schedulers start it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hptool import files
from hptool.measurement import Measurement
from tests.worker.runs import tiny_document

#: Torch's threads and files reserve more than they use; an endless recursion would still end here.
LIMITED = ["prlimit", f"--as={12 * 2**30}"]


def worker(*words: str, before: tuple[str, ...] = ("-m", "hptool.worker")) -> subprocess.CompletedProcess[str]:
    """The worker's command with these words, to its end."""
    environment = {key: value for key, value in os.environ.items() if key not in {"RANK", "WORLD_SIZE"}}
    command = [*LIMITED, sys.executable, *before, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def config(tmp_path: Path) -> str:
    """The path of the tiny config for two ranks."""
    path = tmp_path / "config.yaml"
    path.write_text(files.yaml_text(tiny_document(trainer__devices=2)))
    return str(path)


def measured(directory: Path) -> Measurement:
    """What the run in this directory wrote."""
    path = directory / "measurement.json"
    found = files.parse_json(path.read_text(), Measurement, str(path))
    assert isinstance(found, Measurement)
    return found


def test_two_ranks_leave_a_measurement(config: str, tmp_path: Path) -> None:
    result = worker(config, "--output", str(tmp_path / "out"), "model.tensor_model_parallel_size=2")
    assert result.returncode == 0, result.stderr
    assert "s a step" in result.stdout
    found = measured(tmp_path / "out")
    assert 1 <= found.warmup_steps <= 2
    assert found.warmup_steps + len(found.step_times_s) == 5
    assert found.step_time_low_s <= found.step_time_s <= found.step_time_high_s
    assert len(found.losses) == 5
    assert found.gpus == 2
    assert found.memory_kind == "max resident"
    assert found.kernels["attention"] == "torch SDPA"
    assert set(found.versions) >= {"python", "hptool", "torch", "megatron-core"}
    tokens = found.gbs * found.seq_length / found.step_time_s / found.gpus
    assert found.tokens_per_s_per_gpu == pytest.approx(tokens)
    assert found.model_tflops_per_gpu == pytest.approx(
        found.model_flops_per_step / found.step_time_s / found.gpus / 1e12
    )
    assert "step 5 of 5" in (tmp_path / "out" / "logs" / "rank-0.log").read_text()
    assert (tmp_path / "out" / "progress.json").exists()


def test_torchrun_starts_the_ranks_itself(config: str, tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hptool.worker")
    result = worker(config, "--output", str(tmp_path / "out"), before=torchrun)
    assert result.returncode == 0, result.stderr
    assert measured(tmp_path / "out").gpus == 2
    assert not (tmp_path / "out" / "logs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.micro_batch_sise=4"], "model.micro_batch_sise: unknown key; did you mean micro_batch_size?"),
        (["model.context_parallel_size=4"], "does not divide the 2 GPUs"),
        (["trainer.num_nodes=2", "model.global_batch_size=16"], "srun --ntasks-per-node=1"),
        (["trainer.max_time=soon"], "trainer.max_time: 'soon' given, allowed is DD:HH:MM:SS"),
        (["micro_batch_size"], "an override is written key.key=value"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(config: str, tmp_path: Path, words: list[str], said: str) -> None:
    result = worker(config, "--output", str(tmp_path / "out"), *words)
    assert result.returncode == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out" / "logs").exists()


def test_missing_file_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    result = worker(str(tmp_path / "none.yaml"))
    assert result.returncode == 2
    assert result.stderr.splitlines() == [f"{tmp_path / 'none.yaml'}: cannot be read: No such file or directory"]


def test_missing_torch_says_what_to_install(config: str, tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.modules['torch'] = None; "
        f"sys.argv = ['worker', {config!r}, '--output', {str(tmp_path / 'out')!r}]; "
        "runpy.run_module('hptool.worker', run_name='__main__')"
    )
    result = worker(before=("-c", code))
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "the worker needs torch: pip install 'hptool[worker]'"


def test_wrong_number_of_torchrun_ranks_is_refused(config: str) -> None:
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "3"}
    result = subprocess.run(
        [sys.executable, "-m", "hptool.worker", config],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.splitlines() == ["WORLD_SIZE: 3 given, allowed is trainer.num_nodes · trainer.devices (2)"]


def test_missing_gpu_is_told_in_one_line(config: str, tmp_path: Path) -> None:
    result = worker(config, "--output", str(tmp_path / "out"), "trainer.accelerator=gpu")
    assert result.returncode == 1
    assert "trainer.devices: 2 given, allowed are the 0 CUDA devices" in result.stderr.splitlines()[-1]


def test_supervisor_is_imported_without_torch() -> None:
    code = (
        "import sys, hptool.worker.supervisor, hptool.worker.__main__; "
        "sys.exit(bool({'torch', 'megatron', 'submitit'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
