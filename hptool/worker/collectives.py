"""Timed exchanges between ranks: what links carry, and what an empty message costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import distributed

from hptool.units import MIB

#: Repetitions: as many as move this many bytes, within limits. All ranks must count alike, so no clock is asked.
_MOVED_BYTES = {"cuda": 4096 * MIB, "cpu": 64 * MIB}
_FEWEST = 5
_MOST = 30

#: Bytes of messages, in the order of their importance: bandwidth, latency, and the bend between the two.
SIZES = {
    "cuda": (64 * MIB, 8192, 4 * MIB, 262_144, 256 * MIB),
    "cpu": (4 * MIB, 4096, 262_144, 32_768, 16 * MIB),
}

#: Exchanges of data, tensor and expert parallelism, and of pipelines, in the order of their importance.
KINDS = ("all_reduce", "reduce_scatter", "all_gather", "send", "all_to_all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """A group of ranks that all lie in one node, or each on a node of its own (`across`)."""

    group: distributed.ProcessGroup
    size: int
    across: bool


def groups(nodes: int, ranks_per_node: int) -> Sequence[Ranks]:
    """The groups of this rank that have more than one. To be called by all ranks at once."""
    own, found = distributed.get_rank(), []
    for across, members in (
        (False, [range(node * ranks_per_node, (node + 1) * ranks_per_node) for node in range(nodes)]),
        (True, [range(local, nodes * ranks_per_node, ranks_per_node) for local in range(ranks_per_node)]),
    ):
        for ranks in members:
            if len(ranks) > 1:
                group = distributed.new_group(list(ranks))
                if own in ranks:
                    found.append(Ranks(group=group, size=len(ranks), across=across))
    return found


def repetitions(size: int, device: torch.device) -> int:
    """How often an exchange of so many bytes is timed."""
    return max(_FEWEST, min(_MOST, _MOVED_BYTES[device.type] // size))


def exchange(kind: str, size: int, ranks: Ranks, device: torch.device) -> Callable[[], None] | None:
    """One exchange of messages of `size` bytes; None where this rank has no part in it.

    The size is that of the whole message: of what is reduced, of all that is gathered, of all that a rank sends out.
    """
    # Whole parts for each rank; fp32, as gradients are reduced.
    elements = max(1, size // 4 // ranks.size) * ranks.size
    whole = torch.randn(elements, device=device)
    part = torch.randn(elements // ranks.size, device=device)
    group = ranks.group
    if kind == "send":
        return _send(whole, ranks)
    runs: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: distributed.all_reduce(whole, group=group),
        "all_gather": lambda: distributed.all_gather_into_tensor(whole, part, group=group),
        "reduce_scatter": lambda: distributed.reduce_scatter_tensor(part, whole, group=group),
        "all_to_all": lambda: distributed.all_to_all_single(received, whole, group=group),
    }
    received = torch.empty_like(whole)
    run = runs[kind]

    def exchanged() -> None:
        run()
        if kind == "all_reduce":
            whole.mul_(1.0 / ranks.size)  # or repeated sums would overflow

    return exchanged


def _send(message: torch.Tensor, ranks: Ranks) -> Callable[[], None] | None:
    """Even ranks of the group send to the next odd ones; a last rank without a partner looks on."""
    place = distributed.get_rank(ranks.group)
    if place ^ 1 >= ranks.size:
        return None
    peer = distributed.get_global_rank(ranks.group, place ^ 1)
    move = distributed.isend if place % 2 == 0 else distributed.irecv

    def run() -> None:
        for work in distributed.batch_isend_irecv([distributed.P2POp(move, message, peer, ranks.group)]):
            work.wait()

    return run
