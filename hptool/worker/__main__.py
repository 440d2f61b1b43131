"""`python -m hptool.worker CONFIG.yaml`: trains from a NeMo-Megatron config as it stands, and measures it.

Where a `serving.json` (`hptool.serving_orders`) lies beside the config, the model is served instead.

Under torchrun (RANK and WORLD_SIZE are set) this is one rank. Otherwise it is the node's supervisor and starts
`trainer.devices` ranks; with several nodes, start one task a node with srun.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import click

from hptool import files
from hptool.base_config import BaseConfig
from hptool.errors import HptoolError, InputError
from hptool.measurement import Measurement
from hptool.serving_orders import ServingOrders
from hptool.worker import full_training, outcome, served, supervisor
from hptool.worker.nodes import Place, this_node
from hptool.worker.orders import Orders, minutes_of
from hptool.worker.processes import Heartbeats
from hptool.worker.refusals import refuse_impossible, refuse_unservable

#: How often a training says how far it is.
_TELL_S = 5.0

#: And what of it, by what it does.
_TOLD = {
    "training": "step {step} of {of}: loss {loss:.4f}, {tokens_per_s:,.0f} tokens/s",
    "serving": "point {step} of {of}: {tokens_per_s:,.0f} tokens/s",
}


@click.command()
@click.argument("config_path", metavar="CONFIG.yaml")
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option(
    "--output",
    default=".",
    metavar="DIR",
    help="Where measurement.json or failure-rankN.json and the ranks' logs go.  [default: here]",
)
@click.option(
    "--orders",
    metavar="FILE.json",
    help="Train for real as it says, from the newest checkpoint in the output directory; hptool train writes it.",
)
def main(config_path: str, overrides: tuple[str, ...], output: str, orders: str | None) -> None:
    """Train from CONFIG.yaml (NeMo-Megatron's keys) on this node's devices, and time it.

    With a serving.json beside CONFIG.yaml, serve the model instead, and time its points.
    """
    try:
        document = files.apply_overrides(files.read_config_yaml(Path(config_path)), overrides, config_path)
        config = files.parse(document, BaseConfig, config_path)
        given = files.read(Path(orders), Orders) if orders else None
        serving = served.read_orders(Path(config_path)) if given is None else None
        if serving is None:
            refuse_impossible(config, config_path)
        else:
            refuse_unservable(config, serving, config_path)
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            code = _run_as_one_rank(config, Path(output), given, serving)
        elif given is not None:
            full_training.run(Path(output), config, given, lambda message: click.echo(message, err=True))
            code = 0
        else:
            code = _supervise(config, config_path, Path(output))
    except HptoolError as error:
        click.echo(error, err=True)
        code = error.exit_code
    sys.exit(code)


def _supervise(config: BaseConfig, config_path: str, directory: Path) -> int:
    node = this_node(config.trainer.num_nodes)
    max_minutes = minutes_of(config.trainer.max_time)
    job = supervisor.NodeJob(config_path=config_path, run_directory=str(directory), max_minutes=max_minutes)
    serving = supervisor.serving_of(job)
    if serving is None or serving.engine == "megatron":
        click.echo(
            f"{config.trainer.devices} ranks on this node; their logs: {(directory / 'logs').absolute()}", err=True
        )
    if node.index == 0 and serving is None and not config.model.data.data_prefix:
        click.echo("training on synthetic tokens: model.data.data_prefix names no .bin/.idx set", err=True)
    try:
        supervisor.run_ranks(config, job, node, _Teller(directory) if node.index == 0 else lambda: None)
    except supervisor.RunFailedError as failure:
        click.echo(failure, err=True)
        return 1
    except SystemExit as end:
        click.echo(f"ended by {signal.Signals(int(end.code or 0) - 128).name}", err=True)
        raise
    if node.index == 0 and serving is not None:
        found = served.read(directory)
        click.echo(served.summary(found) if found is not None else "no point was measured")
    elif node.index == 0:
        path = directory / outcome.MEASUREMENT
        measured = files.parse_json(files.read_text(path), Measurement, str(path))
        click.echo(
            f"{path}: {measured.step_time_s:.4g} s a step, {measured.tokens_per_s_per_gpu:,.0f} tokens/s a GPU, "
            f"{measured.peak_memory_gib:.2f} GiB {measured.memory_kind}"
        )
    return 0


class _Teller:
    """Says every few seconds how far the run is."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / outcome.PROGRESS
        self._last = (0.0, "")

    def __call__(self) -> None:
        told_at, text = self._last
        if time.monotonic() - told_at < _TELL_S or not self._path.exists():
            return
        progress = json.loads(files.read_text(self._path))
        line = _TOLD["training" if "loss" in progress else "serving"].format(**progress)
        self._last = (time.monotonic(), line)
        if line != text:
            click.echo(line, err=True)


def _run_as_one_rank(config: BaseConfig, directory: Path, orders: Orders | None, serving: ServingOrders | None) -> int:
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size != config.gpus:
        raise InputError(
            f"WORLD_SIZE: {world_size} given, allowed is trainer.num_nodes · trainer.devices ({config.gpus})"
        )
    if serving is not None and serving.engine == "command":
        raise InputError("serving.json: engine: command given, which is no rank's: start it without torchrun")
    run_rank = supervisor.load_framework(config.trainer.accelerator, orders, serving)
    place = Place(
        rank=int(os.environ["RANK"]),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        world_size=world_size,
        directory=directory,
    )
    directory.mkdir(parents=True, exist_ok=True)
    if place.rank == 0:
        served.clear(directory)
    return run_rank(config, place, Heartbeats(place.local_rank + 1))


if __name__ == "__main__":
    main(prog_name="python -m hptool.worker")
