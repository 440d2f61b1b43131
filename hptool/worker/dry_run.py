"""`python -m hptool.worker.dry_run CONFIG.yaml`: what a rank of this training will hold in memory, without a GPU.

One rank of the job, however large that is, trains a step here with Megatron-core's own code; see `fake_rank`. The
stand-ins of `cpu` stay in place afterwards, so this is for a process of its own, in which dry runs may follow one
another.
"""

import importlib.metadata
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from hptool import files
from hptool.base_config import BaseConfig
from hptool.errors import InputError
from hptool.units import GIB
from hptool.worker.refusals import refuse_impossible, refuse_missing_framework
from hptool.worker.supervisor import load_framework

#: Of CUDA's flash attention (torch, sdp_utils.cpp: check_head_dim_size_flash).
_LARGEST_HEAD = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What one rank holds when the config runs on a GPU: the first rank of pipeline stage `pp_rank`.

    `static_gib` is the sum of weights, gradients and optimizer. The saved activations are those that the forward pass
    of one microbatch leaves for its backward pass, in all layers of the stage; those of the output layer and the loss
    are among them and given once more. `peak_gib` is the most tensors that are alive at once in a step, which
    `schedule` tells. `seconds` counts this dry run, and the imports where it was the first.
    """

    pp_rank: int
    parameters: int
    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    static_gib: float
    saved_activations_gib_per_microbatch: float
    saved_by_output_layer_gib_per_microbatch: float
    peak_gib: float
    schedule: str
    seconds: float
    versions: Mapping[str, str]


def dry_run(config: BaseConfig, pp_rank: int = 0, source: str = "config") -> DryRun:
    """One step of the first rank of a pipeline stage, traced; InputError, with `source`, for what cannot start."""
    start = time.perf_counter()
    _refuse(config, pp_rank, source)
    refuse_missing_framework()
    for package in ("transformer_engine", "apex"):
        # Their kernels need a device; what Megatron-core takes in their absence allocates the same.
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # this is how Python forbids an import
    load_framework("cpu")
    from hptool.worker.fake_rank import trace  # noqa: PLC0415 (imports torch and megatron)

    microbatches = _enough_microbatches(config, pp_rank)
    found = trace(config, pp_rank, microbatches)
    return DryRun(
        pp_rank=pp_rank,
        parameters=found.parameters,
        weights_gib=found.weights / GIB,
        gradients_gib=found.gradients / GIB,
        optimizer_gib=found.optimizer / GIB,
        static_gib=(found.weights + found.gradients + found.optimizer) / GIB,
        saved_activations_gib_per_microbatch=found.saved / GIB,
        saved_by_output_layer_gib_per_microbatch=found.saved_by_head / GIB,
        peak_gib=found.peak / GIB,
        schedule=f"{_schedule(config)}, {microbatches} of {config.num_microbatches} microbatches",
        seconds=time.perf_counter() - start,
        versions={package: importlib.metadata.version(package) for package in ("torch", "megatron-core")},
    )


@click.command()
@click.argument("config_path", metavar="CONFIG.yaml")
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--pp-rank", default="0", show_default=True, metavar="N,...|all", help="Pipeline stages to trace.")
def main(config_path: str, overrides: tuple[str, ...], pp_rank: str) -> None:
    """Print what a rank of CONFIG.yaml holds in memory, as one line of JSON; with --pp-rank all, a line a stage."""
    try:
        document = files.apply_overrides(files.read_yaml(Path(config_path)), overrides, config_path)
        config = files.parse(document, BaseConfig, config_path)
        for stage in _stages(pp_rank, config):
            click.echo(files.json_text(dry_run(config, stage, config_path), indent=None))
    except InputError as error:
        for problem in str(error).splitlines():
            click.echo(f"hptool: error: {problem}", err=True)
        sys.exit(error.exit_code)


def _stages(words: str, config: BaseConfig) -> Sequence[int]:
    if words == "all":
        return range(config.layout.pp)
    if not re.fullmatch(r"\d+(,\d+)*", words):
        raise _no_such_stage(words, config)
    return [int(word) for word in words.split(",")]


def _no_such_stage(given: object, config: BaseConfig) -> InputError:
    return InputError(f"--pp-rank: {given} given, allowed is 0 to {config.layout.pp - 1}, or all")


def _refuse(config: BaseConfig, pp_rank: int, source: str) -> None:
    """InputError for a config that cannot start, or that does something which cannot be traced."""
    refuse_impossible(config, source)
    if not 0 <= pp_rank < config.layout.pp:
        raise _no_such_stage(pp_rank, config)
    model, shape = config.model, config.shape
    plain_attention = not model.use_flash_attention and config.precision == "bf16"
    apex = {
        "gradient_accumulation_fusion": model.gradient_accumulation_fusion,
        "masked_softmax_fusion": config.stack.masked_softmax_fusion and plain_attention,
    }
    problems = [
        f"{source}: model.{key}: True given, allowed in a dry run is False (a CUDA kernel of Apex)"
        for key, needed in apex.items()
        if needed
    ]
    if shape.num_experts:
        problems.append(
            f"{source}: model.num_moe_experts: {shape.num_experts} given, allowed in a dry run is null "
            "(which tokens go to which expert is not known without computing)"
        )
    if model.use_flash_attention:
        # With other heads torch takes neither of its fused kernels as they are, but pads or computes plainly.
        if shape.kv_channels % 8 or shape.kv_channels > _LARGEST_HEAD:
            problems.append(
                f"{source}: model.kv_channels: {shape.kv_channels} given, allowed in a dry run with flash attention "
                f"is a multiple of 8 up to {_LARGEST_HEAD}"
            )
        if (config.precision == "fp32" or config.is_alibi) and shape.num_query_groups != shape.num_attention_heads:
            case = "with ALiBi" if config.is_alibi else "in fp32"
            problems.append(
                f"{source}: model.num_query_groups: {shape.num_query_groups} given, allowed in a dry run {case} is "
                f"model.num_attention_heads ({shape.num_attention_heads})"
            )
    if problems:
        raise InputError(*problems)


def _enough_microbatches(config: BaseConfig, pp_rank: int) -> int:
    """So many that the fullest moment of the step is among them."""
    pp, vpp = config.layout.pp, config.layout.vpp
    # 1F1B fills up to `pp - pp_rank` microbatches under way. Interleaving, which counts in groups of `pp`, warms up
    # with fewer than (vpp + 1)·pp of the 2·vpp·pp passes through a chunk (Narayanan et al. 2021, section 2.2).
    return min(config.num_microbatches, pp - pp_rank + 1 if vpp == 1 else 2 * pp)


def _schedule(config: BaseConfig) -> str:
    pp, vpp = config.layout.pp, config.layout.vpp
    if pp == 1:
        return "no pipeline"
    return "1F1B" if vpp == 1 else f"interleaved 1F1B of {vpp} chunks"


if __name__ == "__main__":
    main(prog_name="python -m hptool.worker.dry_run")
