"""Whether a GPU computes what the CPU computes: checks that are functions, each with the figure that it found.

    python -m tests.gpu.numerics --output DIR --device cuda

Without pytest, which an interpreter on a GPU machine may lack; `test_numerics.py` gives the same checks to pytest.
"""

import itertools
import json
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hptool import files
from hptool.base_config import BaseConfig
from hptool.candidates import Layout
from hptool.measurement import Measurement
from tests.gpu import runs
from tests.gpu.command import Given, command
from tests.gpu.device import Device, one_gpu
from tests.gpu.models import FAMILIES, named, plan_of
from tests.gpu.record import Record

if TYPE_CHECKING:
    import torch

#: Differences of attention, relative to the largest entry: 23 bits of mantissa summed in another order; 8 bits.
ATTENTION_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}

#: Differences of losses, relative to the CPU's in fp32.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}

STEPS = 5

#: What of a check is expected at most on a GPU: a run with its context, its compiled kernels and five steps.
_RUN_S = 90.0
_ATTENTION_S = 60.0

_SERVING_S = 60.0

#: Requests, tokens that are read and written, and places that a graph looks at more than the one before it.
_ANSWERED = (3, 60, 20)
_BLOCK = 8

#: The families that answer, and what makes their weights so large that the likeliest token is no matter of rounding.
_LIKELY_STD = 0.2
_LIKELY = {
    "gpt3": ("model.init_method_std={}",),
    "llama": ("model.init_method_std={}",),
    "t5": ("model.encoder.init_method_std={}", "model.decoder.init_method_std={}"),
}

#: Processes that checks of attention may take along, by a fault of a kernel or by hanging.
_MOST_DEATHS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Sizes of one attention; with `keys`, to another sequence of so many tokens."""

    name: str
    mask: str = "causal"
    length: int = 256
    batch: int = 2
    heads: int = 8
    groups: int = 8
    width: int = 64
    keys: int | None = None


#: What the worker's attention has to equal Megatron's DotProductAttention in.
ATTENTIONS = (
    Attention(name="causal"),
    Attention(name="causal, 80 wide", width=80),
    Attention(name="causal, 128 wide", width=128),
    Attention(name="grouped queries", groups=2),
    Attention(name="all keys", mask="padding"),
    Attention(name="cross", mask="padding", length=128, keys=256),
    Attention(name="cross, grouped", mask="padding", length=128, keys=256, groups=4),
)

#: Whose attention has to run on flash kernels in bf16: what the models of the other stages have.
FLASH_SHAPES = (
    Attention(name="gpt2-124m", length=1024, heads=12, groups=12),
    Attention(name="gpt3-1.3b", length=2048, heads=16, groups=16, width=128),
    Attention(name="gpt3-2.7b", length=2048, heads=32, groups=32, width=80),
    Attention(name="llama3.2-1b", length=4096, heads=32, groups=8),
    Attention(name="llama3.2-3b", length=4096, heads=24, groups=8, width=128),
    Attention(name="bert-large", mask="padding", length=512, heads=16, groups=16),
    Attention(name="t5-220m, cross", mask="padding", length=128, keys=512, heads=12, groups=12),
)


# ---------------------------------------------------------------- attention


def attention_config(given: Attention, device: Device, precision: str) -> BaseConfig:
    """A config with this attention, that the worker's code can be built from."""
    word = "bf16" if precision == "bf16" else 32
    document = {
        "run": {"name": "attention"},
        "trainer": {"num_nodes": 1, "devices": 1, "accelerator": device.accelerator, "precision": word},
        "model": {
            "micro_batch_size": given.batch,
            "global_batch_size": given.batch,
            "encoder_seq_length": given.length,
            "max_position_embeddings": given.length,
            "num_layers": 1,
            "hidden_size": given.heads * given.width,
            "ffn_hidden_size": 4 * given.heads * given.width,
            "num_attention_heads": given.heads,
            "num_query_groups": given.groups,
            "override_vocab_size": 512,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "optim": {"lr": 0.001},
            "data": {"seq_length": given.length},
        },
    }
    return files.parse(document, BaseConfig, "attention")


def attention_difference(given: Attention, precision: str, *, masked: bool = False) -> float:
    """The largest difference of output and gradients from DotProductAttention's in fp32, relative to its largest entry.

    In bf16 both see inputs rounded to it. With `masked` the keys of one sample end early. NotImplementedError where
    the worker's attention takes no mask.
    """
    import torch  # noqa: PLC0415 (heavy)
    from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: PLC0415 (heavy)

    from hptool.worker.attention import SdpaAttention  # noqa: PLC0415 (heavy)

    target = _device(torch)
    generator = torch.Generator().manual_seed(5)
    keys, dtype = given.keys or given.length, _dtype(torch, precision)
    sizes = ((given.length, given.heads), (keys, given.groups), (keys, given.groups))
    inputs = [
        torch.randn(length, given.batch, heads, given.width, generator=generator).to(target, dtype)
        for length, heads in sizes
    ]
    weight = torch.randn(given.length, given.batch, given.heads * given.width, generator=generator).to(target, dtype)
    mask = None
    if masked:  # as Megatron has them: [b, 1, 1, keys], true where there is nothing to attend to
        mask = torch.zeros(given.batch, 1, 1, keys, dtype=torch.bool, device=target)
        mask[0, ..., keys // 2 :] = True
    found = []
    for kind, work in ((DotProductAttention, torch.float32), (SdpaAttention, dtype)):
        query, key, value = (x.to(work, copy=True).requires_grad_() for x in inputs)
        attention = _attention(kind, given, "fp32" if work is torch.float32 else "bf16")
        try:
            output = attention(query, key, value, mask)
        except AssertionError as error:
            if masked and kind is SdpaAttention:
                raise NotImplementedError("the worker's attention takes no mask") from error
            raise
        gradients = torch.autograd.grad((output * weight.to(work)).sum(), (query, key, value))
        found.append([x.detach().float() for x in (output, *gradients)])
    return max(float((b - a).abs().max() / a.abs().max()) for a, b in zip(*found, strict=True))


def run_flash(given: Attention) -> None:
    """Forward and backward of the worker's attention in bf16 where flash kernels alone are allowed.

    RuntimeError where no such kernel takes it.
    """
    import torch  # noqa: PLC0415 (heavy)
    from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: PLC0415 (heavy)

    from hptool.worker.attention import SdpaAttention  # noqa: PLC0415 (heavy)

    target, keys = _device(torch), given.keys or given.length
    sizes = ((given.length, given.heads), (keys, given.groups), (keys, given.groups))
    query, key, value = (
        torch.randn(length, 1, heads, given.width, device=target, dtype=torch.bfloat16, requires_grad=True)
        for length, heads in sizes
    )
    attention = _attention(SdpaAttention, given, "bf16")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        attention(query, key, value, None).sum().backward()
    if target.type == "cuda":
        torch.cuda.synchronize()


def _attention(kind: Callable[..., Any], given: Attention, precision: str) -> Any:
    import torch  # noqa: PLC0415 (heavy)
    from megatron.core.transformer.enums import AttnMaskType  # noqa: PLC0415 (heavy)

    from hptool.worker.model import transformer_config  # noqa: PLC0415 (heavy)

    on_gpu = _device(torch).type == "cuda"
    config = attention_config(
        given, Device(kind="cuda" if on_gpu else "cpu", name="", gpu="", memory_gib=0.0), precision
    )
    megatron = transformer_config(config)
    return kind(megatron, 1, AttnMaskType[given.mask], "cross" if given.keys else "self")


def _device(torch: Any) -> "torch.device":
    """What `join` has opened."""
    name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)  # type: ignore[no-any-return]  # torch is an argument here


def _dtype(torch: Any, precision: str) -> "torch.dtype":
    return torch.bfloat16 if precision == "bf16" else torch.float32  # type: ignore[no-any-return]  # as above


def join_alone(config: BaseConfig, directory: Path) -> "torch.device":
    """Makes this process a rank on its own, as the worker's are. Multiplications in fp32 are not rounded to TF32."""
    import torch  # noqa: PLC0415 (heavy)

    from hptool.worker.nodes import Meeting, Place, listen  # noqa: PLC0415 (with the framework)
    from hptool.worker.rank import join  # noqa: PLC0415 (imports torch and megatron)

    listener = listen()
    meeting = Meeting(host="127.0.0.1", port=listener.getsockname()[1], listener=listener.fileno())
    device: torch.device = join(config, Place(rank=0, local_rank=0, world_size=1, directory=directory, meeting=meeting))
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return device


def attention_checks(*, tiny: bool) -> list[tuple[str, Callable[[], str]]]:
    """Every check of attention by its name: a function that says what it found, or raises."""
    given = [replace(a, length=a.length // 8, keys=a.keys and a.keys // 8) if tiny else a for a in ATTENTIONS]
    checks: list[tuple[str, Callable[[], str]]] = []
    for attention, precision in itertools.product(given, ATTENTION_TOLERANCE):
        name = f"attention {attention.name}, {precision}"
        checks.append((name, partial(_check_attention, attention, precision)))
        if attention.mask == "padding":
            checks.append((f"{name}, masked", partial(_check_attention, attention, precision, masked=True)))
    shapes = [replace(a, length=a.length // 32, keys=a.keys and a.keys // 32) if tiny else a for a in FLASH_SHAPES]
    checks += [(f"flash kernel {shape.name}", partial(_check_flash, shape)) for shape in shapes]
    return checks


def _check_attention(given: Attention, precision: str, *, masked: bool = False) -> str:
    try:
        difference = attention_difference(given, precision, masked=masked)
    except NotImplementedError as error:
        return f"not applicable: {error}"
    tolerance = ATTENTION_TOLERANCE[precision]
    if not difference <= tolerance:
        msg = f"off by {difference:.2g} of the largest entry, allowed is {tolerance:g}"
        raise AssertionError(msg)
    return f"{difference:.2g}"


def _check_flash(given: Attention) -> str:
    run_flash(given)
    return "runs"


def _check_all(config: BaseConfig, directory: Path, names: Sequence[str], lines: Path, *, tiny: bool) -> None:
    """Makes these checks in this process: a line of JSON when one begins, and one with what it found."""
    join_alone(config, directory)
    for name, check in attention_checks(tiny=tiny):
        if name not in names:
            continue
        files.append_line(lines, json.dumps([name, None]))
        try:
            found = {"ok": True, "found": check()}
        except Exception as error:  # noqa: BLE001 (whatever it is, it is this check's finding)
            traceback.print_exc()
            found = {"ok": False, "found": f"{type(error).__name__}: {error}"[:300]}
        files.append_line(lines, json.dumps([name, found]))


# ---------------------------------------------------------------- trainings


def losses(name: str, device: Device, precision: str, directory: Path, limit_s: float = _RUN_S) -> tuple[float, ...]:
    """The losses of five steps of a tiny model of this family, by the worker. RuntimeError where it does not train.

    From weights that depend neither on the device nor on the layout.
    """
    word = "bf16" if precision == "bf16" else "32"
    plan = plan_of(named(FAMILIES, name), one_gpu(device), [f"trainer.precision={word}"])
    outcome = runs.run(
        plan, plan.candidates.layouts.row(0), steps=STEPS, directory=directory / f"{device.kind}-{precision}-{name}",
        limit_s=limit_s,
    )  # fmt: skip
    if not isinstance(outcome, Measurement):
        msg = f"{outcome.kind}: {outcome.message}"
        raise RuntimeError(msg)  # noqa: TRY004 (the run went wrong, no type)
    return outcome.losses


def compare(found: Sequence[float], expected: Sequence[float], precision: str) -> str:
    """The largest difference of two curves, relative; AssertionError where it is more than the precision's rounding."""
    worst = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    if not worst <= LOSS_TOLERANCE[precision]:
        msg = f"losses off by {worst:.2g}, allowed is {LOSS_TOLERANCE[precision]:g}"
        raise AssertionError(msg)
    return f"{worst:.2g}"


def _curves(device: Device, wanted: Sequence[tuple[str, str]], directory: Path, lines: Path) -> None:
    """Losses of families and precisions, or why there are none: a line of JSON each, as soon as it is known."""
    runs.load(device.accelerator)
    for name, precision in wanted:
        try:
            found: Any = list(losses(name, device, precision, directory))
        except Exception as error:  # noqa: BLE001 (whatever it is, it is this run's finding)
            traceback.print_exc()
            found = f"{type(error).__name__}: {error}"[:300]
        files.append_line(lines, json.dumps([name, precision, found]))


def _read_curves(lines: Path) -> dict[tuple[str, str], Any]:
    text = lines.read_text(encoding="utf-8") if lines.is_file() else ""
    return {(name, precision): found for name, precision, found in map(json.loads, text.splitlines())}


def _finding(curve: Any, expected: Any, precision: str) -> dict[str, Any]:
    if isinstance(curve, str) or not isinstance(expected, list):
        return {"ok": False, "found": curve if isinstance(curve, str) else f"on the CPU: {expected}"}
    try:
        return {"ok": True, "found": compare(curve, expected, precision)}
    except AssertionError as error:
        return {"ok": False, "found": str(error)}


# ---------------------------------------------------------------- serving


def tokens(name: str, device: Device, directory: Path) -> dict[str, Any]:
    """What a tiny model of this family answers in fp32, by its cache; on a GPU also by CUDA graphs.

    To be called in a process of its own, which becomes a rank.
    """
    runs.load(device.accelerator)
    import torch  # noqa: PLC0415 (heavy)

    from hptool.worker import decoding_graphs  # noqa: PLC0415 (imports megatron)
    from hptool.worker.generation import Generator  # noqa: PLC0415 (as above)

    decoding_graphs._BLOCK = _BLOCK
    changes = [change.format(_LIKELY_STD) for change in _LIKELY[name]]
    plan = plan_of(named(FAMILIES, name), one_gpu(device), ["trainer.precision=32", *changes])
    config = plan.config.with_layout(Layout())
    place = join_alone(config, directory)
    generator = Generator(config, place, beat=lambda: None)
    drawn = torch.Generator().manual_seed(1)
    batch, read, written = _ANSWERED
    prompts = torch.randint(0, config.shape.vocab_size, (batch, read), generator=drawn).to(place)
    generator.open(batch, read, written)
    found = {"cache": generator.answer(prompts, written).tokens.tolist()}
    if device.kind == "cuda":
        generator.record()
        found["graphs"] = generator.answer(prompts, written).tokens.tolist()
    return found


def _serve(given: Given, record: Record) -> None:
    """Has each family answer on the CPU and on the device, which must say the same."""
    for name in list(_LIKELY)[: 1 if given.tiny else None]:
        key = f"serving {name}, fp32"
        if record.findings.get(key, {}).get("ok"):
            continue
        if not given.tiny and not given.clock.has(_SERVING_S):
            record.leave(key)
            continue
        said = {}
        try:
            for device in (_the_cpu(), given.device):
                work = partial(tokens, name, device, given.output)
                limit_s = max(1.0, min(_SERVING_S, given.clock.left_s))
                log = given.output / f"serving-{name}-{device.kind}.log"
                said[device.kind, device.name] = runs.answer_of(work, log=log, limit_s=limit_s)
        except RuntimeError as error:
            record.find(key, {"ok": False, "found": str(error)[:300]})
            continue
        (expected,) = {json.dumps(found["cache"]) for where, found in said.items() if where[1] == ""}
        differing = [way for found in said.values() for way, what in found.items() if json.dumps(what) != expected]
        text = f"differs: {', '.join(differing)}" if differing else "the same tokens"
        record.find(key, {"ok": not differing, "found": text})


# ---------------------------------------------------------------- the stage


def environment() -> None:
    """Sets what every check relies on, for this process and its children."""
    os.environ["HPTOOL_LAYOUT_INDEPENDENT_INIT"] = "1"
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"


def measure(given: Given, record: Record) -> None:
    """Makes every check that has not passed yet."""
    environment()
    # Each in a fork of this process, which stays without torch: the CPU's stand-ins would spoil the GPU's run.
    if given.device.kind == "cpu":
        runs.load("cpu")
    _attend(given, record)
    _train(given, record)
    _serve(given, record)
    for name, finding in record.findings.items():
        if not finding["ok"]:
            record.complain(f"{name}: {finding['found']}")


def _attend(given: Given, record: Record) -> None:
    """Makes the checks of attention; one that takes its process along is found out, and the others are made."""
    todo = [name for name, _ in attention_checks(tiny=given.tiny) if not record.findings.get(name, {}).get("ok")]
    lines, log = given.output / "attention.jsonl", given.output / "attention.log"

    def attend() -> None:
        runs.load(given.device.accelerator)
        config = attention_config(ATTENTIONS[0], given.device, "bf16")
        _check_all(config, given.output, todo, lines, tiny=given.tiny)

    for _ in range(_MOST_DEATHS):
        if not todo:
            return
        lines.unlink(missing_ok=True)
        died = ""
        try:
            runs.answer_of(attend, log=log, limit_s=max(1.0, min(_ATTENTION_S, given.clock.left_s)))
        except RuntimeError as error:
            died = str(error)
        said = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()] if lines.is_file() else []
        found = {name: finding for name, finding in said if finding is not None}
        found |= {name: {"ok": False, "found": died[:300]} for name, _ in said if name not in found}
        for name, finding in found.items():
            record.find(name, finding)
        if not said and died:
            record.complain(f"attention: {died}")
            return
        todo = [name for name in todo if name not in found]
    if todo:
        record.leave(f"{len(todo)} checks of attention")


def _train(given: Given, record: Record) -> None:
    families = [model.name for model in FAMILIES][: 1 if given.tiny else None]
    pairs = itertools.product(families, ["fp32"] if given.tiny else ["fp32", "bf16"])
    wanted = [pair for pair in pairs if not record.findings.get(_name(*pair), {}).get("ok")]
    cpu = _the_cpu()
    found: dict[str, dict[tuple[str, str], Any]] = {}
    for where, device, pairs_there in (
        ("cpu", cpu, [(name, "fp32") for name in dict.fromkeys(name for name, _ in wanted)]),
        ("device", given.device, wanted),
    ):
        lines = given.output / f"{where}.jsonl"
        lines.unlink(missing_ok=True)
        work = partial(_curves, device, pairs_there, given.output, lines)
        try:
            runs.answer_of(work, log=given.output / f"{where}.log", limit_s=max(1.0, given.clock.left_s))
        except RuntimeError as error:
            if given.clock.has(1.0):  # else it was only too slow, and what is missing is left for the next call
                record.complain(f"trainings, {where}: {error}")
        found[where] = _read_curves(lines)
    for name, precision in wanted:
        curve, expected = found["device"].get((name, precision)), found["cpu"].get((name, "fp32"))
        if curve is None or expected is None:
            record.leave(_name(name, precision))
        else:
            record.find(_name(name, precision), _finding(curve, expected, precision))


def _the_cpu() -> Device:
    return Device(kind="cpu", name="", gpu="cpu", memory_gib=files.read_gpu("cpu", "tests.gpu").memory_gib)


def _name(family: str, precision: str) -> str:
    return f"training {family}, {precision}"


main = command(measure)

if __name__ == "__main__":
    main()
