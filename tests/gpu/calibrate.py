"""The stage that calibrates the predictor on this device with `hptool calibrate`, and keeps what that writes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.gpu.command import Given, command
from tests.gpu.record import Record
from tests.gpu.runs import last_lines

#: What the calibration writes, in the stage's directory.
CALIBRATION = "calibrated.yaml"

#: What --help may take, imports included.
_HELP_S = 60.0

#: What `hptool calibrate` takes beyond the minutes that it is given: it starts, loads torch, fits and writes.
_AROUND_S = 25.0

#: Its own default, beyond which more hardly tells more; and the least that is tried.
_MOST_MINUTES, _LEAST_MINUTES = 3.0, 0.5

_SECONDS_PER_MINUTE = 60.0


def measure(given: Given, record: Record) -> None:
    """Calibrate once."""
    written = given.output / CALIBRATION
    if record.findings.get("outcome") == "ok" and (given.tiny or written.is_file()):
        return
    helped = subprocess.run(
        [sys.executable, "-m", "hptool", "calibrate", "--help"],
        capture_output=True,
        text=True,
        timeout=_HELP_S,
        check=False,
    )
    if helped.returncode != 0:
        record.find("outcome", "missing")
        record.leave("hptool has no command calibrate")
        return
    minutes = min(_MOST_MINUTES, max(_LEAST_MINUTES, (given.clock.left_s - _AROUND_S) / _SECONDS_PER_MINUTE))
    options = ["--output", str(written), "--json", "--device", given.device.kind, "--max-minutes", f"{minutes:.2f}"]
    if given.tiny:  # the command has tests of its own on a CPU; here it must have what it is called with
        unknown = [word for word in options if word.startswith("--") and word not in helped.stdout]
        record.find("outcome", "unknown options" if unknown else "ok")
        for word in unknown:
            record.complain(f"hptool calibrate has no {word}")
        return
    stdout, log = given.output / "calibrate.json", given.output / "calibrate.log"
    with stdout.open("wb") as out, log.open("wb") as errors:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "hptool", "calibrate", *options],
                stdout=out,
                stderr=errors,
                timeout=max(_AROUND_S, given.clock.left_s),
                check=False,
            )
        except subprocess.TimeoutExpired:
            record.find("outcome", "timeout")
            record.leave(f"calibrate, ended after {given.clock.seconds:.0f} s: {last_lines(log, 1)}")
            return
    if done.returncode != 0 or not written.is_file():
        record.find("outcome", "failed")
        record.complain(f"hptool calibrate: exit code {done.returncode}: {last_lines(log)}")
        return
    record.find("result", _result(stdout))
    record.find("outcome", "ok")


def _result(path: Path) -> Any:
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return json.loads(text)
    except ValueError:
        return text[-2000:]


main = command(measure)

if __name__ == "__main__":
    main()
