"""`hptool recommend`: the size that a budget trains, the days or GPUs of one size, or what a scaling law advises."""

from collections.abc import Mapping
from typing import Any

from hptool.recommendation.by_law import by_law
from hptool.recommendation.request import Request, Result, Say
from hptool.recommendation.sizes import largest, one_model


def answer(options: Mapping[str, Any], say: Say) -> Result:
    """What the flags ask for; InputError where they contradict each other or hold what cannot be."""
    request = Request.of(options)
    if request.law is not None or request.fit is not None:
        return by_law(request, say)
    if request.model is None:
        return largest(request)
    return one_model(request, request.model)
