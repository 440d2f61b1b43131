"""Which node of the job this is, what its ranks are called, and where they meet."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from hptool.errors import InputError

#: Above the ports of services and mostly below those that the kernel hands out.
_FIRST_PORT = 20_000
_PORTS = 40_000

#: Steps of one job get ports far apart; jobs, whose ids follow each other, get neighbouring ones.
_PORTS_PER_STEP = 1009


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node of the job. `port` is 0 on a lone node, where a free one is found by listening."""

    index: int
    count: int
    first_host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where the ranks find each other. `listener` is the socket that rank 0 is to use, inherited by all of the node."""

    host: str
    port: int
    listener: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which rank this is, where it writes, and what it may have.

    It meets the others at `meeting`, or where torchrun's environment says. `memory_gib` is a hard limit for CPU ranks.
    """

    rank: int
    local_rank: int
    world_size: int
    directory: Path
    log: Path | None = None
    meeting: Meeting | None = None
    memory_gib: float | None = None


def this_node(num_nodes: int) -> Node:
    """Where this node stands. More than one node needs Slurm; InputError where it is not there or does not fit."""
    if num_nodes == 1:
        return Node(index=0, count=1, first_host="127.0.0.1", port=0)
    missing = [name for name in ("SLURM_JOB_ID", "SLURM_NODEID", "SLURM_JOB_NODELIST") if name not in os.environ]
    if missing:
        raise InputError(
            f"trainer.num_nodes: {num_nodes} given, allowed is 1 outside of Slurm ({', '.join(missing)} not set); "
            "start one task a node with: srun --ntasks-per-node=1 --kill-on-bad-exit=1"
        )
    from submitit.slurm.slurm import SlurmJobEnvironment  # noqa: PLC0415 (several nodes only)

    slurm = SlurmJobEnvironment()
    if slurm.num_nodes != num_nodes:
        raise InputError(f"trainer.num_nodes: {num_nodes} given, allowed is the {slurm.num_nodes} of this Slurm job")
    step = int(os.environ.get("SLURM_STEP_ID", "0"))
    port = _FIRST_PORT + (int(os.environ["SLURM_JOB_ID"]) + _PORTS_PER_STEP * step) % _PORTS
    return Node(index=slurm.node, count=num_nodes, first_host=slurm.hostnames[0], port=port)


def listen() -> socket.socket:
    """A free port of the loopback, held open: rank 0 inherits the socket, so nobody can take the port in between."""
    return socket.create_server(("127.0.0.1", 0), backlog=1024)
