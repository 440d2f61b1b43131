"""The one picture that `hptool recommend` draws: a fitted scaling law with its runs and residuals."""

from pathlib import Path

import numpy as np

from hptool.errors import InputError
from hptool.scaling import FLOP_PER_PARAMETER_TOKEN, Column, Fit, optimal_parameters

_FORMATS = (".png", ".svg", ".pdf")


def refuse_plot(path: Path) -> None:
    """InputError where no picture could be saved there: before any work is done for it."""
    if path.suffix.lower() not in _FORMATS:
        raise InputError(f"--plot: {path} given, allowed is a file ending in {', '.join(_FORMATS)}")
    if path.exists() and not path.is_file():
        raise InputError(f"--plot: {path}: is there, and no plain file")


def save_fit(path: Path, fit: Fit, compute: float | None) -> None:
    """Loss over compute with the law's best at each compute, and the residuals; outliers are crosses.

    `compute` is the FLOP of a budget to mark.
    """
    # Half a second that no other command should wait for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import StrMethodFormatter  # noqa: PLC0415

    runs = fit.runs
    figure = Figure(figsize=(7, 7), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    points = above.scatter(runs.compute, runs.loss, c=np.log10(runs.parameters), s=12, label="runs")
    figure.colorbar(points, ax=above, label="log10 parameters")
    last = max(float(runs.compute.max()), compute or 0.0)
    line = np.geomspace(float(runs.compute.min()), last, 100)
    above.plot(line, _best_losses(fit, line), color="black", label="the law's best at this compute")
    dropped = [FLOP_PER_PARAMETER_TOKEN * run.parameters * run.tokens for run in fit.dropped]
    if dropped:
        above.scatter(dropped, [run.loss for run in fit.dropped], marker="x", color="red", label="left out")
        below.scatter(dropped, [100 * run.error for run in fit.dropped], marker="x", color="red")
    if compute is not None:
        above.axvline(compute, color="grey", linestyle="--", label="the budget")
    law = fit.law
    above.set(
        xscale="log",
        yscale="log",
        ylabel="loss",
        title=f"L = {law.e:.4g} + {law.a:.4g} / N^{law.alpha:.3g} + {law.b:.4g} / D^{law.beta:.3g}",
    )
    for axis_format in (above.yaxis.set_major_formatter, above.yaxis.set_minor_formatter):
        axis_format(StrMethodFormatter("{x:.3g}"))
    above.legend(loc="upper right")
    below.scatter(runs.compute, 100 * np.expm1(fit.residuals), s=12)
    below.axhline(0, color="black", linewidth=0.8)
    below.set(xlabel="compute, FLOP (6·N·D)", ylabel="measured over law, %")
    # Written aside and renamed, so that no half of a picture is left.
    aside = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(aside, dpi=150, format=path.suffix[1:].lower())
        aside.replace(path)
    except OSError as error:
        raise InputError(f"--plot: {path}: cannot be written: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)


def _best_losses(fit: Fit, compute: Column) -> Column:
    law = fit.law
    sizes = np.array([float(optimal_parameters(law.figures, flop)) for flop in compute.tolist()])
    return np.array(
        [law.loss(n, flop / FLOP_PER_PARAMETER_TOKEN / n) for n, flop in zip(sizes, compute.tolist(), strict=True)]
    )
