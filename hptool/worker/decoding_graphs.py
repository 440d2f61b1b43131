"""Decoding by CUDA graphs: one pass through a stage is recorded, and repeated for every token.

A graph does the same with the same memory each time, so where the token stands is a number on the device. What must
be known when it is recorded is how much of the cache a pass looks at: there is a graph for each number of blocks.
"""

from collections.abc import Callable
from typing import Any

import torch

from hptool.worker.cached_attention import Cache, Recorded

#: Places of the cache that a graph looks at more than the one before it: Megatron-core's blocks in its dynamic engine.
_BLOCK = 256

#: Passes before a recording: libraries choose their kernels and make their workspaces, which no recording may do.
_WARMUPS = 3


class DecodingGraphs:
    """Graphs of a stage's decoding pass, at the places `first` to `last` of the cache.

    Recording raises what torch raises where something in the pass cannot be recorded. The pass is given the place, [1]
    on the device, and what the stage gets.
    """

    def __init__(
        self,
        decode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        given: torch.Tensor,
        cache: Cache,
        *,
        first: int,
        last: int,
    ) -> None:
        self._given = given
        self._place = torch.tensor([first], device=given.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        pool = None
        # From the longest, so that the shorter ones fit into its memory.
        for blocks in range(last // _BLOCK, first // _BLOCK - 1, -1):
            cache.recorded = Recorded(place=self._place, reach=min((blocks + 1) * _BLOCK, cache.max_sequence_length))
            try:
                self._graphs[blocks] = _record(lambda: decode(self._place, self._given), pool)
            finally:
                cache.recorded = None
            pool = self._graphs[blocks][0].pool()

    def replay(self, place: int, given: torch.Tensor) -> torch.Tensor:
        """The pass at this place; its result is overwritten by the next one."""
        graph, found = self._graphs[place // _BLOCK]
        self._place.fill_(place)
        self._given.copy_(given)
        graph.replay()
        return found


def _record(run: Callable[[], torch.Tensor], pool: Any) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it so
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARMUPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        found = run()
    return graph, found
