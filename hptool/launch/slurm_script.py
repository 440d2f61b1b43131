"""Batch scripts for sbatch: what a profile asks for, as text. submitit renders them."""

import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import _make_sbatch_string

from hptool.facts import Cluster, SlurmOptions
from hptool.launch.jobs import SCHEDULER_MARGIN_MINUTES, Run
from hptool.secrets import is_secret

#: Set in a job by Slurm; sbatch within a job would hand it to the next one, which would take itself for another.
_OF_A_JOB = "SLURM_"
_NOT_OF_A_JOB = frozenset({"SLURM_CONF"})


def slurm_parameters(cluster: Cluster, *, nodes: int, time_limit: int | str, name: str) -> dict[str, Any]:
    """What `sbatch` is asked for, in submitit's names; the limit in minutes, or as sbatch reads it.

    And `python`, the command that runs Python there, for the functions below.
    """
    options = cluster.slurm
    cpus = options.cpus_per_gpu * cluster.gpus_per_node
    # An option of the profile's own wins over what hptool would ask for.
    parameters: dict[str, Any] = {
        "job_name": name,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "exclusive": options.exclusive or None,
        "nodes": nodes,
        # One supervisor a node; it starts the node's ranks.
        "ntasks_per_node": 1,
        "cpus_per_task": cpus,
        **_gpus(cluster),
        "mem": _memory(options),
        "time": time_limit,
    }
    parameters = {key: value for key, value in parameters.items() if key.replace("_", "-") not in options.extra_options}
    parameters |= {
        "python": _python(options),
        "array_parallelism": options.array_parallelism,
        "stderr_to_stdout": True,
        "srun_args": [
            # A node whose supervisor gives up takes the other nodes down with it, at once.
            "--kill-on-bad-exit=1",
            # Since Slurm 22.05 srun no longer takes this from sbatch, and all ranks would share one core.
            f"--cpus-per-task={cpus}",
            *_container(options),
        ],
        "setup": _before(cluster) or None,
        "teardown": _after(options) or None,
        "additional_parameters": _extra(options),
    }
    # submitit would mark every job with a workload key, which sites that track those refuse.
    return {key: value for key, value in parameters.items() if value is not None} | {"wckey": None}


def run_parameters(run: Run, cluster: Cluster) -> dict[str, Any]:
    """As `slurm_parameters`, for a timed run."""
    minutes = math.ceil(run.max_minutes) + SCHEDULER_MARGIN_MINUTES
    name = f"hptool-{run.directory.parent.parent.name}"
    return slurm_parameters(cluster, nodes=run.nodes, time_limit=minutes, name=name)


def batch_script(parameters: Mapping[str, Any], config: Path, output: Path, orders: Path | None = None) -> str:
    """A script for sbatch that trains a config as the search's own jobs do, its logs and numbers in `output`.

    With orders, as `hptool train` does.
    """
    worker = ["-u", "-m", "hptool.worker", str(config), "--output", str(output)]
    if orders is not None:
        worker += ["--orders", str(orders)]
    return _script(parameters, worker, output)


def job_script(parameters: Mapping[str, Any], folder: Path, *, name: str, count: int, comment: str) -> str:
    """A script that calls what submitit pickled as `NAME.pkl`, once a node; of an array as `NAME_0.pkl` and so on.

    submitit's worker looks for a name with the job's id in it. Its own launcher renames the file after sbatch has
    answered, so that a job whose launcher dies in between finds nothing to do; here the job itself makes the name.
    """
    folder = folder.absolute()
    where = shlex.quote(str(folder))
    if count == 1:
        link = f'ln -sf {name}.pkl {where}/"$SLURM_JOB_ID"_submitted.pkl'
    else:
        own = '"$SLURM_ARRAY_JOB_ID"_"$SLURM_ARRAY_TASK_ID"'
        link = f'ln -sf {name}_"$SLURM_ARRAY_TASK_ID".pkl {where}/{own}_submitted.pkl'
    extra = {**parameters["additional_parameters"]}
    extra["comment"] = " ".join([*([str(extra["comment"])] if "comment" in extra else []), comment])
    given = {**parameters, "additional_parameters": extra, "setup": [*parameters.get("setup", []), link]}
    if count > 1:
        given["map_count"] = count
    return _script(given, ["-u", "-m", "submitit.core._submit", str(folder)], folder)


def sbatch_environment(cluster: Cluster) -> dict[str, str]:
    """The environment for sbatch, which hands it to the job: this process's own, and the secrets of the profile."""
    inherited = dict(os.environ)
    if "SLURM_JOB_ID" in inherited:
        inherited = {
            name: value for name, value in inherited.items() if name in _NOT_OF_A_JOB or not name.startswith(_OF_A_JOB)
        }
    return inherited | {name: value for name, value in cluster.environment.items() if is_secret(name)}


def _script(parameters: Mapping[str, Any], worker: Sequence[str], folder: Path) -> str:
    asked = {key: value for key, value in parameters.items() if key != "python"}
    command = f"{parameters['python']} {shlex.join(worker)}"
    return str(_make_sbatch_string(command=command, folder=folder, **asked))


def _python(options: SlurmOptions) -> str:
    """For a shell; read as one reads it and quoted again, so that nothing in it is run but the command."""
    return shlex.join(shlex.split(options.python) if options.python else [sys.executable])


def _gpus(cluster: Cluster) -> dict[str, Any]:
    options = cluster.slurm
    if cluster.gpu.device != "cuda" or options.gpu_request == "none":
        return {}
    asked = f"{options.gpu_type}:{cluster.gpus_per_node}" if options.gpu_type else f"{cluster.gpus_per_node}"
    return {"gres": f"gpu:{asked}"} if options.gpu_request == "gres" else {"gpus_per_node": asked}


def _memory(options: SlurmOptions) -> str | None:
    if options.mem_gib_per_node is None:
        return None
    return f"{options.mem_gib_per_node}G" if options.mem_gib_per_node else "0"


def _container(options: SlurmOptions) -> Sequence[str]:
    if options.container_image is None:
        return []
    words = [f"--container-image={options.container_image}"]
    if options.container_mounts:
        words.append(f"--container-mounts={','.join(options.container_mounts)}")
    if options.container_workdir is not None:
        words.append(f"--container-workdir={options.container_workdir}")
    return words


def _before(cluster: Cluster) -> list[str]:
    options = cluster.slurm
    # Without its modules a job would fail later, and not say why.
    modules = [f"module load {shlex.join(options.modules)} || exit 1"] if options.modules else []
    environment = [
        f"# {name} is a secret: it comes from the environment of sbatch"
        if is_secret(name)
        else f"export {name}={shlex.quote(value)}"
        for name, value in cluster.environment.items()
    ]
    return [*options.setup, *modules, *environment, *options.prolog]


def _after(options: SlurmOptions) -> list[str]:
    return ["hptool_status=$?", *options.epilog, "exit $hptool_status"] if options.epilog else []


def _extra(options: SlurmOptions) -> dict[str, Any]:
    extra: dict[str, Any] = {
        # submitit asks for USR2 before the limit, which a short job gets at its very start; SIGCONT to the batch
        # shell does nothing.
        "signal": options.signal or "B:CONT@1"
    }
    if not {"requeue", "no-requeue"} & options.extra_options.keys():
        # A run is repeated by hptool or not at all: a silent second copy would spoil the first one's files.
        extra["requeue" if options.requeue else "no-requeue"] = True
    return extra | {name: value for name, value in options.extra_options.items() if value is not False}
