"""Optuna's tree-structured Parzen estimator (TPE) over a table of layouts. The only module that imports optuna."""

from collections.abc import Mapping

import numpy as np

from hptool.candidates import AXES, BoolColumn, Layouts
from hptool.errors import InputError

try:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution
except ImportError as error:
    raise InputError("the strategy optuna needs the package of that name: pip install 'hptool[optuna]'") from error


def suggest(layouts: Layouts, values: Mapping[int, float], left: BoolColumn, seed: int) -> int:
    """The row, one of those that are `left`, that TPE suggests after rows of these values (more is better).

    TPE knows axes and no tables: the row that is nearest to what it asks for stands for it, counted in axes that
    differ and then in doublings.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    columns = {axis: getattr(layouts, axis) for axis in AXES}
    space: dict[str, BaseDistribution] = {
        axis: CategoricalDistribution(np.unique(column).tolist()) for axis, column in columns.items()
    }
    # Another seed for every question, or the same values would draw the same answer again.
    sampler = optuna.samplers.TPESampler(seed=seed + len(values), n_startup_trials=len(values))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for row, value in values.items():
        cut = {axis: int(column[row]) for axis, column in columns.items()}
        study.add_trial(optuna.trial.create_trial(params=cut, distributions=space, value=value))
    asked = study.ask(space).params
    differ = np.zeros(len(layouts))
    doublings = np.zeros(len(layouts))
    for axis, column in columns.items():
        differ += column != asked[axis]
        doublings += np.abs(np.log2(column + 1) - np.log2(asked[axis] + 1))
    return int(np.lexsort([doublings, differ, ~left])[0])
