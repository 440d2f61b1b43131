"""Scaling laws: what loss N parameters trained on D tokens reach, fitted to seed runs, and what to make of a budget.

The law is L(N, D) = E + A / N^alpha + B / D^beta, and its compute 6·N·D FLOP (Hoffmann et al. 2022, arXiv 2203.15556,
approach 3). In tables of laws the columns are E, A, B, alpha, beta.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hptool.errors import InputError

Column = NDArray[np.float64]

#: FLOP for each parameter and token: forward 2, backward 4 (Kaplan et al. 2020). What laws count compute in.
FLOP_PER_PARAMETER_TOKEN = 6

#: Said beside every compute of a law.
COMPUTE_CONVENTION = "6·N·D, as scaling laws count it: attention and recomputation left out"

#: Where the Huber loss of log residuals turns from squares to absolute values (Hoffmann et al. 2022, appendix D.2).
HUBER_DELTA = 1e-3

#: The law has five parameters; fewer runs than one more fit it exactly, whatever they say.
FEWEST_RUNS = 6

#: Below this a fit is often wrong. On random subsets of the 240 runs of `tests/data/chinchilla_points.csv`, the N of
#: the whole fit was met within 2x in 40 % of cases with 10 runs, 67 % with 20, 87 % with 30 and 93 % with 50.
ENOUGH_RUNS = 30

#: Runs that differ by less than this factor in a quantity are taken to be alike in it.
_ALIKE = 1.5

#: A run is an outlier beyond this many robust deviations and this relative error. Calibrated on those 245 published
#: runs, of which exactly the five that Epoch's replication leaves out are beyond.
_OUTLIER_DEVIATIONS, _OUTLIER_ERROR = 11.0, 0.02

#: Fewer runs cannot tell an outlier from the law, and more than this share of them are no outliers.
_FEWEST_TO_DROP_FROM, _MOST_DROPPED = 15, 0.1

#: Root mean square of the log residuals above which the law does not describe the runs.
LARGE_RESIDUAL = 0.02

#: Compute beyond the largest run up to which a fit is worth something, and beyond which it is a guess.
FAR, VERY_FAR = 10.0, 100.0

#: Exponents and logarithms (of terms over their geometric mean) that a fit may take.
_LEAST_EXPONENT, _GREATEST_EXPONENT, _GREATEST_LOG = 0.01, 3.0, 20.0

#: Of the least loss; an E below this is none.
_VANISHED = 1e-3

#: Beyond this, exponentials are no floats any more.
_GREATEST_LOGARITHM = 700.0

_RESAMPLES = 200
_DEVIATION_OF_MEDIAN = 1.4826


# ---------------------------------------------------------------- a law


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """E + A / N^alpha + B / D^beta, with the source of its figures. All five are more than 0."""

    name: str
    source: str
    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def __post_init__(self) -> None:
        for name in ("e", "a", "b", "alpha", "beta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                msg = f"{name}: {value} given, allowed is more than 0"
                raise ValueError(msg)

    @property
    def figures(self) -> Column:
        """E, A, B, alpha, beta: a table of one law."""
        return np.array([self.e, self.a, self.b, self.alpha, self.beta])

    def loss(self, parameters: float, tokens: float) -> float:
        """Loss that so many parameters reach with so many tokens, in nats a token of the law's own data."""
        return float(self.e + self.a / parameters**self.alpha + self.b / tokens**self.beta)

    def optimal_parameters(self, compute: float) -> float:
        """N of the least loss within `compute` FLOP (6·N·D)."""
        return float(optimal_parameters(self.figures, compute))

    def optimal_tokens(self, parameters: float) -> float:
        """D that makes a model of this size the best use of its compute."""
        slope = self.alpha * self.a / parameters**self.alpha
        return _power(self.beta * self.b / slope, 1 / self.beta)

    def tokens_for(self, parameters: float, loss: float) -> float:
        """D with which this size reaches `loss`; infinite where no number of tokens does."""
        left = loss - self.e - self.a / parameters**self.alpha
        return _power(self.b / left, 1 / self.beta) if left > 0 else math.inf


def _power(base: float, exponent: float) -> float:
    """Of a positive base; infinite where it is too large for a float."""
    logarithm = exponent * math.log(base) if base > 0 else -math.inf
    return math.exp(logarithm) if logarithm < _GREATEST_LOGARITHM else math.inf


def optimal_parameters(laws: Column, compute: float) -> Column:
    """N of the least loss within `compute` FLOP (6·N·D), for each row of a table of laws.

    In closed form: at the optimum both terms fall equally fast, alpha·A/N^alpha = beta·B/D^beta.
    """
    _, a, b, alpha, beta = np.moveaxis(laws, -1, 0)
    balance = np.log(alpha * a / (beta * b))
    logarithm = (balance + beta * math.log(compute / FLOP_PER_PARAMETER_TOKEN)) / (alpha + beta)
    return np.asarray(np.exp(np.clip(logarithm, -_GREATEST_LOGARITHM, _GREATEST_LOGARITHM)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Laws:
    """Published laws; the first is the default."""

    laws: tuple[Law, ...]


# ---------------------------------------------------------------- seed runs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SeedRuns:
    """Runs as equally long columns; `line` names each in its `source` to the user."""

    source: str
    parameters: Column
    tokens: Column
    loss: Column
    line: NDArray[np.int64]

    def __post_init__(self) -> None:
        for name in ("parameters", "tokens", "loss"):
            values = getattr(self, name)
            if not bool(np.all(np.isfinite(values) & (values > 0))):
                msg = f"{name}: allowed are finite numbers above 0"
                raise ValueError(msg)

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def compute(self) -> Column:
        """FLOP of each, 6·N·D."""
        return FLOP_PER_PARAMETER_TOKEN * self.parameters * self.tokens

    def select(self, index: NDArray[np.bool_]) -> "SeedRuns":
        """Those where `index` is true."""
        columns = {name: getattr(self, name)[index] for name in ("parameters", "tokens", "loss", "line")}
        return SeedRuns(source=self.source, **columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A run that the fit leaves out: its line in the file, and by how much its loss is off (relative)."""

    line: int
    parameters: float
    tokens: float
    loss: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """A reason not to trust a fit: a word for programs and a sentence for people.

    With a `severe` one its recommendations are not to be trusted at all.
    """

    kind: str
    message: str
    severe: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fit:
    """A law, the runs that it was fitted to, and the same fitted to resamples of them (a table of laws).

    `residuals` are log(measured / law), one a run.
    """

    law: Law
    runs: SeedRuns
    dropped: Sequence[Dropped]
    resampled: Column
    residuals: Column

    @property
    def rms(self) -> float:
        """Root mean square of the residuals: a relative error."""
        return float(np.sqrt(np.mean(self.residuals**2)))

    @property
    def determined(self) -> bool:
        """The runs differ in size, in tokens and in the ratio of both, as the law's parameters need them to."""
        return not {"fixed_ratio", "one_size", "one_token_count"} & {kind for kind, _, _ in _alike(self.runs)}

    @property
    def edges(self) -> Sequence[str]:
        """The law's parameters that the runs drove as far as they may go."""
        exponents = {name: getattr(self.law, name) for name in ("alpha", "beta")}
        least, most = 1.01 * _LEAST_EXPONENT, 0.99 * _GREATEST_EXPONENT
        vanished = ["E"] if self.law.e < _VANISHED * float(self.runs.loss.min()) else []
        return [*vanished, *(name for name, value in exponents.items() if not least < value < most)]

    def interval(self, figure: Callable[[Column], Column]) -> tuple[float, float] | None:
        """Between what 80 of 100 resamples have a figure; None where the runs do not determine the law.

        It shows the noise of the runs, and no error of the law's form.
        """
        if not self.determined:
            return None
        low, high = np.percentile(figure(self.resampled), (10, 90))
        return float(low), float(high)


# ---------------------------------------------------------------- fitting


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Points:
    """Logarithms of N, D and loss, the former two less their means: exponents and factors fit independently so."""

    x: Column
    y: Column
    z: Column
    mean_x: float
    mean_y: float

    @classmethod
    def of(cls, runs: SeedRuns) -> "_Points":
        x, y = np.log(runs.parameters), np.log(runs.tokens)
        mean_x, mean_y = float(x.mean()), float(y.mean())
        return cls(x=x - mean_x, y=y - mean_y, z=np.log(runs.loss), mean_x=mean_x, mean_y=mean_y)

    def laws(self, theta: Column) -> Column:
        """E, A, B, alpha, beta of rows of log E, log A / N0^alpha, log B / D0^beta, alpha, beta."""
        e, a, b, alpha, beta = np.moveaxis(theta, -1, 0)
        return np.stack(
            [np.exp(e), np.exp(a + alpha * self.mean_x), np.exp(b + beta * self.mean_y), alpha, beta], axis=-1
        )

    def shares(self, theta: Column) -> tuple[Column, Column]:
        """Log loss of each point by each row, (rows, points), and the part of each term in it, (3, rows, points)."""
        e, a, b, alpha, beta = (column[:, None] for column in theta.T)
        logs = np.stack(np.broadcast_arrays(e, a - alpha * self.x, b - beta * self.y))
        top = logs.max(axis=0)
        terms = np.exp(logs - top)
        total = terms.sum(axis=0)
        return top + np.log(total), terms / total

    def slopes(self, shares: Column) -> Column:
        """Derivatives of the log loss by theta: (rows, points, 5)."""
        e, a, b = shares
        return np.stack([e, a, b, -a * self.x, -b * self.y], axis=-1)

    def objective(self, theta: Column, counts: Column, delta: float) -> Column:
        """The Huber loss of each row's log residuals, over points as often as they count."""
        size = np.abs(self.z - self.shares(theta)[0])
        return np.asarray((counts * np.where(size <= delta, size**2 / 2, delta * (size - delta / 2))).sum(axis=1))


def fit_law(runs: SeedRuns, *, keep_outliers: bool = False, resamples: int = _RESAMPLES) -> Fit:
    """The law of the least Huber loss of log residuals, outliers left out (and named) unless they are to stay.

    InputError with fewer than `FEWEST_RUNS` runs.
    """
    if len(runs) < FEWEST_RUNS:
        raise InputError(
            f"{runs.source}: {len(runs)} run{'s' * (len(runs) != 1)} given, allowed is {FEWEST_RUNS} or more: "
            "the law has five parameters"
        )
    kept = np.ones(len(runs), dtype=np.bool_)
    theta, residuals = _fit(_Points.of(runs))
    everything = residuals
    dropped: list[int] = []
    while not keep_outliers and len(dropped) < _may_drop(len(runs)):
        far = np.abs(residuals) > max(_OUTLIER_DEVIATIONS * _scale(residuals), _OUTLIER_ERROR)
        if not far.any():
            break
        # One at a time, because an outlier bends the law so that others look like ones.
        dropped.append(int(np.flatnonzero(kept)[np.argmax(np.abs(residuals))]))
        kept[dropped[-1]] = False
        theta, residuals = _fit(_Points.of(runs.select(kept)))
    own = runs.select(kept)
    points = _Points.of(own)
    if dropped:
        everything = np.log(runs.loss) - np.log(_losses(points.laws(theta[None])[0], runs))
    e, a, b, alpha, beta = points.laws(theta[None])[0].tolist()
    law = Law(name="fit", source=f"fitted to {len(own)} runs of {runs.source}", e=e, a=a, b=b, alpha=alpha, beta=beta)
    return Fit(
        law=law,
        runs=own,
        dropped=[_dropped(runs, i, float(everything[i])) for i in sorted(dropped)],
        resampled=points.laws(_resampled(points, theta, resamples)),
        residuals=residuals,
    )


def _may_drop(count: int) -> int:
    return int(_MOST_DROPPED * count) if count >= _FEWEST_TO_DROP_FROM else 0


def _scale(residuals: Column) -> float:
    """A standard deviation that outliers do not move, for what five parameters have left over."""
    left = len(residuals) / max(1, len(residuals) - 5)
    return _DEVIATION_OF_MEDIAN * float(np.median(np.abs(residuals))) * math.sqrt(left)


def _losses(law: Column, runs: SeedRuns) -> Column:
    e, a, b, alpha, beta = law
    return np.asarray(e + a / runs.parameters**alpha + b / runs.tokens**beta)


def _dropped(runs: SeedRuns, i: int, residual: float) -> Dropped:
    figures = {name: float(getattr(runs, name)[i]) for name in ("parameters", "tokens", "loss")}
    return Dropped(line=int(runs.line[i]), error=math.expm1(residual), **figures)


def _fit(points: _Points) -> tuple[Column, Column]:
    """The best theta, and the log residuals that it leaves."""
    theta = _starts(points)
    counts = np.ones((1, len(points.z)))
    # The loss is all but absolute values, so its optimum is approached from wider ones.
    for delta in (0.1, 0.01, HUBER_DELTA):
        theta = _descend(points, theta, counts, delta, steps=60)
    theta = _descend(points, theta, counts, HUBER_DELTA, steps=100, exact=True)
    best = theta[int(np.argmin(points.objective(theta, counts, HUBER_DELTA)))]
    return best, points.z - points.shares(best[None])[0][0]


def _starts(points: _Points) -> Column:
    """The best of a grid of exponents, for each of which E, A and B solve a linear problem (variable projection)."""
    grid = np.array([0.1, 0.2, 0.35, 0.5, 0.75, 1.1])
    alpha, beta = (axis.ravel() for axis in np.meshgrid(grid, grid))
    columns = (
        np.stack(
            [
                np.ones((len(alpha), len(points.z))),
                np.exp(-alpha[:, None] * points.x),
                np.exp(-beta[:, None] * points.y),
            ],
            axis=-1,
        )
        / np.exp(points.z)[:, None]
    )  # relative residuals
    normal = columns.swapaxes(1, 2) @ columns
    # A ridge too small to matter, for runs that leave a direction open.
    normal += 1e-9 * np.trace(normal, axis1=1, axis2=2)[:, None, None] * np.eye(3)
    solved = np.linalg.solve(normal, columns.sum(axis=1)[..., None])[..., 0]
    # A term must be positive; one that would not be starts small.
    least = 1e-2 * float(np.exp(points.z.min()))
    theta = np.column_stack([np.log(np.maximum(solved, least)), alpha, beta])
    order = np.argsort(points.objective(theta, np.ones((1, len(points.z))), HUBER_DELTA))
    return theta[order[:6]]


def _descend(
    points: _Points, theta: Column, counts: Column, delta: float, *, steps: int, exact: bool = False
) -> Column:
    """Rows of theta after so many damped steps, each down the Huber loss of its own counts, or none.

    Steps are those of reweighted least squares, or of Newton's method with the exact second derivatives, which ends
    at the optimum where the other only comes near.
    """
    objective = points.objective(theta, counts, delta)
    damping = np.full(len(theta), 1e-3)
    for _ in range(steps):
        step = _step(points, theta, counts, delta, damping, exact=exact)
        there = theta + np.clip(step, -1, 1)
        there[:, :3] = np.clip(there[:, :3], -_GREATEST_LOG, _GREATEST_LOG)
        there[:, 3:] = np.clip(there[:, 3:], _LEAST_EXPONENT, _GREATEST_EXPONENT)
        reached = points.objective(there, counts, delta)
        better = reached < objective
        gained = objective - reached
        theta = np.where(better[:, None], there, theta)
        objective = np.where(better, reached, objective)
        damping = np.clip(np.where(better, damping / 5, damping * 4), 1e-14, 1e8)
        if np.all((np.abs(gained) <= 1e-13 * objective) | (damping >= 1e8)):  # noqa: PLR2004 (as two lines above)
            break
    return theta


def _step(points: _Points, theta: Column, counts: Column, delta: float, damping: Column, *, exact: bool) -> Column:
    """The damped step of each row (Levenberg and Marquardt)."""
    logs, shares = points.shares(theta)
    slopes = points.slopes(shares)
    residuals = points.z - logs
    size = np.abs(residuals)
    pull = counts * np.clip(residuals, -delta, delta)
    weights = counts * (size <= delta if exact else delta / np.maximum(size, delta))
    curvature = (slopes * weights[..., None]).swapaxes(1, 2) @ slopes
    if exact:
        curvature += _second_derivatives(points, shares, slopes, pull)
    diagonal = np.abs(np.einsum("rii->ri", curvature))
    # The diagonal of a term that all but vanished must not make the matrix singular.
    floor = 1e-12 + 1e-9 * diagonal.max(axis=1, keepdims=True)
    damped = curvature + (damping[:, None] * np.maximum(diagonal, floor) + floor * 1e-3)[:, :, None] * np.eye(5)
    gradient = np.einsum("rn,rnk->rk", pull, slopes)
    return np.asarray(np.linalg.solve(damped, gradient[..., None])[..., 0])


def _second_derivatives(points: _Points, shares: Column, slopes: Column, pull: Column) -> Column:
    """What the curvature of the log loss itself adds: a log of a sum of exponentials of terms linear in theta."""
    ones, none = np.ones_like(points.x), np.zeros_like(points.x)
    linear = (
        np.stack([ones, none, none, none, none], axis=-1),
        np.stack([none, ones, none, -points.x, none], axis=-1),
        np.stack([none, none, ones, none, -points.y], axis=-1),
    )
    total = (slopes * pull[..., None]).swapaxes(1, 2) @ slopes
    for share, term in zip(shares, linear, strict=True):
        # Each row weighs the points differently, but the products of their slopes are the same: one multiplication.
        products = (term[:, :, None] * term[:, None, :]).reshape(len(term), 25)
        total -= ((pull * share) @ products).reshape(-1, 5, 5)
    return np.asarray(total)


def _resampled(points: _Points, theta: Column, resamples: int) -> Column:
    """Theta fitted to resamples of the points (with replacement), each from the fit of all of them."""
    random = np.random.default_rng(0)  # the same runs give the same interval
    count = len(points.z)
    counts = random.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
    start = np.repeat(theta[None], resamples, axis=0)
    return _descend(points, _descend(points, start, counts, 10 * HUBER_DELTA, steps=6), counts, HUBER_DELTA, steps=30)


# ---------------------------------------------------------------- how far to trust it


def doubts(fit: Fit, compute: float | None = None) -> list[Doubt]:
    """Every reason not to trust the fit, and its N and D for `compute` FLOP where that is given."""
    found = [*_doubts_of_fit(fit), *_doubts_of_runs(fit.runs)]
    if compute is not None:
        found += _doubts_of_distance(compute / float(fit.runs.compute.max()))
    return found


def _doubts_of_fit(fit: Fit) -> list[Doubt]:
    found = []
    if fit.dropped:
        lines = ", ".join(str(run.line) for run in fit.dropped)
        message = f"{len(fit.dropped)} outliers left out (lines {lines}); --keep-outliers keeps them"
        found.append(Doubt(kind="outliers_dropped", message=message))
    if fit.rms > LARGE_RESIDUAL:
        worst = int(np.argmax(np.abs(fit.residuals)))
        message = (
            f"the law misses the runs by {fit.rms:.1%} (allowed for a good fit is {LARGE_RESIDUAL:.0%}), most of all "
            f"line {fit.runs.line[worst]}, by {math.expm1(fit.residuals[worst]):+.0%}"
        )
        found.append(Doubt(kind="large_residuals", message=message, severe=True))
    if edges := fit.edges:
        message = f"the runs do not fix {' and '.join(edges)}: the optimum lies at the edge of what is allowed"
        found.append(Doubt(kind="at_the_edge", message=message, severe=True))
    return found


def _doubts_of_runs(runs: SeedRuns) -> list[Doubt]:
    found = []
    if len(runs) < ENOUGH_RUNS:
        message = (
            f"{len(runs)} runs are few: with 10, 20, 30, 50 of 240 published runs the optimal N came within 2x of the "
            "whole fit's in 40, 67, 87, 93 % of cases"
        )
        found.append(Doubt(kind="few_runs", message=message))
    for kind, what, consequence in _alike(runs):
        message = f"all runs have about the same {what}: {consequence}"
        found.append(Doubt(kind=kind, message=message, severe=True))
    return found


def _alike(runs: SeedRuns) -> list[tuple[str, str, str]]:
    """In what the runs do not differ: a word, the quantity, and what they therefore cannot say."""
    quantities = (
        ("one_compute_level", runs.compute, "compute", "nothing says how the optimum moves with compute"),
        ("fixed_ratio", runs.tokens / runs.parameters, "tokens per parameter", "nothing tells N from D"),
        ("one_size", runs.parameters, "model size", "nothing says what a larger model gains"),
        ("one_token_count", runs.tokens, "number of tokens", "nothing says what more tokens gain"),
    )
    return [(kind, what, so) for kind, values, what, so in quantities if values.max() < _ALIKE * values.min()]


def _doubts_of_distance(times: float) -> list[Doubt]:
    if times > VERY_FAR:
        message = (
            f"{times:,.0f}x the compute of the largest run is a guess: over 100x, intervals of resamples usually miss "
            "the truth, for they show the noise of the runs and no error of the law"
        )
        return [Doubt(kind="extrapolated_100x", message=message, severe=True)]
    if times > FAR:
        message = f"{times:.0f}x the compute of the largest run: the interval below is too narrow (over 10x)"
        return [Doubt(kind="extrapolated_10x", message=message)]
    return []


# ---------------------------------------------------------------- what to run next


@dataclass(frozen=True, slots=True, kw_only=True)
class NextRun:
    """A seed run worth doing: its size, tokens and FLOP, and by what it narrows the optimal N at the target.

    `spread_before` and `spread_after` are factors: N is known within that factor either way (one standard deviation).
    """

    parameters: float
    tokens: float
    compute: float
    over_largest: float
    ratio_over_middle: float
    middle: str
    spread_before: float
    spread_after: float

    @property
    def reason(self) -> str:
        """Why this one, in a line."""
        return (
            f"{self.over_largest:.2g}x the compute of the largest run, "
            f"{self.ratio_over_middle:.2g}x the tokens per parameter of {self.middle}"
        )


#: Compute of the suggested runs over the largest one so far, and their tokens per parameter over the optimal ones. A
#: step of two is what an extrapolation can be checked with at a bearable cost.
_STEP = 2.0
_COMPUTE_STEPS = _STEP ** np.arange(1, -4, -1.0)
_RATIOS = 2.0 ** np.arange(-2, 3)

#: What is known without any run: standard deviations of log E, log A, log B, alpha and beta.
_PRIOR = np.array([3.0, 3.0, 3.0, 0.3, 0.3])


def next_runs(fit: Fit, compute: float, count: int = 4) -> list[NextRun]:
    """The runs that narrow the optimal N for `compute` FLOP most, chosen one after the other.

    By the delta method: a run adds the outer product of its slopes to the information on the law's parameters, and
    so takes its part from the variance of log N. None has more than twice the compute of the largest run so far.
    """
    points = _Points.of(fit.runs)
    law = fit.law
    theta = np.array(
        [
            math.log(law.e),
            math.log(law.a) - law.alpha * points.mean_x,
            math.log(law.b) - law.beta * points.mean_y,
            law.alpha,
            law.beta,
        ]
    )
    noise = max(_scale(fit.residuals), HUBER_DELTA) ** 2
    slopes = points.slopes(points.shares(theta[None])[1])[0]
    covariance = np.linalg.inv(slopes.T @ slopes / noise + np.diag(_PRIOR**-2))
    direction = _direction(theta, points, compute)
    parameters, tokens, ratio = _candidates(fit, compute)
    there = _Points(
        x=np.log(parameters) - points.mean_x,
        y=np.log(tokens) - points.mean_y,
        z=np.zeros(len(tokens)),
        mean_x=points.mean_x,
        mean_y=points.mean_y,
    )
    slopes = there.slopes(there.shares(theta[None])[1])[0]
    cost = FLOP_PER_PARAMETER_TOKEN * parameters * tokens
    left = np.ones(len(cost), dtype=np.bool_)
    chosen: list[NextRun] = []
    while len(chosen) < count and left.any():
        reached = slopes @ covariance
        own = noise + np.einsum("nk,nk->n", reached, slopes)
        taken = np.where(left, (reached @ direction) ** 2 / own, -1.0)
        i = int(np.argmax(taken))
        before = float(direction @ covariance @ direction)
        covariance = covariance - np.outer(reached[i], reached[i]) / own[i]
        left[i] = False
        chosen.append(
            NextRun(
                parameters=float(parameters[i]),
                tokens=float(tokens[i]),
                compute=float(cost[i]),
                over_largest=float(cost[i] / fit.runs.compute.max()),
                ratio_over_middle=float(ratio[i]),
                middle="the optimum" if _points_the_way(fit) else "the runs",
                spread_before=_factor(before),
                spread_after=_factor(float(direction @ covariance @ direction)),
            )
        )
    return chosen


def _factor(variance: float) -> float:
    """A factor of one standard deviation of a logarithm; no more than can be printed."""
    return math.exp(min(math.sqrt(max(variance, 0.0)), 50.0))


def _points_the_way(fit: Fit) -> bool:
    """The fit's own optimum is a place to look around; otherwise the runs' own ratio is."""
    return fit.determined and not fit.edges


def _candidates(fit: Fit, compute: float) -> tuple[Column, Column, Column]:
    """Sizes and tokens of the runs to choose from, and their tokens per parameter over those of the middle."""
    runs = fit.runs
    most = min(float(runs.compute.max()) * _STEP, compute)
    levels = most / _COMPUTE_STEPS[0] * _COMPUTE_STEPS
    level, ratio = (axis.ravel() for axis in np.meshgrid(levels, _RATIOS, indexing="ij"))
    product = level / FLOP_PER_PARAMETER_TOKEN
    if _points_the_way(fit):
        middle = np.array([fit.law.optimal_parameters(float(flop)) for flop in level])
    else:
        middle = np.sqrt(product / np.exp(np.mean(np.log(runs.tokens / runs.parameters))))
    parameters = middle / np.sqrt(ratio)
    return parameters, product / parameters, ratio


def _direction(theta: Column, points: _Points, compute: float) -> Column:
    """Derivatives of log N at the optimum by theta; `optimal_parameters` in logarithms."""
    _, a, b, alpha, beta = theta.tolist()
    total = alpha + beta
    log_product = math.log(compute / FLOP_PER_PARAMETER_TOKEN)
    log_a, log_b = a + alpha * points.mean_x, b + beta * points.mean_y
    balance = math.log(alpha / beta) + log_a - log_b + beta * log_product
    by_alpha = (1 / alpha + points.mean_x) / total - balance / total**2
    by_beta = (-1 / beta - points.mean_y + log_product) / total - balance / total**2
    return np.array([0.0, 1 / total, -1 / total, by_alpha, by_beta])
