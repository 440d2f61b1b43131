"""`hptool calibrate`: the figures of a GPU as measured, by one job on the GPUs themselves.

Plan → launch → collect → fit → write → say what differs. Everything that can be wrong with what was asked for is found
before anything is launched; the file is written at the end, whole.
"""

import contextlib
import dataclasses
import datetime as dt
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

import hptool
from hptool import catalogue, files, launch
from hptool.candidates import Layout
from hptool.errors import InputError, LaunchError
from hptool.facts import Cluster, Efficiency, GpuSpec, Link, Measured, Precision
from hptool.launch.jobs import worker_environment
from hptool.measurement import Failure
from hptool.predict import curves
from hptool.predict.curves import Benchmarks, Curves
from hptool.presets import Site
from hptool.units import SECONDS_PER_MINUTE
from hptool.worker import outcome
from hptool.worker.orders import RESULT
from hptool.worker.refusals import refuse_missing_framework
from hptool.worker.supervisor import NodeJob, run_node

#: The profile of a CPU's ranks, where none is named.
CPU_PROFILE = "local"

#: The model whose config the ranks start from; the sizes of what they time are their own.
_MODEL = "gpt3/tiny"

#: What of the time is for measuring; the rest is for starting, for the last operation and for fitting.
_MEASURING = 0.85

#: How long the job may overrun before its supervisor ends it.
_MARGIN_MINUTES = 3.0

#: How long a result may take to show after its job has ended: network file systems keep directories for some seconds.
_LATE_S = 10.0

#: How long looking for devices may take: importing torch from a busy file system.
_LOOKING_S = 120.0

#: Digits that a measurement is worth.
_DIGITS = 4

#: What no data sheet at hand says of an unknown device: what it holds back (as the others do), and links that are not
#: measured, by PCI Express 4.0 with 16 lanes and by a port of 100 Gb/s.
_RESERVED_GIB = 1.5
_PCIE = Link(bandwidth_gb_per_s=32.0, latency_us=10.0)
_PORT = Link(bandwidth_gb_per_s=12.5, latency_us=15.0)

#: What the worker trains in, and so is measured; the first that a device has.
_TRAINED: Sequence[Precision] = ("bf16", "fp32")

#: Relative errors of a fit beyond which its user is warned; on a quiet machine they are a few per cent, and of links,
#: where one curve stands for all collectives, some 30.
_POOR_FIT = 0.4

_DATA_SHEET = "Peaks and what else is no measurement: "

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateRequest:
    """What the user asked for, as given. Peaks are written PRECISION=TFLOPS."""

    device: str | None = None
    cluster: str | None = None
    nodes: int | None = None
    peak_tflops: Sequence[str] = ()
    max_minutes: float = 3.0
    output: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A figure as it was in use and as it was measured; None where there was none."""

    figure: str
    in_use: float | None
    measured: float

    @property
    def ratio(self) -> float | None:
        """Measured over in use."""
        return self.measured / self.in_use if self.in_use else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """A calibration that was written."""

    path: Path
    spec: GpuSpec
    differences: Sequence[Difference]
    kept: Sequence[str]
    left_out: Sequence[str]
    rates: Mapping[str, float]
    notes: Sequence[str]

    def document(self) -> Mapping[str, Any]:
        """For programs."""
        measured = self.spec.measured
        assert measured is not None  # noqa: S101 (that is what it is)
        return {
            "path": str(self.path),
            "gpu": self.spec.name,
            "device": measured.device,
            "cluster": measured.cluster,
            "nodes": measured.nodes,
            "gpus_per_node": measured.gpus_per_node,
            "precision": measured.precision,
            "took_s": measured.took_s,
            "points": len(measured.points),
            "figures": [{**dataclasses.asdict(each), "ratio": each.ratio} for each in self.differences],
            "fit_errors": dict(measured.fit_errors),
            "best_rates": dict(self.rates),
            "kept": list(self.kept),
            "left_out": list(self.left_out),
            "notes": list(self.notes),
        }

    def show(self, console: Console) -> None:
        """For people, in 80 columns."""
        measured = self.spec.measured
        assert measured is not None  # noqa: S101 (as above)
        where = f"{measured.nodes} × {measured.gpus_per_node}" if measured.nodes > 1 else str(measured.gpus_per_node)
        console.print(
            f"{self.spec.name}: {len(measured.points)} operations on {where} × {measured.device}, "
            f"{measured.precision}, {measured.took_s:.0f} s"
        )
        table = Table(box=None, pad_edge=False)
        table.add_column("figure", no_wrap=True)
        for name in ("in use", "measured", "ratio"):
            table.add_column(name, justify="right", no_wrap=True)
        for each in self.differences:
            ratio = "" if each.ratio is None else f"{each.ratio:.2f}"
            table.add_row(each.figure, _number(each.in_use), _number(each.measured), ratio)
        console.print(table)
        errors = ", ".join(f"{name} {error:.1%}" for name, error in measured.fit_errors.items())
        console.print(f"error of the fit at its points (root mean square): {errors}", soft_wrap=True)
        if self.kept:
            console.print(f"not measured, as it was: {', '.join(self.kept)}", soft_wrap=True)
        if self.left_out:
            console.print(f"no time for {len(self.left_out)} operations; --max-minutes gives more", soft_wrap=True)
        for note in self.notes:
            console.print(f"note: {note}", soft_wrap=True)
        console.print(f"facts: {self.path}", soft_wrap=True)


def calibrate(request: CalibrateRequest, say: Say, show: Say) -> Calibrated:
    """Measures, fits and writes; `show` hears how far it is, several times a second.

    InputError for what cannot start, LaunchError where the job fails. Interrupted it ends its job and leaves no file.
    """
    plan = _plan(request, show)
    with _job_directory(plan) as directory:
        found = _measured(plan, directory, say, show)
    if not found.points:
        raise LaunchError(f"nothing was measured: starting took all of {plan.budget_s:.0f} s; give more --max-minutes")
    return _written(plan, found)


# ---------------------------------------------------------------- plan


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What is to be measured and where it goes. `profile` is the one that was named, or the CPU's."""

    cluster: Cluster
    nodes: int
    profile: str | None
    output: Path
    budget_s: float
    max_minutes: float
    is_known: bool


def _plan(request: CalibrateRequest, show: Say) -> _Plan:
    if not 0 < request.max_minutes < math.inf:
        raise InputError(f"--max-minutes: {request.max_minutes} given, allowed is more than 0")
    peaks = _peaks(request.peak_tflops)
    profile = request.cluster or (CPU_PROFILE if request.device == "cpu" else None)
    # The profile first, for its mistakes are told at once, and importing torch takes seconds.
    cluster = files.read_cluster(profile) if profile is not None else None
    if cluster is None or cluster.scheduler == "local":
        refuse_missing_framework()
    is_known = True
    if cluster is None:
        devices = _devices(show)
        if devices:
            cluster, is_known = _this_machine(devices, peaks)
        elif request.device == "cuda":
            raise InputError("--device: cuda given, but torch sees no CUDA device on this machine; allowed is cpu")
        else:
            profile = CPU_PROFILE
            cluster = files.read_cluster(profile)
    if request.device not in (None, cluster.gpu.device):
        raise InputError(
            f"--device: {request.device} given, but the GPU of {cluster.name} is {cluster.gpu.name}; "
            f"allowed is {cluster.gpu.device}"
        )
    if profile is not None and cluster.gpu.device == "cuda" and cluster.scheduler == "local":
        _check_devices(cluster, _devices(show))
    cluster = dataclasses.replace(cluster, gpu=_with_peaks(cluster.gpu, peaks))
    output = (request.output or files.GPUS_HERE / f"{cluster.gpu.name}.yaml").absolute()
    _check_output(output)
    return _Plan(
        cluster=cluster,
        nodes=_nodes(request, cluster),
        profile=profile,
        output=output,
        budget_s=_MEASURING * request.max_minutes * SECONDS_PER_MINUTE,
        max_minutes=request.max_minutes + _MARGIN_MINUTES,
        is_known=is_known,
    )


def _peaks(words: Sequence[str]) -> Mapping[Precision, float]:
    peaks: dict[Precision, float] = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        known = [precision for precision in get_args(Precision) if precision == name]
        if not known or not 0 < value < math.inf:
            allowed = ", ".join(get_args(Precision))
            raise InputError(f"--peak-tflops: {word!r} given, allowed is such as bf16=989.4 (of {allowed})")
        peaks[known[0]] = value
    return peaks


def _devices(show: Say) -> Sequence[Mapping[str, Any]]:
    """The CUDA devices of this machine, as another process sees them: this one stays without torch."""
    show("looking for GPUs")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "hptool.worker.microbenchmarks"],
            capture_output=True,
            text=True,
            check=False,
            timeout=_LOOKING_S,
        )
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"torch did not say in {_LOOKING_S:g} s what devices there are") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LaunchError(f"torch cannot look for devices: {last}")
    found: Sequence[Mapping[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _check_devices(cluster: Cluster, devices: Sequence[Mapping[str, Any]]) -> None:
    if len(devices) < cluster.gpus_per_node:
        raise InputError(
            f"--cluster: {cluster.name} given, with gpus_per_node: {cluster.gpus_per_node}, "
            f"but torch sees {len(devices)} CUDA devices on this machine"
        )


def _this_machine(devices: Sequence[Mapping[str, Any]], peaks: Mapping[Precision, float]) -> tuple[Cluster, bool]:
    """The machine as a cluster of one node, and whether the facts of its GPUs are known."""
    name = str(devices[0]["name"])
    alike = [device for device in devices if device["name"] == name]
    known = files.read_gpus().get(name.lower())
    gpu = known or _unknown(alike[0], len(alike), peaks)
    cluster = Cluster(
        name="this machine",
        source="torch",
        gpu=gpu,
        nodes=1,
        gpus_per_node=len(alike),
        intra_node=gpu.intra_node,
        inter_node=gpu.inter_node,
        scheduler="local",
    )
    return cluster, known is not None


def _unknown(device: Mapping[str, Any], count: int, peaks: Mapping[Precision, float]) -> GpuSpec:
    """A device of which nothing is known but what torch and the user say of it."""
    name = str(device["name"])
    trained = [precision for precision in _TRAINED if precision in peaks]
    if not trained:
        raise InputError(
            f"--peak-tflops: {_given(peaks)}, but {name} is in no file of cluster/gpus: its dense peak in bf16 or "
            "fp32 is needed, as the data sheet has it, such as --peak-tflops bf16=989.4"
        )
    return GpuSpec(
        name=re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        aliases=(name,),
        source="--peak-tflops, and what torch says; links that are not measured are PCI Express 4.0 and 100 Gb/s",
        device="cuda",
        memory_gib=float(device["memory_gib"]),
        reserved_gib=_RESERVED_GIB,
        multiprocessors=int(device["multiprocessors"]),
        peak_tflops=peaks,
        default_precision=trained[0],
        memory_gb_per_s=1.0,  # raised to what a copy reaches
        launch_overhead_us=0.0,
        efficiency=Efficiency(gemm=1.0, attention=1.0, memory=1.0),
        gpus_per_node=count,
        intra_node=_PCIE,
        inter_node=_PORT,
    )


def _given(peaks: Mapping[Precision, float]) -> str:
    return f"{', '.join(peaks)} given" if peaks else "not given"


def _with_peaks(gpu: GpuSpec, peaks: Mapping[Precision, float]) -> GpuSpec:
    return dataclasses.replace(gpu, peak_tflops={**gpu.peak_tflops, **peaks})


def _nodes(request: CalibrateRequest, cluster: Cluster) -> int:
    if request.nodes is None:
        return min(2, cluster.nodes)
    if not 1 <= request.nodes <= cluster.nodes:
        where = request.cluster or "without --cluster: this machine"
        raise InputError(f"--nodes: {request.nodes} given, allowed is 1 to {cluster.nodes} ({where})")
    return request.nodes


def _check_output(output: Path) -> None:
    """InputError where the file could not be written at the end."""
    if output.exists() and not output.is_file():
        raise InputError(f"{output}: is there, and no plain file; choose another --output")
    if output.suffix not in {".yaml", ".yml"}:
        raise InputError(f"--output: {output} given, allowed is a path that ends in .yaml")
    missing = [path for path in output.parents if not path.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror}") from error
    finally:
        for path in missing:  # until there is something to write
            with contextlib.suppress(OSError):
                path.rmdir()


# ---------------------------------------------------------------- launch, collect


@contextlib.contextmanager
def _job_directory(plan: _Plan) -> Iterator[Path]:
    """Where the job's files go: with the results of searches, for nodes and containers see those. Gone after success.

    After a failure the logs stay; after an interruption nothing does.
    """
    root = Path("results").absolute()
    was_there = root.exists()
    try:
        root.mkdir(exist_ok=True)
        directory = Path(tempfile.mkdtemp(dir=root, prefix=f"calibrate-{plan.cluster.gpu.name}-"))
    except OSError as error:
        raise InputError(f"{root}: cannot be written: {error.strerror}; the job's files go there") from error
    is_wanted = False
    try:
        yield directory
    except LaunchError:
        is_wanted = any(directory.rglob("*log*"))
        raise
    finally:
        if not is_wanted:
            shutil.rmtree(directory, ignore_errors=True)
            if not was_there:
                with contextlib.suppress(OSError):
                    root.rmdir()


def _measured(plan: _Plan, directory: Path, say: Say, show: Say) -> Benchmarks:
    """One job, from its start to its result."""
    cluster, path = plan.cluster, directory / "config.yaml"
    files.write_text(path, _config_text(cluster, plan.nodes))
    job = NodeJob(
        config_path=str(path),
        run_directory=str(directory),
        max_minutes=plan.max_minutes,
        owner_pid=os.getpid() if cluster.scheduler == "local" else None,
        environment=worker_environment(cluster),
        benchmark_s=plan.budget_s,
    )
    host = launch.launcher(cluster, directory / "jobs", "separate")
    assert isinstance(host, launch.LocalLauncher | launch.SlurmLauncher)  # noqa: S101 (no packs are in a fresh directory)
    token = uuid.uuid4().hex
    job_id: str | None = None
    try:
        minutes = plan.max_minutes + launch.SCHEDULER_MARGIN_MINUTES
        job_id = host.start(run_node, job, name="hptool-calibrate", nodes=plan.nodes, max_minutes=minutes, token=token)
        if cluster.scheduler == "slurm":
            say(f"job {job_id} measures on {plan.nodes} node{'s' * (plan.nodes > 1)} of {cluster.name}")
        return _awaited(host, job_id, directory, show)
    except BaseException:
        # Between a job's start and the note of its id lies an instant in which Ctrl-C may come.
        lost = [job_id] if job_id is not None else list(host.find([token]).values())
        host.cancel(lost)
        raise
    finally:
        host.close()


def _config_text(cluster: Cluster, nodes: int) -> str:
    """What the ranks start from: a model for this cluster, with one sequence a rank, whatever their number."""
    text = catalogue.config_text(catalogue.preset(_MODEL), Site(cluster=cluster, num_nodes=nodes), Layout())
    override = f"model.global_batch_size={nodes * cluster.gpus_per_node}"
    return files.yaml_text(files.apply_overrides(files.parse_yaml(text, _MODEL), [override], _MODEL))


def _awaited(host: launch.LocalLauncher | launch.SlurmLauncher, job_id: str, directory: Path, show: Say) -> Benchmarks:
    """What the job leaves. LaunchError where it leaves a failure or nothing."""
    result, ended = directory / RESULT, math.inf
    while True:
        status = host.status([job_id])[job_id]
        has_ended = status.state not in (launch.JobState.PENDING, launch.JobState.RUNNING)
        if has_ended and result.exists():
            found: Benchmarks = files.parse_json(files.read_text(result), Benchmarks, str(result))
            return found
        if has_ended:
            ended = min(ended, time.monotonic())
            failure = next(iter(sorted(directory.glob("failure-rank*.json"))), None)
            if failure is not None or time.monotonic() > ended + _LATE_S:
                raise _why(failure, status.detail, host.log_path(job_id))
        show(_progress(directory, f"job {job_id}: {status.state}{f' ({status.detail})' if status.detail else ''}"))
        time.sleep(host.poll_s)


def _progress(directory: Path, otherwise: str) -> str:
    try:
        told = json.loads((directory / outcome.PROGRESS).read_text(encoding="utf-8"))
        return f"measuring {told['what'].replace('_', ' ')} ({told['done'] + 1} of {told['of']})"
    except (OSError, ValueError, KeyError):
        return otherwise


def _why(failure: Path | None, detail: str, log: Path) -> LaunchError:
    if failure is None:
        return LaunchError(f"the job left no measurement: {detail}; its log: {log}")
    told: Failure = files.parse_json(files.read_text(failure), Failure, str(failure))
    return LaunchError(f"the job failed ({told.kind}): {told.message}; its log: {told.log_path or log}")


# ---------------------------------------------------------------- fit, write, say


def _written(plan: _Plan, found: Benchmarks) -> Calibrated:
    framework = files.read_framework("hptool-worker")
    before = dataclasses.replace(
        plan.cluster.gpu, intra_node=plan.cluster.intra_node, inter_node=plan.cluster.inter_node
    )
    if not plan.is_known and found.multiprocessors is not None:
        before = dataclasses.replace(before, multiprocessors=found.multiprocessors)
    fitted = curves.fit_curves(found, before, framework)
    if not fitted.errors and plan.is_known:  # of an unknown device the least is worth having
        raise LaunchError(f"too little was measured to fit anything in {plan.budget_s:.0f} s; give more --max-minutes")
    _check_better(plan.output, found)
    spec = _spec(plan, found, fitted, before)
    try:
        files.write_text(plan.output, facts_text(spec))
    except OSError as error:
        raise InputError(f"{plan.output}: cannot be written: {error.strerror}") from error
    return Calibrated(
        path=plan.output,
        spec=spec,
        differences=_differences(before if plan.is_known else None, spec, fitted),
        kept=fitted.kept,
        left_out=found.left_out,
        rates=curves.rates(found.points),
        notes=_notes(plan, found, fitted.errors),
    )


def _check_better(path: Path, found: Benchmarks) -> None:
    """LaunchError where the file holds a calibration of more operations than there was time for now."""
    try:
        held = files.read(path, GpuSpec).measured
    except InputError:
        return
    if held is not None and found.left_out and len(held.points) > len(found.points):
        raise LaunchError(
            f"{path}: holds {len(held.points)} measured operations, and now there was time for {len(found.points)} "
            "only; give more --max-minutes or another --output"
        )


def _spec(plan: _Plan, found: Benchmarks, fitted: Curves, before: GpuSpec) -> GpuSpec:
    """The facts as measured; of the others, those of the GPU before."""
    date = dt.datetime.now(dt.UTC).date().isoformat()
    links = tuple(name for name in ("intra_node", "inter_node") if getattr(fitted, name) is not None)
    where = f"{found.nodes} × {found.gpus_per_node} × {found.device}"
    carried = before.source.rpartition(_DATA_SHEET)[2]
    return dataclasses.replace(
        before,
        source=(
            f"Measured by hptool {hptool.__version__} (hptool calibrate) on {where} with torch "
            f"{found.versions.get('torch', 'of unknown version')}, {date}. {_DATA_SHEET}{carried}"
        ),
        peak_tflops={**before.peak_tflops, found.precision: _rounded(fitted.peak_tflops)},
        memory_gb_per_s=_rounded(fitted.memory_gb_per_s),
        launch_overhead_us=_rounded(fitted.launch_overhead_us),
        efficiency=Efficiency(**_all_rounded(fitted.efficiency)),
        intra_node=Link(**_all_rounded(fitted.intra_node or plan.cluster.gpu.intra_node)),
        inter_node=Link(**_all_rounded(fitted.inter_node or plan.cluster.gpu.inter_node)),
        measured=Measured(
            device=found.device,
            date=date,
            versions=found.versions,
            took_s=_rounded(found.took_s),
            nodes=found.nodes,
            gpus_per_node=found.gpus_per_node,
            precision=found.precision,
            fit_errors={name: _rounded(error) for name, error in fitted.errors.items()},
            cluster=plan.cluster.name if plan.profile is not None else None,
            links=links,  # type: ignore[arg-type]  # the two names above
            points=tuple(
                dataclasses.replace(point, time_us=_rounded(point.time_us), spread=_rounded(point.spread))
                for point in found.points
            ),
        ),
    )


def facts_text(spec: GpuSpec) -> str:
    """The YAML of `spec`, a line for each measured point."""
    defaults = {f.name: f.default for f in dataclasses.fields(GpuSpec)}
    document = {key: value for key, value in dataclasses.asdict(spec).items() if value != defaults[key]}
    if spec.measured is None:
        return files.yaml_text(document)
    measured = document.pop("measured")
    points = measured.pop("points")
    # JSON is YAML, and keeps a point in a line; links, peaks and efficiencies stay readable as blocks.
    lines = [f"  - {json.dumps({**point, 'sizes': dict(point['sizes'])})}\n" for point in points]
    return files.yaml_text({**document, "measured": measured}) + "  points:\n" + "".join(lines)


def _differences(before: GpuSpec | None, spec: GpuSpec, fitted: Curves) -> Sequence[Difference]:
    """Each figure that was measured, beside the one in use."""
    measured = spec.measured
    precision = measured.precision if measured else spec.default_precision

    def figures(of: GpuSpec) -> Mapping[str, float]:
        flat = {
            f"peak_tflops.{precision}": of.peak_tflops[precision],
            "memory_gb_per_s": of.memory_gb_per_s,
            "launch_overhead_us": of.launch_overhead_us,
        }
        flat |= {f"efficiency.{name}": value for name, value in dataclasses.asdict(of.efficiency).items()}
        for name in ("intra_node", "inter_node"):
            flat |= {f"{name}.{key}": value for key, value in dataclasses.asdict(getattr(of, name)).items()}
        return flat

    kept = {f"efficiency.{name}" for name in fitted.kept} | set(fitted.kept)
    held = figures(before) if before is not None else {}
    # A data sheet's figures are carried over, but where more was measured.
    kept |= {name for name in (f"peak_tflops.{precision}", "memory_gb_per_s") if held.get(name) == figures(spec)[name]}
    return [
        Difference(figure=name, in_use=held.get(name), measured=value)
        for name, value in figures(spec).items()
        if not (name in kept or (name.partition(".")[0].endswith("_node") and _link_of(name, fitted) is None))
    ]


def _link_of(figure: str, fitted: Curves) -> Link | None:
    link: Link | None = getattr(fitted, figure.partition(".")[0])
    return link


def _notes(plan: _Plan, found: Benchmarks, errors: Mapping[str, float]) -> Sequence[str]:
    notes = [
        f"the fit of {name} is off by {error:.0%} at its points: something else ran, or the curve does not suit; "
        "take its figures with care, or measure again on a quiet machine"
        for name, error in errors.items()
        if error > _POOR_FIT
    ]
    gpu = plan.cluster.gpu
    names = {name.lower() for name in (gpu.name, *gpu.aliases)}
    if gpu.device == "cuda" and found.device.lower() not in names:
        notes.append(f"measured on {found.device}, which is no alias of {gpu.name}: are these the facts of that GPU?")
    if plan.output.parent.resolve() == (files.data_directory("cluster") / "gpus").resolve():
        notes.append("these took the place of the facts that hptool comes with (git checkout brings those back)")
    elif plan.output.parent == files.GPUS_HERE.absolute():
        notes.append("commands that are run from here use them; remove the file, and they use hptool's own again")
    if plan.output.parent != files.GPUS_HERE.absolute():
        notes.append(f"hptool finds it by path: gpu: {plan.output} in a profile, or --gpu {plan.output}")
    if plan.profile is None and found.gpus_per_node > 1:
        notes.append(
            "the links hold where a profile leaves its own out; measured with --cluster PROFILE, they hold there"
        )
    return notes


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _all_rounded(figures: Efficiency | Link) -> Mapping[str, float]:
    return {name: _rounded(value) for name, value in dataclasses.asdict(figures).items()}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.{_DIGITS}g}"
