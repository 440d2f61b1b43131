"""Timed operations of a device, for `hptool calibrate`: what predictions multiply the data sheet with.

All ranks measure at once, as they train: a core or a GPU is slower while its neighbours work. Each operation is timed
several times on inputs in turn, so that no cache holds them, and stands for its median over repetitions and ranks. They
are taken in the order of their importance until the time is over. The same code times a CPU and a GPU.

`python -m hptool.worker.microbenchmarks` prints what devices torch sees.
"""

import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hptool import files
from hptool.base_config import BaseConfig
from hptool.facts import MeasuredPoint
from hptool.predict import curves
from hptool.predict.curves import Benchmarks
from hptool.units import GIB, MIB
from hptool.worker import collectives, outcome
from hptool.worker.nodes import Place
from hptool.worker.orders import RESULT
from hptool.worker.processes import Heartbeats

#: An operation is timed for so long, within limits of repetitions.
_POINT_S = {"cuda": 0.25, "cpu": 0.6}
_FEWEST, _MOST = 3, 40

#: Calls that make up one repetition last so long at least, or the timer would be measured.
_REPETITION_S = 2e-4
_MOST_CALLS = 200

#: A layer is timed for so many times as long.
_LAYER_PATIENCE = 4

#: Random numbers from which inputs are cut, more than the caches hold (H100: 50 MiB; a core's share of a server's L3:
#: some 32 MiB), and in how many places.
_POOL_BYTES = {"cuda": 1024 * MIB, "cpu": 96 * MIB}
_MOST_SETS = 64

#: Before small operations on a GPU: a product of matrices of this size keeps it busy for a millisecond, in which the
#: host gets ahead. Else the host would be timed.
_PLUG = 8192

#: What is copied to find the bandwidth of memory.
_COPY_BYTES = {"cuda": 256 * MIB, "cpu": 32 * MIB}

#: Layers so small that their time is the host's: 64 wide, 16 tokens, so many of them.
_TINY = {"hidden": 64, "ffn": 256, "heads": 4, "length": 16, "batch": 1}
_TINY_DEPTHS = (2, 6)
_LAYER_DEPTHS = (1, 3)

#: Microbatches that one timing of layers runs: on a GPU several, of which the host launches the later ones ahead.
_MICROBATCHES = {"cuda": 4, "cpu": 1}

#: Layers whose GEMMs and whose attention are timed too. On a GPU many tokens and a small width first: there what is no
#: GEMM takes the largest part. On a CPU the sizes of what is trained there, for demonstrations and tests: beyond a
#: megabyte a tensor's memory comes fresh from the kernel each time, which takes longer than to fill it.
_LAYERS = {
    "cuda": (
        {"hidden": 1024, "ffn": 4096, "heads": 16, "length": 2048, "batch": 8},
        {"hidden": 2048, "ffn": 8192, "heads": 16, "length": 4096, "batch": 2},
    ),
    "cpu": (
        {"hidden": 128, "ffn": 512, "heads": 4, "length": 128, "batch": 2},
        {"hidden": 256, "ffn": 1024, "heads": 4, "length": 256, "batch": 1},
        {"hidden": 128, "ffn": 512, "heads": 4, "length": 128, "batch": 1},
    ),
}

#: Linear layers beyond those: tokens, width in, width out. Wide, narrow (as tensor parallelism cuts them), few tokens.
_LINEAR = {
    "cuda": (
        (8192, 4096, 16384),
        (2048, 4096, 512),
        (512, 2048, 2048),
        (4096, 8192, 1024),
    ),
    "cpu": ((512, 512, 512), (128, 1024, 64), (512, 512, 2048), (1024, 1024, 1024)),
}

#: Attention: lengths in the order of their importance, and what stays the same over them: tokens at least, and the
#: width of all heads.
_LENGTHS = (2048, 512, 4096, 1024, 8192)
_HEAD_SIZES = (128, 64)
_ATTENTION_TOKENS = {"cuda": 16384, "cpu": 512}
_ATTENTION_WIDTH = {"cuda": 2048, "cpu": 128}

#: Which of a linear layer's GEMMs, as `curves.linear_gemms` counts them.
_FORWARD, _BY_WEIGHTS = 0, 2

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Median seconds of one call, and half the range between the quartiles over it."""

    seconds: float
    spread: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """What is to be timed, and how: `run` prepares it and times it. NaN seconds where this rank has no part in it."""

    kind: str
    sizes: Mapping[str, int]
    run: Callable[[], Timing]


# ---------------------------------------------------------------- the clock


class Clock:
    """Times calls on one device; seconds of the device's own clock on a GPU.

    After the deadline (of time.monotonic) an operation is repeated no more than it has to be.
    """

    def __init__(self, device: torch.device, deadline: float = math.inf) -> None:
        self.device = device
        self._deadline = deadline
        self._plug: torch.Tensor | None = None

    def time(self, run: Callable[[int], object]) -> Timing:
        """Of `run(i)`, with i counting up: so that it takes other inputs each time."""
        run(0)  # whatever is compiled or allocated once
        guess = max(1e-7, self.wall(lambda: run(1)))
        calls = max(1, min(_MOST_CALLS, math.ceil(_REPETITION_S / guess)))

        def several(i: int) -> float:
            return self.behind(lambda: [run(i * calls + j) for j in range(calls)]) / calls

        return self.repeat(several, guess * calls)

    def repeat(self, measure: Callable[[int], float], guess_s: float) -> Timing:
        """Of `measure(i)`, with i counting up, which takes about `guess_s` each time."""
        wanted = max(_FEWEST, min(_MOST, math.ceil(_POINT_S[self.device.type] / guess_s)))
        taken: list[float] = []
        while len(taken) < wanted and (len(taken) < _FEWEST or time.monotonic() < self._deadline):
            taken.append(measure(len(taken)))
        return timing_of(taken)

    def wall(self, run: Callable[[], object]) -> float:
        """Seconds from its call to the end of all that it started, on the host's clock."""
        self.synchronise()
        begin = time.perf_counter()
        run()
        self.synchronise()
        return time.perf_counter() - begin

    def span(self, run: Callable[[], object]) -> float:
        """Seconds that `run` takes of the device, behind whatever was started before."""
        if self.device.type == "cpu":
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch has no types here
        begun.record()
        run()
        ended.record()
        ended.synchronize()
        return float(begun.elapsed_time(ended)) / 1000

    def behind(self, run: Callable[[], object]) -> float:
        """As `span`, with the host ahead: a GPU has something else to do first."""
        self.synchronise()
        self.occupy()
        return self.span(run)

    def synchronise(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def occupy(self) -> None:
        """Gives a GPU something to do."""
        if self.device.type == "cuda":
            if self._plug is None:
                self._plug = torch.randn(_PLUG, _PLUG, device=self.device, dtype=torch.bfloat16)
            self._plug @ self._plug


def timing_of(taken: Sequence[float]) -> Timing:
    """Of several repetitions; two at least."""
    low, middle, high = statistics.quantiles(taken, n=4)
    return Timing(seconds=statistics.median(taken), spread=(high - low) / 2 / middle if middle > 0 else 0.0)


# ---------------------------------------------------------------- inputs


class Pool:
    """Random numbers in one precision, from which inputs are cut; neighbouring sets of inputs share none."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._numbers = torch.randn(_POOL_BYTES[device.type] // dtype.itemsize, device=device).to(dtype)

    def sets(self, *shapes: Sequence[int]) -> Sequence[Sequence[torch.Tensor]]:
        """So many sets of tensors of these shapes as there is room for, up to a limit."""
        each = [math.prod(shape) for shape in shapes]
        if sum(each) > self._numbers.numel():
            device, dtype = self._numbers.device, self._numbers.dtype
            return [[torch.randn(*shape, device=device).to(dtype) for shape in shapes]]
        found: list[Sequence[torch.Tensor]] = []
        start = 0
        while len(found) < _MOST_SETS and start + sum(each) <= self._numbers.numel():
            tensors = []
            for shape, count in zip(shapes, each, strict=True):
                tensors.append(self._numbers[start : start + count].view(*shape))
                start += count
            found.append(tensors)
        return found


# ---------------------------------------------------------------- operations


class Operations:
    """All that is timed on one rank, in the order of importance."""

    def __init__(self, config: BaseConfig, device: torch.device, clock: Clock) -> None:
        self._config = config
        self._device = device
        self._clock = clock
        self._dtype = _DTYPES[config.precision]
        self._pool = Pool(device, self._dtype)

    def in_order(self, ranks: Sequence[collectives.Ranks]) -> Iterator[Operation]:
        """What the fits cannot do without, and then what makes them better.

        The host's time, on which small models hang alone, is taken again in between: neighbours come and go.
        """
        kind = self._device.type
        layers = _LAYERS[kind]
        tiny = self._tiny_layer()
        yield self._copy(_COPY_BYTES[kind])
        yield tiny
        yield from self._layer_and_parts(layers[0])
        for size in collectives.SIZES[kind][:2]:
            yield from self._exchanges(size, ranks)
        yield from self._attentions(_LENGTHS[:2])
        yield tiny
        for sizes in layers[1:]:
            yield from self._layer_and_parts(sizes)
        for size in collectives.SIZES[kind][2:]:
            yield from self._exchanges(size, ranks)
        for tokens, width_in, width_out in _LINEAR[kind]:
            for gemm in curves.linear_gemms(tokens, width_in, width_out):
                yield self._gemm(gemm)
        yield tiny
        yield from self._attentions(_LENGTHS[2:])

    def _layer_and_parts(self, sizes: Mapping[str, int]) -> Iterator[Operation]:
        hidden, ffn, tokens = sizes["hidden"], sizes["ffn"], sizes["batch"] * sizes["length"]
        yield self._layer_rest(sizes)
        for gemm in curves.layer_gemms(hidden, ffn, tokens):
            yield self._gemm(gemm)
        yield self._attention(sizes["batch"], sizes["length"], sizes["heads"], hidden // sizes["heads"], causal=True)
        for kernel in curves.KERNELS:
            yield self._kernel(kernel, tokens, ffn if kernel == "activation" else hidden)

    def _attentions(self, lengths: Sequence[int]) -> Iterator[Operation]:
        tokens, width = _ATTENTION_TOKENS[self._device.type], _ATTENTION_WIDTH[self._device.type]
        for length in lengths:
            for causal in (True, False):
                for head_size in _HEAD_SIZES:
                    batch = max(1, tokens // length)
                    yield self._attention(batch, length, width // head_size, head_size, causal=causal)

    def _exchanges(self, size: int, ranks: Sequence[collectives.Ranks]) -> Iterator[Operation]:
        for each in ranks:
            for kind in collectives.KINDS:
                sizes = {"bytes": size, "ranks": each.size, "across": int(each.across)}
                yield Operation(kind=kind, sizes=sizes, run=partial(self._exchange, kind, size, each))

    def _copy(self, size: int) -> Operation:
        def run() -> Timing:
            count = size // 4
            sources = [torch.randn(count, device=self._device) for _ in range(2)]
            target = torch.empty(count, device=self._device)
            return self._clock.time(lambda i: target.copy_(sources[i % 2]))

        return Operation(kind=curves.COPY, sizes={"bytes": size}, run=run)

    def _gemm(self, sizes: Mapping[str, int]) -> Operation:
        return Operation(kind=curves.GEMM, sizes=sizes, run=lambda: self._clock.time(self._multiply(sizes)))

    def _multiply(self, sizes: Mapping[str, int]) -> Callable[[int], object]:
        """As a linear layer computes it: its weights lie as [out, in], so each pass transposes another operand."""
        rows, columns, depth = sizes["rows"], sizes["columns"], sizes["depth"]
        is_forward, is_by_weights = sizes["pass"] == _FORWARD, sizes["pass"] == _BY_WEIGHTS
        sets = self._pool.sets(
            (depth, rows) if is_by_weights else (rows, depth), (columns, depth) if is_forward else (depth, columns)
        )

        def multiply(i: int) -> torch.Tensor:
            a, b = sets[i % len(sets)]
            return torch.matmul(a.t() if is_by_weights else a, b.t() if is_forward else b)

        return multiply

    def _attention(self, batch: int, length: int, heads: int, head_size: int, *, causal: bool) -> Operation:
        sizes = {"batch": batch, "length": length, "heads": heads, "head_size": head_size, "causal": int(causal)}
        return Operation(kind=curves.ATTENTION, sizes=sizes, run=lambda: self._clock.time(self._attend(sizes)))

    def _attend(self, sizes: Mapping[str, int]) -> Callable[[int], object]:
        """Forward and backward, of queries, keys and values that lie as the worker's do: [length, batch, heads, d]."""
        from hptool.worker.attention import fused_attention  # noqa: PLC0415 (Megatron takes seconds)

        shape = [sizes[name] for name in ("length", "batch", "heads", "head_size")]
        sets = self._pool.sets(*[shape] * 4)

        def attend(i: int) -> None:
            *inputs, gradient = sets[i % len(sets)]
            leaves = [x.detach().requires_grad_() for x in inputs]
            query, key, value = (x.permute(1, 2, 0, 3) for x in leaves)
            scale = 1 / math.sqrt(sizes["head_size"])
            context = fused_attention(
                query, key, value, causal=bool(sizes["causal"]), bias=None, dropout=0.0, scale=scale
            )
            torch.autograd.grad(context, leaves, gradient.permute(1, 2, 0, 3))

        return attend

    def _kernel(self, kernel: str, tokens: int, width: int) -> Operation:
        """Forward and backward of one kernel of a layer, as Megatron's fusions make it."""

        def run() -> Timing:
            compute = self._kernel_of(kernel, width)
            sets = self._pool.sets(*[(tokens, 1, width)] * 3)
            bias = torch.randn(width, device=self._device).to(self._dtype).requires_grad_()

            def both(i: int) -> None:
                x, other, gradient = sets[i % len(sets)]
                leaf = x.detach().requires_grad_()
                torch.autograd.grad(compute(leaf, bias, other), leaf, gradient)

            return self._clock.time(both)

        return Operation(kind=kernel, sizes={"tokens": tokens, "width": width}, run=run)

    def _kernel_of(self, kernel: str, width: int) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        # Here and not above, because importing Megatron takes seconds.
        from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # noqa: PLC0415
        from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl  # noqa: PLC0415

        stack = self._config.stack
        if kernel == "norm":
            norm = torch.nn.LayerNorm(width, dtype=self._dtype, device=self._device)
            return lambda x, bias, other: norm(x)  # noqa: ARG005 (as the others)
        if kernel == "activation":
            if stack.bias_activation_fusion:
                return lambda x, bias, other: bias_gelu_impl(x, bias)  # noqa: ARG005
            return lambda x, bias, other: torch.nn.functional.gelu(x + bias)  # noqa: ARG005
        add = get_bias_dropout_add(True, stack.bias_dropout_add_fusion)  # noqa: FBT003 (Megatron's signature)
        return lambda x, bias, other: add((x, bias), other, stack.hidden_dropout)

    def _tiny_layer(self) -> Operation:
        """Forward and backward of one layer that is all host."""

        def run() -> Timing:
            layer, guess_s = self._layer(_TINY, _TINY_DEPTHS, drops_scores=True)
            return self._clock.repeat(lambda _: layer(), guess_s / _LAYER_PATIENCE)

        return Operation(kind=curves.TINY_LAYER, sizes=_TINY, run=run)

    def _layer_rest(self, sizes: Mapping[str, int]) -> Operation:
        """What one layer takes, forward and backward, beside its GEMMs and its attention, timed next to it."""
        hidden, tokens = sizes["hidden"], sizes["batch"] * sizes["length"]
        causal = {**sizes, "head_size": hidden // sizes["heads"], "causal": 1}

        def run() -> Timing:
            parts = [self._multiply(gemm) for gemm in curves.layer_gemms(hidden, sizes["ffn"], tokens)]
            parts.append(self._attend(causal))

            def all_parts(i: int) -> None:
                for part in parts:
                    part(i)

            self._clock.wall(lambda: all_parts(0))
            layer, guess_s = self._layer(sizes, _LAYER_DEPTHS, drops_scores=False)
            return self._clock.repeat(
                lambda i: layer() - self._clock.behind(lambda: all_parts(i)), guess_s / _LAYER_PATIENCE
            )

        return Operation(kind=curves.LAYER_REST, sizes=sizes, run=run)

    def _layer(
        self, sizes: Mapping[str, int], depths: tuple[int, int], *, drops_scores: bool
    ) -> tuple[Callable[[], float], float]:
        """What gives seconds of one of the worker's own layers, and about how long that takes.

        Models of two depths by turns, so that a change of the clock rate or of a neighbour meets both, and the
        difference. Ranks work for themselves: gradients are added up and not reduced.
        """
        small, large = (self._model(sizes, depth, drops_scores=drops_scores) for depth in depths)
        guess_s = 0.0
        for _ in range(2):  # compiles, and allocates
            guess_s = self._clock.wall(small) + self._clock.wall(large)
        layers = (depths[1] - depths[0]) * _MICROBATCHES[self._device.type]
        return lambda: (self._clock.wall(large) - self._clock.wall(small)) / layers, guess_s

    def _model(self, sizes: Mapping[str, int], depth: int, *, drops_scores: bool) -> Callable[[], None]:
        """A model of so many layers; what it answers runs some microbatches forward and backward."""
        # Here and not above, because importing Megatron takes seconds.
        from hptool.worker import batches, data  # noqa: PLC0415
        from hptool.worker.training import Training  # noqa: PLC0415

        config = _with_model(self._config, sizes, depth, drops_scores=drops_scores)
        training = Training(config, self._device, beat=lambda: None)
        chunk = training.chunks[0]
        microbatch = batches.microbatches(config, data.samples_of(config), 0, self._device)[0]

        def run() -> None:
            with chunk.no_sync():
                for _ in range(_MICROBATCHES[self._device.type]):
                    output, loss_of = training.forward(iter([microbatch]), chunk)
                    loss, _ = loss_of(output)
                    loss.backward()  # type: ignore[no-untyped-call]  # as above

        return run

    def _exchange(self, kind: str, size: int, ranks: collectives.Ranks) -> Timing:
        """As in a training, where ranks compute before they meet: waiting for the last one is part of it.

        The mean over the ranks of what each waited and sent is what the exchange adds to their time.
        """
        run = collectives.exchange(kind, size, ranks, self._device)
        width = 512 if self._device.type == "cpu" else 2048
        work = torch.randn(width, width, device=self._device, dtype=self._dtype)
        taken = []
        for _ in range(collectives.repetitions(size, self._device) + 2):
            work @ work
            if run is not None:
                taken.append(self._clock.span(run))
        return timing_of(taken[2:]) if taken else Timing(seconds=math.nan, spread=0.0)


def _with_model(config: BaseConfig, sizes: Mapping[str, int], depth: int, *, drops_scores: bool) -> BaseConfig:
    """The config with a model of these sizes. Without dropout of scores its attention is the one that is timed."""
    words = {
        "num_layers": depth,
        "hidden_size": sizes["hidden"],
        "ffn_hidden_size": sizes["ffn"],
        "num_attention_heads": sizes["heads"],
        "encoder_seq_length": sizes["length"],
        "max_position_embeddings": sizes["length"],
        "data.seq_length": sizes["length"],
        "micro_batch_size": sizes["batch"],
        "global_batch_size": sizes["batch"] * config.gpus,
    } | ({} if drops_scores else {"attention_dropout": 0.0})
    overrides = [f"model.{key}={value}" for key, value in words.items()]
    return files.parse(files.apply_overrides(config.document(), overrides, "calibration"), BaseConfig, "calibration")


# ---------------------------------------------------------------- a rank


def measure_rank(budget_s: float, config: BaseConfig, place: Place, heartbeats: Heartbeats) -> int:
    """Measures for so many seconds from the start of the node's supervisor; answers the exit code of the process.

    Rank 0 leaves `Benchmarks` in result.json, and progress.json while it is at work.
    """
    from hptool.worker.rank import attempt  # noqa: PLC0415 (Megatron takes seconds)

    return attempt(lambda: _measure(budget_s, config, place, heartbeats), place)


def _measure(budget_s: float, config: BaseConfig, place: Place, heartbeats: Heartbeats) -> None:
    from hptool.worker.rank import device_name, join, versions_of  # noqa: PLC0415 (as above)

    device = join(config, place)
    nodes, per_node = config.trainer.num_nodes, config.trainer.devices
    deadline = heartbeats.started + budget_s
    operations = Operations(config, device, Clock(device, deadline))
    planned = list(operations.in_order(collectives.groups(nodes, per_node)))
    points, left_out = [], []
    for i, operation in enumerate(planned):
        if not _agree(time.monotonic() < deadline, device):
            left_out.append(_name(operation))
            continue
        if place.rank == 0:
            _tell(place.directory, i, len(planned), operation.kind)
        seconds, spread = _over_ranks(_attempt(operation), operation.kind in collectives.KINDS, device)
        if 0 < seconds < math.inf:
            points.append(
                MeasuredPoint(kind=operation.kind, sizes=operation.sizes, time_us=seconds * 1e6, spread=spread)
            )
        else:
            left_out.append(_name(operation))
    if place.rank == 0:
        properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
        found = Benchmarks(
            device=device_name(device),
            multiprocessors=properties.multi_processor_count if properties else None,
            memory_gib=properties.total_memory / GIB if properties else None,
            versions=versions_of(device),
            took_s=time.monotonic() - heartbeats.started,
            nodes=nodes,
            gpus_per_node=per_node,
            precision=config.precision,
            points=tuple(points),
            left_out=tuple(left_out),
        )
        files.write_text(place.directory / RESULT, files.json_text(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _attempt(operation: Operation) -> Timing:
    """NaN for what does not fit into this device, which is left out."""
    try:
        return operation.run()
    except torch.OutOfMemoryError:
        if operation.kind in collectives.KINDS:
            raise  # the others wait for this rank
        return Timing(seconds=math.nan, spread=0.0)
    finally:
        # Models hold themselves by their hooks. What was compiled for their shapes would count towards the compiler's
        # limit of versions of one function.
        gc.collect()
        torch.compiler.reset()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # as above
            torch.cuda.empty_cache()


def _over_ranks(timing: Timing, is_exchange: bool, device: torch.device) -> tuple[float, float]:  # noqa: FBT001 (ours)
    """Seconds and spread of all ranks that took part: the mean of exchanges, and of what each did alone the median."""
    own = torch.tensor([timing.seconds, timing.spread], dtype=torch.float64, device=device)
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, own)
    taken = [part.tolist() for part in parts if not bool(part[0].isnan())]
    if not taken:
        return math.nan, 0.0
    middle = statistics.fmean if is_exchange else statistics.median
    return middle([seconds for seconds, _ in taken]), statistics.median([spread for _, spread in taken])


def _agree(goes_on: bool, device: torch.device) -> bool:  # noqa: FBT001 (the question)
    """What rank 0 says: all must measure the same."""
    word = torch.tensor([int(goes_on)], device=device)
    torch.distributed.broadcast(word, src=0)
    return bool(word.item())


def _name(operation: Operation) -> str:
    return f"{operation.kind} {', '.join(f'{key} {value}' for key, value in operation.sizes.items())}"


def _tell(directory: Path, done: int, of: int, what: str) -> None:
    """For those who watch; nobody waits for it."""
    aside = directory / f".{outcome.PROGRESS}"
    with suppress(OSError):
        aside.write_text(json.dumps({"done": done, "of": of, "what": what}), encoding="utf-8")
        aside.replace(directory / outcome.PROGRESS)


def devices() -> Sequence[Mapping[str, Any]]:
    """The CUDA devices that torch sees here: name, multiprocessors, memory."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [torch.cuda.get_device_properties(i) for i in range(count)]
    return [
        {"name": p.name, "multiprocessors": p.multi_processor_count, "memory_gib": p.total_memory / GIB} for p in found
    ]


if __name__ == "__main__":
    print(json.dumps(devices()))  # noqa: T201 (what it is for)
