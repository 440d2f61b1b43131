"""Real runs on the CPU: torch and Megatron-core are imported once, and every run forks from here."""

import copy
import json
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hptool import files
from hptool.base_config import BaseConfig
from hptool.errors import InputError
from hptool.measurement import Failure, Measurement
from hptool.worker import supervisor
from hptool.worker.nodes import Meeting, Place, listen

#: For the whole of a run's process tree, because an endless recursion once took all of a machine's memory.
_ADDRESS_SPACE_BYTES = 8 * 2**30

#: The tiny model's keys that T5 has in its stacks.
_STACK = {"hidden_size": 64, "ffn_hidden_size": 256, "num_attention_heads": 4}


def tiny_document(**changes: Any) -> dict[str, Any]:
    """A config of four small layers; changes are dotted keys with `__` for the dot, as in `trainer__devices=2`.

    A change to None takes the key away.
    """
    document: dict[str, Any] = {
        "run": {"name": "tiny"},
        "trainer": {"num_nodes": 1, "devices": 1, "accelerator": "cpu", "precision": 32, "max_steps": 5},
        "model": {
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "encoder_seq_length": 32,
            "max_position_embeddings": 32,
            "num_layers": 4,
            "hidden_size": 64,
            "ffn_hidden_size": 256,
            "num_attention_heads": 4,
            "override_vocab_size": 500,
            "optim": {"lr": 0.01},
            "data": {"seq_length": 32},
        },
    }
    for key, value in changes.items():
        *sections, name = key.split("__")
        section = document
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = copy.deepcopy(value)
        if value is None:
            del section[name]
    return document


def tiny_config(**changes: Any) -> BaseConfig:
    """As `tiny_document`, read."""
    return files.parse(tiny_document(**changes), BaseConfig, "tiny")


#: What makes another family of the tiny GPT.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "model__num_query_groups": 2,
        "model__ffn_hidden_size": 176,
        "model__normalization": "rmsnorm",
        "model__activation": "fast-swiglu",
        "model__bias": False,
        "model__position_embedding_type": "rope",
        "model__share_embeddings_and_output_weights": False,
    },
    "gemma": {
        "model__num_query_groups": 2,
        "model__kv_channels": 24,
        "model__normalization": "rmsnorm",
        "model__layernorm_zero_centered_gamma": True,
        "model__activation": "geglu",
        "model__bias": False,
        "model__position_embedding_type": "rope",
        "model__scale_embeddings": True,
    },
    "alibi": {"model__position_embedding_type": "alibi"},
    "bert": {"model__bert_binary_head": True},
    "t5": {
        "model__encoder": {**_STACK, "num_layers": 4, "activation": "geglu"},
        "model__decoder": {**_STACK, "num_layers": 4, "activation": "geglu"},
        "model__seq_length": 32,
        "model__data__seq_length_dec": 16,
        "model__data__mean_ngram_size": 2,
        **{f"model__{key}": None for key in (*_STACK, "num_layers", "encoder_seq_length")},
    },
}
FAMILIES["moe"] = {
    **FAMILIES["llama"],
    "model__num_moe_experts": 4,
    "model__moe_router_topk": 2,
    "model__moe_ffn_hidden_size": 96,
    # So much that a wrong scale of either shows; with less, two experts come so near to a tie that it is rounding
    # which decides between them.
    "model__moe_aux_loss_coeff": 1.0,
    "model__moe_z_loss_coeff": 0.1,
}


def tiny_family(name: str, **changes: Any) -> dict[str, Any]:
    """Changes to the tiny document that make a model of this family of it, and more of them."""
    return FAMILIES[name] | changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A supervisor in a child process, and its run directory."""

    directory: Path
    pid: int

    def wait(self, timeout_s: float = 60.0) -> int:
        """The exit code: 0 measured, 1 failed, 2 refused, otherwise as `run_node` says."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        pytest.fail(f"the supervisor was still there after {timeout_s} s")

    @property
    def measurement(self) -> Measurement:
        """What the run wrote, read as strictly as the search reads it."""
        path = self.directory / "measurement.json"
        if not path.exists():
            logs = "\n".join(log.read_text()[-3000:] for log in self.directory.rglob("*.log"))
            pytest.fail(f"no measurement\n{logs}")
        found = files.parse_json(path.read_text(), Measurement, str(path))
        assert isinstance(found, Measurement)
        return found

    @property
    def failures(self) -> list[Failure]:
        """What went wrong: as many as there are files."""
        paths = sorted(self.directory.glob("failure-rank*.json"))
        return [files.parse_json(path.read_text(), Failure, str(path)) for path in paths]

    def ranks(self, count: int, timeout_s: float = 30.0) -> list[int]:
        """The processes of the ranks, once all of them are there."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            if len(children) == count:
                return [int(child) for child in children]
            time.sleep(0.01)
        pytest.fail(f"fewer than {count} ranks after {timeout_s} s")

    def until_step(self, step: int, timeout_s: float = 30.0) -> None:
        """Waits for the first rank to tell of this step."""
        deadline = time.monotonic() + timeout_s
        log = self.directory / "logs" / "rank-0.log"
        while time.monotonic() < deadline:
            if log.exists() and f"step {step} of" in log.read_text():
                return
            time.sleep(0.01)
        pytest.fail(f"step {step} not done after {timeout_s} s")


class Launcher:
    """Starts runs, each in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._count = 0

    def start(self, *, limits: dict[str, Any] | None = None, **changes: Any) -> Run:
        """A run of the tiny config with these changes."""
        return self.start_text(files.yaml_text(tiny_document(**changes)), limits=limits)

    def start_text(self, text: str, *, limits: dict[str, Any] | None = None) -> Run:
        """A run of this YAML."""
        self._count += 1
        directory = self._directory / f"run{self._count}"
        directory.mkdir()
        return self._start_in(directory, text, limits)

    def start_again(self, run: Run, **changes: Any) -> Run:
        """Another attempt in the directory of a run that is over."""
        return self._start_in(run.directory, files.yaml_text(tiny_document(**changes)), None)

    def _start_in(self, directory: Path, text: str, limits: dict[str, Any] | None) -> Run:
        config = directory / "config.yaml"
        config.write_text(text)
        job = supervisor.NodeJob(
            **{"config_path": str(config), "run_directory": str(directory), "max_minutes": 2.0, **(limits or {})}
        )
        return Run(directory=directory, pid=fork(lambda: exit_code_of(job), directory / "supervisor.log"))

    def run(self, **changes: Any) -> Measurement:
        """As `start`, to the end, which must be a measurement."""
        run = self.start(**changes)
        code = run.wait()
        measurement = run.measurement
        assert code == 0
        return measurement


def fork(function: Callable[[], int], log: Path) -> int:
    """Runs the function in a child with limited memory, its output in `log`; answers the child's id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE_BYTES, _ADDRESS_SPACE_BYTES))
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.environ["HPTOOL_LAYOUT_INDEPENDENT_INIT"] = "1"
        code = function()
    except BaseException as error:  # noqa: BLE001 (nothing of pytest's may run in the child)
        with os.fdopen(2, "w", closefd=False) as stderr:
            traceback.print_exc(file=stderr)
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 99
    finally:
        os._exit(code)


def exit_code_of(job: supervisor.NodeJob) -> int:
    """What `run_node` comes to, as an exit code."""
    try:
        supervisor.run_node(job)
    except supervisor.RunFailedError:
        return 1
    except InputError:
        return 2
    return 0


def on_ranks(directory: Path, config: BaseConfig, function: Callable[[], Any]) -> list[Any]:
    """What `function` answers (as JSON) on each rank of this config, joined as the worker joins them."""
    from hptool.worker.rank import join  # noqa: PLC0415 (imports torch and megatron)

    listener = listen()
    meeting = Meeting(host="127.0.0.1", port=listener.getsockname()[1], listener=listener.fileno())
    directory.mkdir(exist_ok=True)
    children = []
    for rank in range(config.gpus):
        place = Place(
            rank=rank,
            local_rank=rank,
            world_size=config.gpus,
            directory=directory,
            meeting=meeting,
        )

        def work(place: Place = place) -> int:
            join(config, place)
            (directory / f"answer-{place.rank}.json").write_text(json.dumps(function()))
            return 0

        children.append(fork(work, directory / f"rank-{rank}.log"))
    listener.close()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        pytest.fail("\n".join(log.read_text()[-3000:] for log in sorted(directory.glob("*.log"))))
    return [json.loads((directory / f"answer-{rank}.json").read_text()) for rank in range(config.gpus)]


def write_set(prefix: Path, documents: list[list[int]]) -> Path:
    """A tokenised set of these documents, by Megatron's own writer."""
    import numpy as np  # noqa: PLC0415 (beside torch)
    import torch  # noqa: PLC0415 (heavy)
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # noqa: PLC0415 (heavy)

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix
