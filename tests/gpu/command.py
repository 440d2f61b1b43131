"""The command line that all stages have: `python -m MODULE --output DIR [--device cuda|cpu] [--seconds N] [--tiny]`."""

import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from tests.gpu import device as devices
from tests.gpu.device import Device
from tests.gpu.record import Clock, Record

#: How long a driver may take to say what the device is.
DETECTION_S = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a stage is given: where its files go, the device, its time, and whether it is only tried."""

    output: Path
    device: Device
    clock: Clock
    tiny: bool


def detect(path: Path, kind: str) -> Device | None:
    """The device, which a process of its own writes to `path`; None where there is none, and the reason is printed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.gpu.device", str(path), kind]
    try:
        subprocess.run(command, timeout=DETECTION_S, check=False)
    except subprocess.TimeoutExpired:
        click.echo(f"the device did not answer for {DETECTION_S:g} s", err=True)
    return devices.read(path) if path.is_file() else None


def command(measure: Callable[[Given, Record], None]) -> click.Command:
    """The command of a stage whose work is `measure`; its exit code is the record's."""

    @click.command(help=measure.__doc__)
    @click.option("--output", type=click.Path(path_type=Path), required=True, help="Where record.json and logs go.")
    @click.option("--device", "kind", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
    @click.option("--device-file", type=click.Path(path_type=Path), help="What an earlier detection wrote.")
    @click.option("--seconds", type=float, default=600.0, show_default=True, help="Begin nothing that takes longer.")
    @click.option("--tiny", is_flag=True, help="Toy models: whether it works, and not how fast.")
    def main(output: Path, kind: str, device_file: Path | None, seconds: float, tiny: bool) -> None:  # noqa: FBT001 (click passes by name)
        clock, output = Clock(seconds=seconds), output.absolute()
        found = devices.read(device_file) if device_file else detect(output / "device.json", kind)
        if found is None:
            sys.exit(1)
        record = Record(output)
        try:
            measure(Given(output=output, device=found, clock=clock, tiny=tiny), record)
        except Exception as error:  # noqa: BLE001 (whatever it is, what was found before it counts)
            traceback.print_exc()
            record.complain(f"{type(error).__name__}: {error}"[:500])
        for line in record.problems:
            click.echo(f"problem: {line}")
        for line in record.left:
            click.echo(f"left for the next call: {line}")
        sys.exit(record.exit_code)

    return main
