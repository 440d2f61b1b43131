"""What hptool says when something is wrong, and the exit code it says it with.

    HptoolError              a message for the user; no traceback
    ├── InputError           2  a file, key, flag or directory is not what it must be
    ├── NoFeasibleLayout     3  every layout was ruled out before launch
    └── LaunchError          4  jobs could not be submitted, or none of them was measured
        └── BusyError        4  not now, but perhaps later

Anything else that escapes is a bug: it ends with a traceback and exit code 1.
"""

from collections.abc import Sequence
from typing import ClassVar


class HptoolError(Exception):
    """A message for the user. `exit_code` is what the command ends with."""

    exit_code: ClassVar[int] = 1


class InputError(HptoolError):
    """Input that cannot be used: each problem says where, what was given and what is allowed."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems: Sequence[str] = problems


class NoFeasibleLayout(HptoolError):  # noqa: N818 (what it is, not that it is an error)
    """No layout passes the static checks: the message counts the reasons and says what would help."""

    exit_code = 3


class LaunchError(HptoolError):
    """The scheduler refused the jobs, cannot be reached, or no run gave a measurement."""

    exit_code = 4


class BusyError(LaunchError):
    """The scheduler does not take a job now, but may later: its limit of jobs is reached, or it does not answer."""
