"""The stages of a search that are the same whatever it times: claim a directory, say the cost, measure, report."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from hptool import launch
from hptool.agenda import Agenda
from hptool.campaign import Work, measure
from hptool.cost import Dispatch, Estimate
from hptool.errors import LaunchError
from hptool.results import ResultsDirectory
from hptool.watch import Screen

#: Asks whether to go on; only where somebody can answer.
Confirm = Callable[[], bool]

#: What a search ends in.
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Venture(Generic[R]):
    """A search that is ready to begin in `directory`.

    `write` puts everything there that is known before the first job, and `conclude` makes the report, and writes it,
    of what came of it: why the search ended (None where nothing was launched), and what is to be noted.
    """

    directory: Path
    document: Mapping[str, Any]
    agenda: Agenda
    dispatch: Dispatch
    cost_lines: Sequence[str]
    resume: bool
    dry_run: bool
    write: Callable[[ResultsDirectory], None]
    conclude: Callable[[ResultsDirectory, str | None, Sequence[str]], R]


def conduct(venture: Venture[R], screen: Screen, confirm: Confirm) -> R:
    """Carry the search out, as far as is asked for; its report.

    Raises InputError where the directory is not its own, LaunchError where jobs cannot be started or files not be
    written; a failed run is no error but a row of the report.
    """
    cluster = venture.agenda.cluster
    launcher = launch.launcher(cluster, venture.directory / "jobs", venture.dispatch.submit)
    results = ResultsDirectory(venture.directory)
    try:
        results.begin(venture.document, resume=venture.resume)
        venture.write(results)
        for line in venture.cost_lines:
            screen.say(line)
        ended, notes = None, []
        if venture.dry_run:
            notes.append("Dry run: everything was written, nothing was launched.")
        elif cluster.scheduler == "slurm" and not confirm():
            notes.append("Everything was written, nothing was launched.")
        else:
            work = Work(dispatch=venture.dispatch, launcher=launcher, screen=screen)
            ended = measure(venture.agenda, results, work)
            screen.say(f"ended: {ended}")
        return venture.conclude(results, ended, notes)
    except OSError as error:
        raise LaunchError(
            f"{error.filename or venture.directory}: cannot be written: {error.strerror}. "
            "Make room there; what was measured is kept, and --resume goes on"
        ) from error
    finally:
        results.close()


def asked_lines(dispatch: Dispatch, estimate: Estimate) -> list[str]:
    """What a scheduler will be asked for, a line for each size of job."""
    lines = []
    for asked in estimate.asked:
        nodes = f"{asked.nodes} node{'s' if asked.nodes > 1 else ''} ({asked.gpus} GPUs)"
        if dispatch.submit == "packed":
            minutes = launch.lane_minutes(asked.minutes)
            wanted = f"an allocation of {nodes} for up to {minutes:.0f} minutes, given back when no run needs it"
        else:
            minutes = math.ceil(asked.minutes) + launch.SCHEDULER_MARGIN_MINUTES
            jobs = f"up to {asked.jobs} jobs, one for each timing," if asked.jobs > 1 else "a job"
            wanted = f"{jobs} of {nodes}, {minutes:.0f} minutes each at the limit"
        lines.append(f"the scheduler is asked for {wanted}")
    return lines
