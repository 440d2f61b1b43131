"""`hptool train`: a config trained for real, here or as a Slurm job; the worker's ranks do it.

Everything that can be wrong is found here, before anything starts. The directory of a training is described in
`worker/orders.py`.
"""

import dataclasses
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hptool import files, launch
from hptool.base_config import BaseConfig
from hptool.errors import InputError
from hptool.facts import Cluster
from hptool.results import LOCK, differences, hold
from hptool.units import SECONDS_PER_MINUTE
from hptool.worker import full_training, hellaswag, orders, text
from hptool.worker.orders import Orders, TrainingResult
from hptool.worker.refusals import refuse_impossible, refuse_missing_framework, refuse_ramp

#: Checkpoints that are kept where the config does not say how many.
_KEPT = 2

#: Global batches that are validated with where --validate-every is given and the config reads none.
_VALIDATION_BATCHES = 32

#: Where a submitted job's id is.
_JOB = "job.json"

#: What may differ from one part of a training to the next without changing where it leads.
_HARMLESS = (
    "run.",
    "trainer.max_time",
    "trainer.log_every_n_steps",
    "trainer.val_check_interval",
    "trainer.limit_",
    "exp_manager",
    "model.nsys_profile",
)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """What the user asked for, as given; None leaves it to the config. Steps of 0 mean never."""

    config: Path
    cluster: str | None = None
    results: Path | None = None
    resume: bool = False
    data: str | None = None
    validate_every: int | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int | None = None
    sample_every: int | None = None
    prompt: str | None = None
    sample_tokens: int = 64
    temperature: float = 0.0
    hellaswag: Path | None = None
    runs: Path | None = None
    overrides: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A training that ended here, or one that was handed to Slurm as `job_id`."""

    directory: Path
    result: TrainingResult | None = None
    runs: Path | None = None
    job_id: str | None = None

    def document(self) -> Mapping[str, Any]:
        """For programs."""
        result = dataclasses.asdict(self.result) if self.result else None
        return {"results": str(self.directory), "job_id": self.job_id, "result": result}

    def lines(self) -> Sequence[str]:
        """For people."""
        if self.result is None:
            return [f"job {self.job_id} trains in {self.directory}"]
        result = self.result
        found = {
            "loss": result.loss,
            "validation loss": result.validation_loss,
            "HellaSwag accuracy": result.hellaswag_accuracy,
        }
        said = "".join(f", {name} {value:.4f}" for name, value in found.items() if value is not None)
        lines = [f"trained {result.step} of {result.max_steps} steps, {result.tokens:,} tokens{said}"]
        lines += [f"note: {note}" for note in result.notes]
        if result.step < result.max_steps:
            lines.append(f"stopped before trainer.max_time; --resume goes on from {result.checkpoint}")
        else:
            lines.append(f"weights: {result.checkpoint}")
        if self.runs is not None and result.validation_loss is not None:
            lines.append(f"row of parameters, tokens and loss: {self.runs}")
        return lines


def train(request: TrainRequest, say: Say) -> Trained:
    """Trains to the end, or hands the training to Slurm.

    InputError for what cannot start, LaunchError where the ranks or Slurm fail, SystemExit where a signal ended it.
    """
    config = _read_config(request)
    given = _orders(request, config)
    cluster = files.read_cluster(request.cluster) if request.cluster else None
    _check(request, config, given, cluster)
    directory = _directory(request, config)
    resume = request.resume or config.exp_manager.get("resume_if_exists") is True
    with _claimed(directory, config, resume, say):
        files.write_text(directory / orders.CONFIG, files.yaml_text(config.document()))
        runs = given.runs or str(directory / orders.RUNS)
        given = dataclasses.replace(given, runs=runs)
        files.write_text(directory / orders.ORDERS, files.json_text(given))
        if cluster is not None and cluster.scheduler == "slurm":
            return Trained(directory=directory, job_id=_submit(config, cluster, directory, say))
        warmup = config.model.optim.sched.steps_of_warmup(config.trainer.max_steps)
        if warmup >= config.trainer.max_steps:
            say(
                f"the learning rate only warms up: model.optim.sched.warmup_steps is {warmup}, "
                f"trainer.max_steps {config.trainer.max_steps}"
            )
        if not config.model.data.data_prefix:
            say("training on synthetic tokens: --data names no .bin/.idx set and no text")
        environment = dict(cluster.environment) if cluster is not None else {}
        result = full_training.run(directory, config, given, say, environment)
    return Trained(directory=directory, result=result, runs=Path(runs))


# ---------------------------------------------------------------- what is asked for


def _read_config(request: TrainRequest) -> BaseConfig:
    document = files.read_config_yaml(request.config)
    if request.data is not None:
        document = files.with_value(document, ["model", "data", "data_prefix"], str(Path(request.data).absolute()))
    document = files.apply_overrides(document, request.overrides, "override")
    config = files.parse(document, BaseConfig, str(request.config))
    refuse_impossible(config, str(request.config))
    refuse_ramp(config, str(request.config))
    return config


def _orders(request: TrainRequest, config: BaseConfig) -> Orders:
    """The request, and what the config says where it asks for nothing."""
    trainer = config.trainer
    callback = config.exp_manager.get("checkpoint_callback_params") or {}
    interval = trainer.val_check_interval
    if isinstance(interval, float):  # a part of the training, which NeMo's trainer takes for one epoch
        interval = max(1, round(interval * trainer.max_steps))
    batches = trainer.limit_val_batches
    if request.validate_every and not batches:
        batches = _VALIDATION_BATCHES
    checkpoint_every = _first(request.checkpoint_every, callback.get("every_n_train_steps"), interval)
    keep = _first(request.keep_checkpoints, callback.get("save_top_k"), _KEPT)
    minutes = orders.minutes_of(trainer.max_time)
    prompt = request.prompt
    if prompt is None and request.sample_every:
        prompt = ""
    return Orders(
        validate_every=_first(request.validate_every, interval),
        validation_batches=batches,
        checkpoint_every=checkpoint_every,
        keep_checkpoints=keep if keep > 0 else sys.maxsize,  # NeMo's -1 keeps all
        log_every=max(1, trainer.log_every_n_steps),
        sample_every=_first(request.sample_every, 0),
        prompt=prompt,
        sample_tokens=request.sample_tokens,
        temperature=request.temperature,
        hellaswag=str(request.hellaswag.absolute()) if request.hellaswag else None,
        runs=str(request.runs.absolute()) if request.runs else None,
        max_seconds=minutes * SECONDS_PER_MINUTE if trainer.max_time is not None else None,
    )


def _first(*values: Any) -> int:
    return next(int(value) for value in values if value is not None)


def _check(request: TrainRequest, config: BaseConfig, given: Orders, cluster: Cluster | None) -> None:
    """InputError for what the ranks would refuse much later."""
    _check_options(request, config)
    if cluster is not None:
        _check_cluster(request, config, cluster)
    if given.prompt is not None or given.hellaswag is not None:
        text.tokenizer_of(config)
    if given.hellaswag is not None:
        hellaswag.read_questions(Path(given.hellaswag))
    for path in _paths(config):
        _check_data(path, config)
    if given.runs is not None:
        orders.check_runs(Path(given.runs))
    refuse_missing_framework()


def _check_data(path: str, config: BaseConfig) -> None:
    if text.is_text(path):
        text.tokenizer_of(config)
        text.check_text(Path(path))
    elif not Path(f"{path}.idx").exists():
        raise InputError(
            f"model.data.data_prefix: {path!r} given, but there is neither a set {path}.idx nor a text of this name"
        )


def _check_options(request: TrainRequest, config: BaseConfig) -> None:
    problems = []
    for name in ("validate_every", "checkpoint_every", "keep_checkpoints", "sample_every", "sample_tokens"):
        value, fewest = getattr(request, name), int(name in {"keep_checkpoints", "sample_tokens"})
        if value is not None and value < fewest:
            problems.append(f"--{name.replace('_', '-')}: {value} given, allowed is {fewest} or more")
    if request.temperature < 0:
        problems.append(f"--temperature: {request.temperature} given, allowed is 0 (the likeliest token) or more")
    asked = {"--prompt": request.prompt, "--sample-every": request.sample_every, "--hellaswag": request.hellaswag}
    generative = config.shape.causal and not config.is_encoder_decoder
    problems += [
        f"{option}: {value} given, but {request.config} is no GPT: only a model that predicts the next token can do it"
        for option, value in asked.items()
        if value and not generative
    ]
    if problems:
        raise InputError(*problems)


def _paths(config: BaseConfig) -> Sequence[str]:
    """The sets and texts that the config names, without their weights."""
    given = config.model.data.data_prefix
    parts = [given] if isinstance(given, str) else list(given or ())
    return [part for part in parts if isinstance(part, str) and not _is_number(part)]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _check_cluster(request: TrainRequest, config: BaseConfig, cluster: Cluster) -> None:
    trainer = config.trainer
    device = "gpu" if cluster.gpu.device == "cuda" else "cpu"
    problems = [
        f"{request.config}: trainer.{key}: {value} given, allowed on {cluster.name} is {allowed}"
        for key, value, allowed, ok in (
            ("num_nodes", trainer.num_nodes, f"1 to {cluster.nodes}", trainer.num_nodes <= cluster.nodes),
            ("devices", trainer.devices, cluster.gpus_per_node, trainer.devices == cluster.gpus_per_node),
            ("accelerator", trainer.accelerator, device, trainer.accelerator == device),
        )
        if not ok
    ]
    if problems:
        raise InputError(*problems)


# ---------------------------------------------------------------- the directory


def _directory(request: TrainRequest, config: BaseConfig) -> Path:
    """Where the training goes: as asked for, as the config says, or beside the config."""
    named = config.exp_manager.get("explicit_log_dir")
    return (request.results or (Path(str(named)) if named else request.config.parent / "training")).absolute()


def _claimed(directory: Path, config: BaseConfig, resume: bool, say: Say) -> Any:  # noqa: FBT001 (as the others)
    """Holds the directory; InputError where it is not free, or holds a training that cannot be gone on with."""
    try:
        is_there = (directory / orders.ORDERS).exists()
        if directory.exists() and not is_there:
            if not directory.is_dir():
                raise InputError(f"{directory}: is a file; choose another --results")
            if any(path.name != LOCK for path in directory.iterdir()):
                raise InputError(f"{directory}: is not empty and holds no training; choose another --results")
        directory.mkdir(parents=True, exist_ok=True)
        held = hold(directory)
        try:
            if is_there:
                _check_held(directory, config, resume, say)
        except InputError:
            held.close()
            raise
    except OSError as error:
        raise InputError(f"{directory}: cannot be written: {error.strerror}") from error
    return held


def _check_held(directory: Path, config: BaseConfig, resume: bool, say: Say) -> None:  # noqa: FBT001 (as the others)
    """InputError where the training in the directory is to be left alone, or is another one."""
    job = directory / _JOB
    if job.exists():
        job_id = str(json.loads(files.read_text(job))["job_id"])
        if launch.is_queued(job_id):
            raise InputError(f"{directory}: job {job_id} trains in it already (see squeue --me)")
    checkpoint = orders.newest_checkpoint(directory)
    if checkpoint is None and not (directory / orders.LOSSES).exists():
        return  # it failed before its first step: there is nothing to lose
    if not resume:
        raise InputError(f"{directory}: holds a training already; go on with --resume or choose another --results")
    held = files.read(directory / orders.CONFIG, BaseConfig)
    other = sorted(differences(dataclasses.asdict(held.shape), dataclasses.asdict(config.shape)))
    if other:
        raise InputError(
            f"{directory}: holds a training of another model: {', '.join(other)}. Choose another --results"
        )
    changed = sorted(
        change for change in differences(held.document(), config.document()) if not change.startswith(_HARMLESS)
    )
    if changed:
        say(f"going on with another config, so with another curve: {'; '.join(changed)}")
    before, now = _padded_vocabulary(held), _padded_vocabulary(config)
    if before != now:
        say(f"the vocabulary is padded to {now} tokens and no more to {before}: the loss jumps, until that is learnt")
    say(f"going on from {checkpoint}" if checkpoint else "there is no checkpoint yet: beginning anew")


def _padded_vocabulary(config: BaseConfig) -> int:
    return config.shape.padded_vocab_size(config.layout.tp, config.model.make_vocab_size_divisible_by)


# ---------------------------------------------------------------- Slurm


def _submit(config: BaseConfig, cluster: Cluster, directory: Path, say: Say) -> str:
    """Hands the training to Slurm, by a script that stays in the directory; the job's id."""
    name = f"hptool-train-{config.run.name}"
    limit = config.run.time_limit or "UNLIMITED"
    parameters = launch.slurm_parameters(cluster, nodes=config.trainer.num_nodes, time_limit=limit, name=name)
    script = directory / "train.sh"
    configs, given = directory / orders.CONFIG, directory / orders.ORDERS
    files.write_text(script, launch.batch_script(parameters, configs, directory, orders=given))
    job_id = launch.submit_script(script, cluster)
    files.write_text(directory / _JOB, json.dumps({"job_id": job_id}))
    say(f"job {job_id}, by {script}; how far it is: {directory / 'progress.json'}; to stop it: scancel {job_id}")
    return job_id


def command(config: Path, results: Path, cluster: str | None = None) -> str:
    """The command that trains a config, as a user types it."""
    installed = Path(sys.executable).with_name("hptool")
    found = shutil.which("hptool")
    hptool = ["hptool"] if found and Path(found) == installed else [sys.executable, "-m", "hptool"]
    words = [*hptool, "train", "--config", str(config), "--results", str(results)]
    return shlex.join([*words, "--cluster", cluster] if cluster is not None else words)
