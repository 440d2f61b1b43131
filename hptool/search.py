"""The path, once, in order: config, layouts, predictions, then propose, launch, collect until done; then the report."""

import dataclasses
import math
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from hptool import __version__, files, launch, report, strategy
from hptool.base_config import BaseConfig, Preset, lightning_time, render
from hptool.candidates import (
    Candidates,
    Layout,
    Layouts,
    SearchLimits,
    SearchSpace,
    enumerate_layouts,
)
from hptool.errors import InputError, NoFeasibleLayout
from hptool.facts import Cluster
from hptool.measurement import Failure, FailureKind, Measurement, Outcome
from hptool.predict import Predictions, predict
from hptool.results import OutcomeRecord, ResultsDirectory, Submission
from hptool.worker.refusals import refuse_missing_framework

Say = Callable[[str], None]

#: How long a job's files may take to appear after the scheduler says that it ended (shared file systems lag).
_SETTLE_S = 5.0

#: How often a wait says what it waits for.
_TELL_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """What the user asked for, as given."""

    model: str
    cluster: str
    nodes: int | None = None
    limit_search_runs: int = 10
    max_minutes_per_run: float = 20.0
    max_steps_per_run: int = 50
    space: SearchSpace = field(default_factory=SearchSpace)
    results: Path | None = None
    dry_run: bool = False
    resume: bool = False
    overrides: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """A request with everything resolved: ready to launch, nothing written yet."""

    request: SearchRequest
    cluster: Cluster
    nodes: int
    config: BaseConfig
    candidates: Candidates
    predictions: Predictions
    directory: Path

    @property
    def planned_runs(self) -> int:
        """How many layouts will be measured, if nothing else ends the search."""
        return min(self.request.limit_search_runs, len(self.candidates.layouts))

    def document(self) -> Mapping[str, Any]:
        """What plan.json holds; a search may be resumed by a request with the same `search`."""
        request = self.request
        cluster = dataclasses.asdict(self.cluster)
        for site in ("slurm", "environment", "source"):  # how jobs get there does not change what they measure
            del cluster[site]
        return {
            "search": {
                "model": request.model,
                "config": self.config.with_layout(Layout()).document(),
                "cluster": cluster,
                "space": dataclasses.asdict(request.space),
                "max_steps_per_run": request.max_steps_per_run,
                "max_minutes_per_run": request.max_minutes_per_run,
            },
            "limit_search_runs": request.limit_search_runs,
            "versions": {"hptool": __version__, "revision": _revision(), "python": platform.python_version()},
        }


def _revision() -> str | None:
    """The commit of a checkout, for those who want to repeat a search; None for an installed package."""
    package = Path(__file__).parent
    if not (package.parent / ".git").exists():
        return None
    try:
        done = subprocess.run(  # noqa: S603 (fixed words)
            ["git", "-C", str(package), "describe", "--always", "--dirty"],  # noqa: S607 (git is wherever PATH has it)
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def search_train(request: SearchRequest, say: Say) -> tuple[report.Report, Path]:
    """Run the search; its report (also written) and its directory.

    Raises InputError, NoFeasibleLayout or LaunchError; a failed run is no error but a row of the report.
    """
    plan = make_plan(request)
    if not request.dry_run:
        refuse_missing_framework()
    results = ResultsDirectory(plan.directory)
    try:
        results.begin(plan.document(), resume=request.resume)
        _write_plan(plan, results, say)
        notes: list[str] = []
        if request.dry_run:
            notes.append("Dry run: everything was written, nothing was launched.")
        else:
            _measure(plan, results, say)
        made = make_report(plan, results, notes)
        report.write(made, plan.directory)
    finally:
        results.close()
    return made, plan.directory


# ---------------------------------------------------------------- plan


def make_plan(request: SearchRequest) -> Plan:
    """Read, check, enumerate and predict; writes nothing."""
    for name in ("limit_search_runs", "max_minutes_per_run"):
        if getattr(request, name) <= 0:
            raise InputError(f"--{name.replace('_', '-')}: {getattr(request, name)} given, allowed is more than 0")
    if request.max_steps_per_run < 2:  # noqa: PLR2004 (one to warm up, one to time)
        raise InputError(f"--max-steps-per-run: {request.max_steps_per_run} given, allowed is 2 or more")
    cluster = files.read_cluster(request.cluster)
    nodes = request.nodes if request.nodes is not None else cluster.nodes
    if not 1 <= nodes <= cluster.nodes:
        raise InputError(f"--nodes: {nodes} given, allowed is 1 to {cluster.nodes} ({request.cluster})")
    config = read_config(request, cluster, nodes)
    space = pinned(request.space, config, request.overrides)
    limits = files.read(files.data_directory("base_configs") / "search_space.yaml", SearchLimits)
    _check_values(space, config, limits)
    candidates = enumerate_layouts(space, config.workload, limits)
    if not len(candidates.layouts):
        raise NoFeasibleLayout(_nothing_feasible(config, candidates))
    predictions = predict(candidates.layouts, config.workload, cluster)
    best = predictions.layouts.row(int(predictions.ranking()[0]))
    default = Path("results") / f"{config.run.name}-{cluster.name}-{nodes}n".replace("/", "-")
    return Plan(
        request=replace(request, space=space),
        cluster=cluster,
        nodes=nodes,
        config=config.with_layout(best),
        candidates=candidates,
        predictions=predictions,
        directory=(request.results or default).absolute(),
    )


def read_config(request: SearchRequest, cluster: Cluster, nodes: int) -> BaseConfig:
    """The preset or file that `--model` names, for these nodes, with the overrides."""
    presets = files.data_directory("base_configs")
    path = files.named_file(request.model, presets, "*/*.yaml", "model preset")
    if path.is_relative_to(presets):
        preset = files.read(path, Preset)
        template = files.read_text(presets / f"{preset.family}.yaml.j2")
        document = files.parse_yaml(render(template, preset, cluster, nodes), request.model)
    else:
        document = files.read_yaml(path)
        # The nodes and devices are the cluster's, whatever the file was written for.
        device = "gpu" if cluster.gpu.device == "cuda" else "cpu"
        for key, value in (("num_nodes", nodes), ("devices", cluster.gpus_per_node), ("accelerator", device)):
            document = files.with_value(document, ["trainer", key], value)
    document = files.apply_overrides(document, request.overrides, "override")
    config = files.parse(document, BaseConfig, request.model)
    for key, value, allowed in (
        ("num_nodes", config.trainer.num_nodes, nodes),
        ("devices", config.trainer.devices, cluster.gpus_per_node),
    ):
        if value != allowed:
            raise InputError(f"override: trainer.{key}: {value} given, allowed is {allowed} (--nodes and the profile)")
    if config.precision not in cluster.gpu.peak_tflops:
        allowed_words = " or ".join(sorted(cluster.gpu.peak_tflops))
        raise InputError(
            f"{request.model}: trainer.precision: {config.trainer.precision!r} given, "
            f"allowed on {cluster.gpu.name} is {allowed_words}"
        )
    return config


#: Overrides of these keys choose a value of a search axis.
_AXIS_KEYS = {
    "model.tensor_model_parallel_size": "tp",
    "model.pipeline_model_parallel_size": "pp",
    "model.virtual_pipeline_model_parallel_size": "vpp",
    "model.context_parallel_size": "cp",
    "model.micro_batch_size": "mbs",
}


def pinned(space: SearchSpace, config: BaseConfig, overrides: Sequence[str]) -> SearchSpace:
    """The space with the axes that an override fixes; an axis given both ways is an InputError."""
    keys = {override.partition("=")[0] for override in overrides}
    layout = config.layout
    for key in sorted(keys & set(_AXIS_KEYS)):
        axis = _AXIS_KEYS[key]
        if getattr(space, axis) is not None:
            raise InputError(f"override: {key}: is fixed here and listed by --{axis}; give one of them")
        space = replace(space, **{axis: (getattr(layout, axis),)})
    if any(key.startswith("model.activations_checkpoint") for key in keys):
        if space.recompute is not None:
            raise InputError("override: model.activations_checkpoint_*: is fixed here and listed by --recompute")
        space = replace(space, recompute=((layout.recompute, layout.recompute_num_layers or None),))
    return space


def _check_values(space: SearchSpace, config: BaseConfig, limits: SearchLimits) -> None:
    """A listed value that no legal layout has, whatever the other axes, is a mistake and not a rejection."""
    problems = []
    for axis in ("tp", "pp", "vpp", "cp", "mbs"):
        for value in getattr(space, axis) or ():
            if value < 1:
                problems.append(f"--{axis}: {value} given, allowed is 1 or more")
                continue
            wide = SearchSpace(**{axis: (value,)})
            found = enumerate_layouts(wide, config.workload, limits)
            if not len(found.layouts):
                worst = max(found.rejections, key=lambda r: r.count)
                problems.append(f"--{axis}: {value} given, but no layout can have it: {worst.reason}")
    if problems:
        raise InputError(*problems)


def _nothing_feasible(config: BaseConfig, candidates: Candidates) -> str:
    lines = [f"{r.count:>6} {r.reason} (e.g. {r.example})" for r in candidates.rejections]
    return "\n".join(
        [
            f"no layout of {config.run.name} can start on {config.gpus} GPUs:",
            *lines,
            "what would help: an axis left at auto, another number of nodes, or another model.global_batch_size than "
            + str(config.model.global_batch_size),
        ]
    )


def _write_plan(plan: Plan, results: ResultsDirectory, say: Say) -> None:
    total = len(plan.candidates.layouts)
    say(
        f"{total} layouts can start, {sum(r.count for r in plan.candidates.rejections)} cannot; "
        f"{plan.predictions.likely_to_fit} are expected to fit into memory"
    )
    files.write_text(results.base_config, files.yaml_text(plan.config.document()))
    results.write_candidates(
        (layout.name, files.yaml_text(plan.config.with_layout(layout).document()))
        for layout in plan.candidates.layouts.rows()
    )
    files.write_text(results.predictions, report.predictions_csv(plan.predictions))
    if plan.cluster.scheduler == "slurm":
        shutil.rmtree(results.path / "scripts", ignore_errors=True)  # of an earlier limit
        for row in strategy.propose(plan.predictions, (), plan.request.limit_search_runs):
            layout = plan.predictions.layouts.row(row)
            parameters = launch.run_parameters(_run(plan, results, layout), plan.cluster)
            config = results.path / "scripts" / f"{layout.name}.yaml"
            timed = run_config(plan.config, layout, plan.request)
            files.write_text(config, files.yaml_text(timed.document()))
            script = launch.batch_script(parameters, config, results.path / "by-hand" / layout.name)
            files.write_text(config.with_suffix(".sh"), script)


# ---------------------------------------------------------------- runs


def run_config(config: BaseConfig, layout: Layout, request: SearchRequest) -> BaseConfig:
    """The timed run of a layout: the fewest nodes that hold whole replicas, each with its real share of the batch.

    A replica works through the same microbatches as on the full cluster, so its step is the real one up to the
    data-parallel communication; the global batch shrinks with the replicas.
    """
    full = config.with_layout(layout)
    nodes = math.lcm(layout.gpus_per_replica, config.trainer.devices) // config.trainer.devices
    replicas = nodes * config.trainer.devices // layout.gpus_per_replica
    return replace(
        full,
        trainer=replace(
            full.trainer,
            num_nodes=nodes,
            max_steps=request.max_steps_per_run,
            max_time=lightning_time(timedelta(minutes=request.max_minutes_per_run)),
        ),
        model=replace(full.model, global_batch_size=layout.mbs * replicas * full.num_microbatches),
    )


def _run(plan: Plan, results: ResultsDirectory, layout: Layout) -> launch.Run:
    config = run_config(plan.config, layout, plan.request)
    return launch.Run(
        name=layout.name,
        directory=results.run_directory(layout.name),
        nodes=config.trainer.num_nodes,
        max_minutes=plan.request.max_minutes_per_run,
    )


class _Campaign:
    """The runs under way: what was submitted, since when it runs, and how an end is turned into an outcome."""

    def __init__(self, plan: Plan, results: ResultsDirectory, say: Say) -> None:
        self.plan = plan
        self.results = results
        self.say = say
        self.launcher = launch.launcher(plan.cluster, results.path / "jobs")
        self.outcomes = results.outcomes()
        self.under_way: dict[str, str] = {}  # layout name -> job id
        self._running_since: dict[str, float] = {}
        self._ended_since: dict[str, float] = {}
        self._states: dict[str, str] = {}
        self._told_at = time.monotonic()

    def take_over(self) -> None:
        """Collect what an earlier process submitted: outcomes that it did not record, jobs that still live."""
        open_jobs = {n: s.job_id for n, s in self.results.submissions().items() if n not in self.outcomes}
        states = self.launcher.status(list(open_jobs.values())) if open_jobs else {}
        for name, job_id in open_jobs.items():
            alive = states[job_id].state in (launch.JobState.PENDING, launch.JobState.RUNNING)
            outcome = self.results.read_outcome(name)
            if outcome is not None and not alive:
                self._settle(name, job_id, outcome)
            elif alive:
                self.say(f"job {job_id} of an earlier process still runs {name}; waiting for it")
                self.under_way[name] = job_id

    def submit(self, layouts: Sequence[Layout]) -> None:
        """Start runs of these layouts."""
        runs = []
        for layout in layouts:
            config = run_config(self.plan.config, layout, self.plan.request)
            self.results.prepare_run(layout.name, files.yaml_text(config.document()))
            runs.append(_run(self.plan, self.results, layout))
        self.launcher.submit(runs, self._started)

    def _started(self, run: launch.Run, job_id: str) -> None:
        self.under_way[run.name] = job_id
        self.results.record_submission(Submission(name=run.name, job_id=job_id))
        self.say(f"job {job_id}: {run.name} on {run.nodes} node{'s' if run.nodes > 1 else ''}")

    def collect(self) -> None:
        """Look at every job under way once, and record those that ended."""
        states = self.launcher.status(list(self.under_way.values()))
        now = time.monotonic()
        for name, job_id in list(self.under_way.items()):
            status = states[job_id]
            outcome = self.results.read_outcome(name)
            if status.state in (launch.JobState.ENDED, launch.JobState.LOST):
                # The measurement may still be on its way through a shared file system.
                since = self._ended_since.setdefault(name, now)
                if outcome is None and now - since < _SETTLE_S:
                    continue
                self._settle(name, job_id, outcome or self._without_files(job_id, status))
            elif status.state is launch.JobState.RUNNING:
                since = self._running_since.setdefault(name, now)
                limit_s = self.plan.request.max_minutes_per_run * 60 + launch.OVERDUE_S
                if now - since > limit_s:
                    self.launcher.cancel([job_id])
                    message = f"still running {limit_s:.0f} s after its start; cancelled"
                    self._settle(name, job_id, outcome or Failure(kind=FailureKind.TIMEOUT, message=message))
            self._tell(name, status)
        if self.under_way and now - self._told_at > _TELL_S:
            self._told_at = now
            self.say(f"waiting for {', '.join(self._progress(name) for name in self.under_way)}")

    def _progress(self, name: str) -> str:
        """A layout under way and how far it is, as far as its job has said so."""
        told = self.results.read_progress(name)
        return f"{name} (step {told.step} of {told.of})" if told else f"{name} ({self._states[name]})"

    def _tell(self, name: str, status: launch.JobStatus) -> None:
        state = f"{status.state.value}{f', {status.detail}' if status.detail else ''}"
        if name in self.under_way and self._states.get(name) != state:
            self._states[name] = state
            self.say(f"{name}: {state}")

    def _without_files(self, job_id: str, status: launch.JobStatus) -> Failure:
        log = self.launcher.log_path(job_id)
        text = log.read_text(errors="replace")[-10_000:] if log.is_file() else ""
        kind = status.meaning
        if "oom-kill" in text or "memory limit" in text or "Out Of Memory" in text:
            kind = FailureKind.OOM
        own = [line for line in text.strip().splitlines() if not line.startswith("submitit ")]
        last = (own or [""])[-1]
        return Failure(kind=kind, message=f"{status.detail}{f'; last line: {last}' if last else ''}", log_path=str(log))

    def _settle(self, name: str, job_id: str, outcome: Outcome) -> None:
        self.under_way.pop(name, None)
        record = OutcomeRecord(
            name=name,
            job_id=job_id,
            measurement=outcome if isinstance(outcome, Measurement) else None,
            failure=outcome if isinstance(outcome, Failure) else None,
        )
        self.results.record_outcome(record)
        self.outcomes[name] = record
        done = f"{len(self.outcomes)}/{self.plan.planned_runs}"
        if isinstance(outcome, Measurement):
            rate = f"{outcome.model_tflops_per_gpu:.4g} TFLOPS/GPU, {outcome.step_time_s:.4g} s a step"
            self.say(f"[{done}] {name}: {rate}")
        else:
            self.say(f"[{done}] {name}: {outcome.kind.value}: {outcome.message}")

    def cancel(self) -> None:
        """End every job under way; what already ended is recorded first, the rest is left for --resume."""
        if not self.under_way:
            return
        self.say(f"cancelling {len(self.under_way)} jobs: {', '.join(self.under_way.values())}")
        with launch.blocked(signal.SIGINT):  # an impatient second Ctrl-C must not leave half of them
            self.launcher.cancel(list(self.under_way.values()))
        for name, job_id in list(self.under_way.items()):
            outcome = self.results.read_outcome(name)
            if isinstance(outcome, Measurement):
                self._settle(name, job_id, outcome)


def _measure(plan: Plan, results: ResultsDirectory, say: Say) -> None:
    campaign = _Campaign(plan, results, say)
    limit = plan.request.limit_search_runs
    known = len(campaign.outcomes)
    if known:
        say(f"{known} of {plan.planned_runs} layouts were run before, and are not run again")
    try:
        campaign.take_over()
        while True:
            tried = {*campaign.outcomes, *campaign.under_way}
            slots = campaign.launcher.slots
            rows = strategy.propose(plan.predictions, tried, limit)
            free = len(rows) if slots is None else max(0, slots - len(campaign.under_way))
            if rows[:free]:
                campaign.submit([plan.predictions.layouts.row(row) for row in rows[:free]])
            if not campaign.under_way:
                return
            time.sleep(campaign.launcher.poll_s)
            campaign.collect()
    except BaseException:
        campaign.cancel()
        raise


# ---------------------------------------------------------------- report


def make_report(plan: Plan, results: ResultsDirectory, notes: Sequence[str]) -> report.Report:
    """Everything known about the search, and `optimal.yaml` where something was measured."""
    rows = []
    layouts = {layout.name: layout for layout in plan.predictions.layouts.rows()}
    notes = list(notes)
    for name, record in results.outcomes().items():
        if name not in layouts:
            continue
        layout = layouts[name]
        config = run_config(plan.config, layout, plan.request)
        expected = predict(Layouts.of([layout]), config.workload, plan.cluster)
        rows.append(
            report.Row(
                layout=layout,
                nodes=config.trainer.num_nodes,
                gpus=config.gpus,
                gbs=config.model.global_batch_size,
                predicted_step_time_s=float(expected.step_time_s[0]),
                predicted_model_tflops_per_gpu=float(expected.model_tflops_per_gpu[0]),
                predicted_memory_gib=float(expected.memory_gib[0]),
                log_path=(record.failure and record.failure.log_path) or str(results.run_directory(name) / "logs"),
                measurement=record.measurement,
                failure=record.failure,
            )
        )
    rows = report.ranked(rows)
    if any(row.gbs != plan.config.model.global_batch_size for row in rows):
        notes.append(
            f"Runs used the fewest nodes for their layout instead of {plan.nodes}; each replica worked through the "
            f"same microbatches as in the full training with its global batch of "
            f"{plan.config.model.global_batch_size}, so the batch of a run is smaller by its missing replicas. "
            "Communication between the missing replicas is not in the measured times."
        )
    if not plan.config.model.data.data_prefix:
        notes.append(
            "The winning config trains on synthetic tokens until model.data.data_prefix names a .bin/.idx set. "
            "The worker times a training and saves no weights."
        )
    best = next((row.layout for row in rows if row.measurement), None)
    if best is not None:
        files.write_text(results.optimal, files.yaml_text(plan.config.with_layout(best).document()))
    return report.Report(
        model=plan.config.run.name,
        num_parameters=plan.config.shape.num_parameters,
        cluster=plan.cluster,
        nodes=plan.nodes,
        gbs=plan.config.model.global_batch_size,
        seq_length=plan.config.shape.seq_length,
        precision=plan.config.precision,
        peak_tflops=plan.cluster.gpu.peak_tflops[plan.config.precision],
        candidates=len(plan.candidates.layouts),
        rejections=plan.candidates.rejections,
        rows=rows,
        planned_runs=plan.planned_runs,
        predictions=plan.predictions,
        notes=notes,
        optimal_path=str(results.optimal) if best is not None else None,
        train_command=train_command(plan, results) if best is not None else None,
    )


def train_command(plan: Plan, results: ResultsDirectory) -> str:
    """The command that trains `optimal.yaml`; on Slurm the script that it submits is written beside it."""
    output = results.path / "training"
    if plan.cluster.scheduler == "local":
        worker = [sys.executable, "-m", "hptool.worker", str(results.optimal), "--output", str(output)]
        return shlex.join(worker)
    limit = plan.config.run.time_limit or "UNLIMITED"
    name = f"hptool-{plan.config.run.name}"
    parameters = launch.slurm_parameters(plan.cluster, nodes=plan.nodes, time_limit=limit, name=name)
    script = results.optimal.with_suffix(".sh")
    files.write_text(script, launch.batch_script(parameters, results.optimal, output))
    output.mkdir(exist_ok=True)  # Slurm opens its log there before anything of ours runs
    return shlex.join(["sbatch", str(script)])
