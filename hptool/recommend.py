"""What a budget trains: days, GPUs, tokens and sizes from each other, given the rates that models are to run at.

All of it is one equation, FLOP of the training = GPUs · rate · time, by the convention of `predict/flops.py`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median_low

from hptool.units import SECONDS_PER_DAY, TERA

#: How sure a size must be to end in time to be recommended: the slow end of the 80 % that predictions are shown with.
CONFIDENCE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """GPUs for some days."""

    gpus: int
    days: float

    def __post_init__(self) -> None:
        for name in ("gpus", "days"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                msg = f"{name}: {value} given, allowed is more than 0"
                raise ValueError(msg)

    def flop(self, tflops_per_gpu: float) -> float:
        """What it computes at that rate."""
        return self.gpus * self.days * SECONDS_PER_DAY * tflops_per_gpu * TERA


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """One model on a number of GPUs, and the tokens that it is to be trained on.

    `tflops_per_gpu` is the rate of its best layout, None where no layout holds it, with the reason in `refusal`.
    `error` is the relative standard deviation of the rate (lognormal), 0 where the rate is given. `flop_per_token` is
    of model FLOPs. `active_parameters` leave out the experts that a token does not see. Tokens are those of the encoder
    where there is one (`encoder`), beside which the decoder reads its own.
    """

    name: str
    parameters: float
    active_parameters: float
    flop_per_token: float
    tokens: float
    tflops_per_gpu: float | None
    error: float = 0.0
    layout: str = ""
    refusal: str = ""
    encoder: bool = False

    def days(self, gpus: float) -> float:
        """Expected days of the training; infinite where no layout holds the model."""
        if self.tflops_per_gpu is None:
            return math.inf
        return self.tokens * self.flop_per_token / (gpus * self.tflops_per_gpu * TERA * SECONDS_PER_DAY)

    def sure_days(self, gpus: float, confidence: float) -> float:
        """Days in which the training ends with that probability."""
        return self.days(gpus) * math.exp(NormalDist().inv_cdf(confidence) * self.error)

    def chance(self, budget: Budget) -> float:
        """Probability that the training ends within the budget."""
        days = self.days(budget.gpus)
        if not self.error or math.isinf(days):
            return float(days <= budget.days)
        return NormalDist().cdf(math.log(budget.days / days) / self.error)

    def fits(self, budget: Budget, confidence: float) -> bool:
        """Whether the training ends within the budget with that probability."""
        return self.sure_days(budget.gpus, confidence) <= budget.days

    def gpus(self, days: float) -> float:
        """GPUs that train it in so many days at its rate: the inverse of `days`, and no whole number."""
        return self.days(1) / days

    def tokens_within(self, budget: Budget) -> float:
        """Tokens that fill the budget; 0 where no layout holds the model."""
        return budget.flop(self.tflops_per_gpu or 0.0) / self.flop_per_token


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """The sizes of a family against a budget; `chosen` is the largest that fits, None where none does.

    `filling` parameters would take exactly the budget on `filling_tokens`, `sure_filling` with the asked-for
    confidence; `how` says from what they were found. All three are 0 where no layout holds any size.
    """

    budget: Budget
    confidence: float
    sizes: Sequence[Size]
    chosen: Size | None
    filling: float
    sure_filling: float
    filling_tokens: float
    how: str


def recommend(budget: Budget, sizes: Sequence[Size], confidence: float = CONFIDENCE) -> Recommendation:
    """The largest of `sizes` that trains within the budget with that confidence."""
    ordered = sorted(sizes, key=lambda size: size.parameters)
    fitting = [size for size in ordered if size.fits(budget, confidence)]
    possible = [size for size in ordered if size.tflops_per_gpu is not None]
    tokens = median_low(size.tokens for size in possible) if possible else 0.0
    # Sizes are comparable on the same tokens alone, and recipes differ in theirs.
    days = [size.days(budget.gpus) * tokens / size.tokens for size in possible]
    sure_days = [size.sure_days(budget.gpus, confidence) * tokens / size.tokens for size in possible]
    filling, how = _filling(possible, days, budget.days)
    return Recommendation(
        budget=budget,
        confidence=confidence,
        sizes=ordered,
        chosen=fitting[-1] if fitting else None,
        filling=filling,
        sure_filling=_filling(possible, sure_days, budget.days)[0],
        filling_tokens=tokens,
        how=how,
    )


def _filling(sizes: Sequence[Size], days: Sequence[float], budget_days: float) -> tuple[float, str]:
    """Parameters of the model that takes exactly `budget_days`, and how they were found.

    Between two sizes log parameters go linearly with log days: both terms of the FLOPs, the GEMMs and the attention,
    are all but powers of the size. Beyond them days go with the parameters of the nearest: a slope between the last
    two means little where they are much alike.
    """
    if not sizes:
        return 0.0, "no layout holds any size of the family"
    for low, high, low_days, high_days in zip(sizes[:-1], sizes[1:], days[:-1], days[1:], strict=True):
        if low_days <= budget_days <= high_days and low_days < high_days:
            step = math.log(high.parameters / low.parameters) / math.log(high_days / low_days)
            how = f"log days over log parameters, between {low.name} and {high.name}"
            return low.parameters * (budget_days / low_days) ** step, how
    at = 0 if budget_days < days[0] else len(sizes) - 1
    return sizes[at].parameters * budget_days / days[at], f"days in proportion to the parameters of {sizes[at].name}"


def fewest(enough: Callable[[int], bool], start: int, most: int) -> int | None:
    """The least count from `start` to `most` that is enough; None where none is found.

    Doubles until it is enough, then halves what lies between. Counts on which nothing can run are as good as too few,
    so that with such gaps the answer is enough, but may not be the least.
    """
    low, high = start - 1, start
    while not enough(high):
        if high >= most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
