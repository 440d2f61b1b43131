"""One rank of the training, from the process group to its outcome."""

import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch
from megatron.core import parallel_state, tensor_parallel

import hptool
from hptool import timing
from hptool.base_config import BaseConfig
from hptool.errors import InputError
from hptool.measurement import Measurement
from hptool.predict.flops import MODEL_FLOPS_CONVENTION, model_flops_per_step
from hptool.units import GIB, TERA
from hptool.worker import cpu, kernels, outcome, processes
from hptool.worker.nodes import Place
from hptool.worker.processes import Heartbeats, limit_memory
from hptool.worker.training import StepReport, Training

#: Megatron's own trainer spaces the seeds of pipeline stages so, or every stage would draw the same weights.
_SEED_STRIDE = 100

#: How long a rank waits, when all it knows is that a peer is gone, for that peer's own words or its supervisor's.
_ROOT_CAUSE_S = 20.0

_PROGRESS_INTERVAL_S = 1.0

#: The first of NVIDIA's compute capabilities with 8-bit floating point in its tensor cores (Ada; CUDA C++ Programming
#: Guide, table of arithmetic by compute capability).
_FP8_CAPABILITY = (8, 9)

#: What Python would warn of in every run, and only Megatron-core could change.
_MEGATRON_HABITS = (
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    r"`torch\.distributed\.\w+` is deprecated",
)


def run_rank(config: BaseConfig, place: Place, heartbeats: Heartbeats) -> int:
    """Trains, and leaves a measurement or a failure; answers the exit code of the process."""
    return attempt(lambda: _run(config, place, heartbeats), place)


def attempt(run: Callable[[], None], place: Place) -> int:
    """Runs it, and leaves a failure where it raises one; answers the exit code of the process."""
    for message in _MEGATRON_HABITS:
        warnings.filterwarnings("ignore", message=message)
    try:
        run()
    except Exception as error:  # noqa: BLE001 (whatever it is, it ends this run and must be told)
        processes.print_traceback()
        if outcome.is_lost_peer(error):
            deadline = time.monotonic() + _ROOT_CAUSE_S
            while time.monotonic() < deadline and not outcome.has_failed(place.directory):
                time.sleep(0.1)
        failure = outcome.failure_of(error, place.rank, place.log)
        try:
            outcome.record_failure(place.directory, failure)
        except (OSError, InputError) as unwritten:
            print(f"{unwritten}: cannot write that this rank has failed: {failure.message}", file=sys.stderr)  # noqa: T201 (the log)
            return processes.CANNOT_WRITE
        return 1
    return 0


def _run(config: BaseConfig, place: Place, heartbeats: Heartbeats) -> None:
    device = join(config, place)
    if place.memory_gib is not None and device.type == "cpu":
        limit_memory(place.memory_gib)
    with refusals_by_name(place, heartbeats):
        training = Training(config, device, beat=lambda: heartbeats.beat(place.local_rank))
        reports, startup_s = _train(config, training, place, heartbeats)
    memory = fullest_memory_gib(device)
    if place.rank == 0:
        outcome.write_measurement(place.directory, _measurement(config, reports, startup_s, memory, device))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@contextlib.contextmanager
def refusals_by_name(place: Place, heartbeats: Heartbeats) -> Iterator[None]:
    """Within, what Megatron says before a first step has gone through is an InputError.

    By such errors it says that it does not support a config.
    """
    try:
        yield
    except (AssertionError, ValueError) as error:
        if heartbeats.steps(place.local_rank) > 0:
            raise
        raise InputError(f"Megatron-core refuses this config: {error}") from error


def join(config: BaseConfig, place: Place) -> torch.device:
    """Opens this rank's device, joins the others, cuts the process group by the layout, and seeds the generators."""
    _own_compiler_cache(place.local_rank)
    device = _open_device(config, place)
    _meet(config, place)
    divide(config)
    return device


def _own_compiler_cache(local_rank: int) -> None:
    """Ranks of a node compile the same kernels at once; they have been seen to load what another had half written."""
    shared = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{shared}/rank-{local_rank}"


def divide(config: BaseConfig) -> None:
    """Cuts the process group, which is there, by the layout, and seeds this rank's generators."""
    layout = config.layout
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        create_gloo_process_groups=False,
    )
    seed = config.model.seed + _SEED_STRIDE * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _open_device(config: BaseConfig, place: Place) -> torch.device:
    if config.trainer.accelerator == "cpu":
        torch.set_num_threads(1)
        cpu.drive_megatron()
        return torch.device("cpu")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found <= place.local_rank:
        raise InputError(
            f"trainer.devices: {config.trainer.devices} given, allowed are the {found} CUDA devices that torch sees "
            "on this node (or set trainer.accelerator: cpu)"
        )
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    capability = torch.cuda.get_device_capability(device)
    if config.model.fp8 and capability < _FP8_CAPABILITY:
        raise InputError(
            f"model.fp8: True given, allowed on {torch.cuda.get_device_name(device)} is False: its compute capability "
            f"is {capability[0]}.{capability[1]}, and 8-bit GEMMs need {_FP8_CAPABILITY[0]}.{_FP8_CAPABILITY[1]}"
        )
    return device


def _meet(config: BaseConfig, place: Place) -> None:
    backend = "gloo" if config.trainer.accelerator == "cpu" else "nccl"
    if place.meeting is None:
        torch.distributed.init_process_group(backend)
        return
    listener = place.meeting.listener
    if listener is not None and place.rank > 0:
        os.close(listener)  # or it would outlive rank 0, and the others would wait for answers
        listener = None
    store = torch.distributed.TCPStore(  # type: ignore[attr-defined]  # torch re-exports it without saying so
        place.meeting.host,
        place.meeting.port,
        place.world_size,
        is_master=place.rank == 0,
        timeout=timedelta(minutes=5),
        master_listen_fd=listener,
    )
    torch.distributed.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size)


def _train(
    config: BaseConfig, training: Training, place: Place, heartbeats: Heartbeats
) -> tuple[list[StepReport], float]:
    """All steps, and the seconds from the start of the supervisor to that of the first step's clock."""
    reports: list[StepReport] = []
    told = startup_s = 0.0
    for step in range(config.trainer.max_steps):
        report = training.step(step)
        heartbeats.finish_step(place.local_rank)
        if step == 0:
            startup_s = time.monotonic() - heartbeats.started - report.time_s
            if config.trainer.accelerator != "cpu":  # what choosing kernels took is not the training's
                torch.cuda.reset_peak_memory_stats()
        reports.append(report)
        if place.rank == 0:
            print(f"step {step + 1} of {config.trainer.max_steps}: loss {report.loss:.6f}, {report.time_s:.4f} s")  # noqa: T201 (the log)
            if time.monotonic() - told > _PROGRESS_INTERVAL_S or step + 1 == config.trainer.max_steps:
                told = time.monotonic()
                tell_progress(config, place.directory, step, report)
    return reports, startup_s


def tell_progress(config: BaseConfig, directory: Path, step: int, report: StepReport) -> None:
    """For those who watch; no one waits for it, so it is not forced to disk, nor does a full one matter."""
    tokens_per_s = config.model.global_batch_size * config.shape.tokens_per_sequence / report.time_s
    progress = {"step": step + 1, "of": config.trainer.max_steps, "tokens_per_s": tokens_per_s, "loss": report.loss}
    aside = directory / f".{outcome.PROGRESS}"
    with contextlib.suppress(OSError):
        aside.write_text(json.dumps(progress), encoding="utf-8")
        aside.replace(directory / outcome.PROGRESS)


def fullest_memory_gib(device: torch.device) -> dict[str, float]:
    """Of the fullest rank, by the names of a measurement's fields."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        own = {
            "peak_memory_gib": torch.cuda.max_memory_allocated(device),
            "max_reserved_gib": torch.cuda.max_memory_reserved(device),
            "device_used_gib": total - free,
            "device_memory_gib": total,
        }
    else:
        own = {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    peak = torch.tensor(list(own.values()), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
    return dict(zip(own, (peak / GIB).tolist(), strict=True))


def _measurement(
    config: BaseConfig,
    reports: list[StepReport],
    startup_s: float,
    memory_gib: Mapping[str, float],
    device: torch.device,
) -> Measurement:
    all_times = [report.time_s for report in reports]
    warmup = timing.warmup_steps(all_times)
    times = all_times[warmup:]
    low_s, high_s = timing.median_interval(times)
    shape, gbs, gpus = config.shape, config.model.global_batch_size, config.gpus
    model_flops = model_flops_per_step(shape, gbs)
    return Measurement(
        step_times_s=tuple(times),
        step_time_s=median(times),
        step_time_low_s=low_s,
        step_time_high_s=high_s,
        is_steady=timing.is_steady(all_times),
        warmup_steps=warmup,
        startup_s=startup_s,
        losses=tuple(report.loss for report in reports),
        **memory_gib,
        memory_kind="max allocated" if device.type == "cuda" else "max resident",
        gpus=gpus,
        gbs=gbs,
        seq_length=shape.tokens_per_sequence,
        model_flops_per_step=model_flops,
        model_flops_convention=MODEL_FLOPS_CONVENTION,
        model_tflops_per_gpu=model_flops / median(times) / gpus / TERA,
        tokens_per_s_per_gpu=gbs * shape.tokens_per_sequence / median(times) / gpus,
        num_parameters=shape.num_parameters,
        device=device_name(device),
        precision=config.precision,
        kernels=kernels.names(config),
        versions=versions_of(device),
    )


def device_name(device: torch.device) -> str:
    """What its maker calls it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions_of(device: torch.device) -> dict[str, str]:
    """Of what has computed, by the packages' names."""
    versions = {"python": platform.python_version(), "hptool": hptool.__version__, "torch": torch.__version__}
    for package in ("megatron-core", "transformer-engine"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]  # as above
    return versions
