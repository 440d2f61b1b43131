"""Slurm's commands: each with a time limit, deaf to the terminal, and with what its refusals mean."""

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Mapping

from hptool.errors import BusyError, LaunchError
from hptool.secrets import redact

#: How long a command may take. Slurm's own give up on a dead controller after 9 s and wait long for a busy one.
TIME_LIMIT_S = 30.0

#: Exit codes where Slurm's command gave none, as `timeout` and shells have them.
TIMED_OUT = 124
NOT_FOUND = 127

#: What Slurm 20 to 24 says of a controller, a network or a munge that may be back in a minute.
_AWAY = re.compile(
    r"unable to contact slurm controller|unable to establish controller|backup controller in standby|"
    r"temporarily unable to accept job|resource temporarily unavailable|"
    r"socket timed out|zero bytes were transmitted|connection (refused|timed out|reset)|"
    r"transport endpoint is not connected|unexpected message received|gave no answer in|"
    r"munge|protocol authentication error",
    re.IGNORECASE,
)

#: The limits of an association or a QOS, by name: one that holds how many jobs a user has, or what one may ask for.
_LIMIT = re.compile(r"\b(?:Assoc|QOS)[A-Z]\w+")

#: What every violated limit is called besides, and in old versions alone.
_SOME_LIMIT = "job submit limit"

#: Variables that change what Slurm's commands print, filter or ask.
_HABITS = ("SQUEUE_", "SACCT_", "SCANCEL_")


def slurm(*command: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a Slurm command; one that hangs is ended after TIME_LIMIT_S (exit code 124), a missing one gives 127.

    `environment` replaces that of this process.
    """
    given = os.environ if environment is None else environment
    env = {name: value for name, value in given.items() if not name.startswith(_HABITS)}
    try:
        # In a session of its own: a terminal's Ctrl-C is for hptool, and a wrapper script ends with what it started.
        process = subprocess.Popen(  # noqa: S603 (fixed programs; arguments are ids, and files that hptool wrote)
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=env,
            start_new_session=True,
        )
    except OSError as error:
        return subprocess.CompletedProcess(command, NOT_FOUND, "", f"{command[0]}: {error.strerror}")
    with process:
        try:
            out, err = process.communicate(timeout=TIME_LIMIT_S)
        except subprocess.TimeoutExpired as late:
            _kill(process)
            said = (late.stderr or b"").decode(errors="replace")  # bytes, whatever was asked for
            answer = f"{said}\n{command[0]} gave no answer in {TIME_LIMIT_S:g} s"
            return subprocess.CompletedProcess(command, TIMED_OUT, "", answer.strip())
        except BaseException:
            _kill(process)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _kill(process: subprocess.Popen[str]) -> None:
    """With what it has started; subprocess gives an interrupted command a moment, in which it may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def job_id_of(answer: subprocess.CompletedProcess[str]) -> str | None:
    """The id that `sbatch --parsable` printed, with the cluster's name behind it where a site has several."""
    ids = re.findall(r"^([0-9]+)(?:;.*)?$", answer.stdout, re.MULTILINE)
    return ids[-1] if ids and answer.returncode == 0 else None


def refusal(answer: subprocess.CompletedProcess[str], environment: Mapping[str, str], what: str = "") -> LaunchError:
    """What sbatch gave instead of an id, in Slurm's own words without secrets.

    BusyError where it may take the same later, or may have taken it now.
    """
    if answer.returncode == 0:
        return BusyError(f"sbatch gave no job id but {redact(answer.stdout.strip(), environment)!r}")
    said = redact(answer.stderr, environment)
    lines = [line.partition("sbatch: ")[2] for line in said.splitlines() if "sbatch: " in line]
    if answer.returncode == TIMED_OUT or not lines:
        lines.append(last_line(said))
    kind = BusyError if _is_away(said) or is_over_limit(said) else LaunchError
    words = "\n".join(dict.fromkeys(lines))
    return kind(f"sbatch refused{f' {what}' if what else ''}: {words}")


def _is_away(text: str) -> bool:
    """Slurm could not be asked; whatever was asked for may have been done all the same."""
    return _AWAY.search(text) is not None


def is_over_limit(text: str) -> bool:
    """The user has as many jobs as the site allows; no limit on what a single job may be."""
    named = _LIMIT.findall(text)
    return any("Submit" in name for name in named) if named else _SOME_LIMIT in text


def last_line(text: str) -> str:
    """Where commands say what went wrong."""
    return (text.strip().splitlines() or ["no message"])[-1]
