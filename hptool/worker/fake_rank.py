"""One rank of a training of any size, in this process alone: all that training does, on tensors without contents.

The model, the optimizer and the schedule are those that training runs. What they compute with is fake: tensors that
know their shape and no numbers (torch's FakeTensorMode), and a process group whose collectives do nothing (torch's
backend "fake"). Every operator still makes the tensors that it would make, and the ledger counts them.

The tensors lie on the device "cpu", since autograd wants a real driver for any other; `_stand_ins` makes operators
allocate there what they allocate on CUDA. Not counted is what no operator returns: workspaces of kernels and of NCCL,
the CUDA context, and what the caching allocator holds beyond its tensors.
"""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.fusions import fused_bias_dropout, fused_bias_geglu, fused_bias_gelu, fused_bias_swiglu
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.optimizer import clip_grads
from megatron.core.pipeline_parallel.schedules import deallocate_output_tensor
from megatron.core.utils import unwrap_model
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from hptool.base_config import BaseConfig
from hptool.errors import InputError
from hptool.worker import attention, batches, cpu, cross_entropy, kernels
from hptool.worker.batches import Microbatch
from hptool.worker.rank import divide
from hptool.worker.training import Training

_CPU = torch.device("cpu")

#: Functions of Megatron-core that torch.compile fuses.
_COMPILED = {
    fused_bias_gelu: "bias_gelu bias_gelu_back",
    fused_bias_geglu: "geglu bias_geglu geglu_back bias_geglu_back",
    fused_bias_swiglu: "swiglu bias_swiglu swiglu_back bias_swiglu_back",
    fused_bias_dropout: "bias_dropout_add_fused_train",
}

_LOSS_KERNELS = ("_statistics", "_become_gradient")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What one rank holds. All but `parameters` in bytes.

    `saved` is what the forward pass of one microbatch leaves alive in all of the rank's chunks, `saved_by_head` the
    part of it that the output layer and the loss leave. `peak` is that of a whole step of so many microbatches.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    saved: int
    saved_by_head: int
    peak: int


class Ledger(TorchDispatchMode):
    """Within it, the bytes of all storages that operators return are counted for as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it without types
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()
        self._in_kernel = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: that is for what is compiled, and costs a call and an import."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The operator's own answer, its storages noted."""
        del types
        answer = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # questions about a tensor, more of them than of operators
            return answer
        for tensor in answer if isinstance(answer, tuple | list) else (answer,):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        if not self._in_kernel:
            self.peak = max(self.peak, self.live)
        return answer

    def as_kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose intermediate tensors never count towards the peak: a compiler fuses them away."""

        def run(*args: Any) -> Any:
            outer, self._in_kernel = self._in_kernel, True
            try:
                answer = function(*args)
            finally:
                self._in_kernel = outer
            if not outer:
                self.peak = max(self.peak, self.live)
            return answer

        return run

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)  # a storage has one Python object for as long as it lives
        if key not in self._known:
            size = storage.nbytes()
            self._known.add(key)
            self.live += size
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.live -= size


def trace(config: BaseConfig, pp_rank: int, num_microbatches: int) -> Trace:
    """A step of that many microbatches on the first rank of that pipeline stage; leaves torch and Megatron as before.

    InputError where Megatron-core refuses the config, or does with it what cannot be traced.
    """
    ledger = Ledger()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Megatron's, for those who train
            with _as_rank(config, pp_rank), _stand_ins(ledger), FakeTensorMode(allow_non_fake_inputs=True), ledger:
                return _measure(config, num_microbatches, ledger)
    except (AssertionError, ValueError) as error:  # as in rank.py
        raise InputError(f"Megatron-core refuses this config: {error}") from error
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
        raise InputError(f"this config cannot be traced without a GPU: {error}") from error


@contextmanager
def _as_rank(config: BaseConfig, pp_rank: int) -> Iterator[None]:
    """Within, this process is the first rank of a pipeline stage, and all others are said to be there."""
    cpu.drive_megatron()
    # Megatron numbers the ranks so that those of a stage follow one another.
    rank = pp_rank * (config.gpus // config.layout.pp)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=config.gpus)
    try:
        # Megatron makes the groups of all ranks, thousands for a job of a thousand ranks; here only its own matter.
        with _replaced(torch.distributed, "new_group", partial(_own_group, torch.distributed.new_group)):
            divide(config)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@contextmanager
def _stand_ins(ledger: Ledger) -> Iterator[None]:
    """All that is replaced while a rank is traced, and why."""
    replaced: list[tuple[Any, str, Any]] = [
        # Asks every rank of the job for a Python object; each would answer like this one.
        (torch.distributed, "all_gather_object", _same_from_all),
        # torch has coalesced collectives for real tensors only; one by one they are the same to the memory.
        (param_and_grad_buffer, "_coalescing_manager", lambda *_, **__: nullcontext(_Done())),
        # Norms and random states are read by the host, and a fake tensor has nothing to read.
        (torch.Tensor, "item", _one),
        (clip_grads, "l2_norm_impl", lambda *_: (torch.ones(1), None)),
        # Module.to and Module.bfloat16 swap fake tensors, which torch refuses to do with those in use.
        (torch.nn.Module, "_apply", _apply),
        # CUDA's dropout keeps a mask of bytes, the CPU's the noise in the precision of its input.
        (torch.nn.functional, "dropout", _dropout),
        # What is compiled saves what is not, and its kernels are the stand-ins below.
        (kernels, "backend", lambda _: None),
        *((cross_entropy, name, ledger.as_kernel(getattr(cross_entropy, name))) for name in _LOSS_KERNELS),
        # The operators that attention and RMSNorm come to on CUDA, instead of those of the CPU.
        (attention, "fused_attention", _cuda_attention),
        (torch.nn.functional, "rms_norm", _cuda_rms_norm),
        # On a GPU torch.compile makes these one kernel each.
        *(
            (module, name, ledger.as_kernel(getattr(module, name)))
            for module, names in _COMPILED.items()
            for name in names.split()
        ),
    ]
    with ExitStack() as stack:
        for owner, name, stand_in in replaced:
            stack.enter_context(_replaced(owner, name, stand_in))
        yield


@contextmanager
def _replaced(owner: object, name: str, stand_in: object) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _measure(config: BaseConfig, num_microbatches: int, ledger: Ledger) -> Trace:
    """Builds the rank's part and trains a step, with tensors of whatever kind the caller has set up."""
    model = config.model
    batch = [batches.blank(config) for _ in range(config.num_microbatches)]  # all on the device, as in training
    batch_bytes = ledger.live
    short = replace(
        config,
        model=replace(
            model,
            global_batch_size=model.micro_batch_size * config.dp * num_microbatches,
            data=replace(model.data, data_prefix=None),  # what the tokens are is all the same
            gc_interval=0,  # the garbage collector is the caller's
        ),
    )
    training = Training(short, _CPU, beat=lambda: None)
    training.optimizer.step()  # Adam's state comes with its first step
    gc.collect()
    buffers = [buffer for chunk in training.chunks for buffer in chunk.buffers]
    weights = sum(buffer.param_data.untyped_storage().nbytes() for buffer in buffers)
    gradients = sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers)
    optimizer = ledger.live - batch_bytes - weights - gradients
    saved, saved_by_head = _saved(config, training, batch[0], ledger)
    ledger.peak = ledger.live
    training.train(batch, step=0)
    return Trace(
        parameters=sum(parameter.numel() for chunk in training.chunks for parameter in chunk.parameters()),
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        saved=saved,
        saved_by_head=saved_by_head,
        peak=ledger.peak,
    )


def _saved(config: BaseConfig, training: Training, batch: Microbatch, ledger: Ledger) -> tuple[int, int]:
    """Bytes that a microbatch leaves between forward and backward pass, and those of them from after the last layer.

    Counted when they go, so that buffers which the first pass makes and all others use are left out.
    """
    passes = [_pass_forward(config, training, chunk, batch, ledger) for chunk in training.chunks]
    by_head = sum(head for _, head in passes)
    before = ledger.live
    passes.clear()
    gc.collect()
    return before - ledger.live, by_head


def _pass_forward(
    config: BaseConfig, training: Training, chunk: torch.nn.Module, batch: Microbatch, ledger: Ledger
) -> tuple[torch.Tensor, int]:
    """What holds all that a chunk has saved, and the bytes of it from after the last layer."""
    stage = unwrap_model(chunk)
    if not stage.pre_process:
        stage.set_input_tensor(_received(config, stage))
    marks: list[int] = []
    last_block = getattr(stage, "decoder", None) or stage.encoder
    hook = last_block.register_forward_hook(lambda *_: marks.append(ledger.live))
    output, loss = training.forward(iter([batch]), chunk)
    hook.remove()
    stage.set_input_tensor(None)  # as the next microbatch would
    if stage.post_process:
        mean, _ = loss(output)
        del output
        return mean, ledger.live - marks[0]
    deallocate_output_tensor(output, stage.config.deallocate_pipeline_outputs)  # it is sent by now
    return output, 0


def _received(config: BaseConfig, stage: LanguageModule) -> torch.Tensor:
    """What the stage before sends of a microbatch."""
    parts = config.layout.cp * (config.layout.tp if stage.config.sequence_parallel else 1)
    shape = (batches.schedule_length(config) // parts, config.layout.mbs, config.shape.hidden_size)
    return torch.empty(shape, dtype=stage.config.pipeline_dtype, requires_grad=True)


# ---------------------------------------------------------------- stand-ins


def _own_group(new_group: Callable[..., Any], ranks: Sequence[int] | None = None, **options: Any) -> Any:
    if ranks is not None and torch.distributed.get_rank() not in ranks:
        return torch.distributed.GroupMember.NON_GROUP_MEMBER
    return new_group(ranks, **options)


class _Done:
    """A collective that is over."""

    def wait(self) -> None:
        """At once."""


def _same_from_all(answers: list[Any], own: object, **_: object) -> None:
    answers[:] = [own] * len(answers)


def _one(tensor: torch.Tensor) -> float | bool:
    """As a norm it clips nothing much, as the answer to a question it is yes."""
    return True if tensor.dtype is torch.bool else 1.0


def _apply(module: torch.nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.nn.Module:
    """As torch's, of real tensors: the parameter stays, with other data."""
    for child in module.modules():
        for parameter in child.parameters(recurse=False):
            parameter.data = function(parameter.data)
        for name, buffer in child.named_buffers(recurse=False):
            setattr(child, name, function(buffer))
    return module


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:  # noqa: FBT001, FBT002 (torch's signature)
    assert not inplace  # noqa: S101 (Megatron's is not where gradients are wanted)
    return torch.native_dropout(x, p, train=True)[0] if training and p > 0 else x


def _cuda_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool,
    bias: torch.Tensor | None,
    dropout: float,
    scale: float,
) -> torch.Tensor:
    """As `attention.fused_attention`; dry_run refuses what neither kernel takes."""
    if query.dtype is torch.bfloat16 and bias is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention  # noqa: SLF001 (the operator's name)
        context: torch.Tensor = flash(query, key, value, dropout, is_causal=causal, scale=scale)[0]
    else:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention  # noqa: SLF001 (as above)
        plain = causal and bias is None  # a bias hides what comes later itself
        context = efficient(query, key, value, bias, True, dropout, is_causal=plain, scale=scale)[0]  # noqa: FBT003 (as above)
    return context


def _cuda_rms_norm(
    x: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor, eps: float | None = None
) -> torch.Tensor:
    del normalized_shape, eps
    normalised: torch.Tensor = _FusedRmsNorm.apply(x, weight)  # type: ignore[no-untyped-call]  # torch's decorator
    return normalised


class _FusedRmsNorm(torch.autograd.Function):
    """What CUDA's kernels of RMSNorm allocate and save; on a CPU torch makes it of many operators."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        del gradients
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
