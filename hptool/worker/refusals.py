"""What the worker refuses before it starts anything; knows neither torch nor megatron."""

import importlib.util

from hptool.base_config import BaseConfig
from hptool.candidates import SearchLimits, SearchSpace, enumerate_layouts
from hptool.errors import InputError

#: One step to warm up and one to time.
_FEWEST_STEPS = 2


def refuse_impossible(config: BaseConfig, source: str) -> None:
    """InputError where the config's layout cannot run on its GPUs, or the config asks for what the worker has not."""
    problems = [f"{source}: layout {config.layout.name}: {reason}" for reason in _broken_rules(config)]
    trainer, model = config.trainer, config.model
    if trainer.max_steps < _FEWEST_STEPS:
        problems.append(
            f"{source}: trainer.max_steps: {trainer.max_steps} given, allowed is {_FEWEST_STEPS} or more "
            "(the first steps only warm up)"
        )
    if model.optim.overlap_param_sync and not model.optim.overlap_grad_sync:
        problems.append(
            f"{source}: model.optim.overlap_param_sync: True given, allowed is False unless overlap_grad_sync is True"
        )
    if problems:
        raise InputError(*problems)


def refuse_missing_framework() -> None:
    """InputError where torch or Megatron-core is not installed; imports neither."""
    missing = [name for name in ("torch", "megatron") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"the worker needs {' and '.join(missing)}: pip install 'hptool[worker]'")


def _broken_rules(config: BaseConfig) -> list[str]:
    """The first of the candidates' rules that this layout breaks; a search space of one."""
    layout = config.layout
    space = SearchSpace(
        tp=(layout.tp,),
        pp=(layout.pp,),
        vpp=(layout.vpp,),
        cp=(layout.cp,),
        mbs=(layout.mbs,),
        recompute=((layout.recompute, layout.recompute_num_layers),),
    )
    limits = SearchLimits(mbs=(layout.mbs,), min_tokens_per_cp_rank=1, block_fractions=())
    return [rejection.reason for rejection in enumerate_layouts(space, config.workload, limits).rejections]
