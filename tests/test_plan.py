"""A plan: axes that a request fixes."""

from dataclasses import replace

import pytest

from hptool.base_config import BaseConfig
from hptool.candidates import Layout, SearchSpace
from hptool.errors import InputError
from hptool.plan import SearchRequest, make_plan, pinned
from tests.worker.runs import tiny_config, tiny_family


def experts(layout: Layout) -> BaseConfig:
    """A tiny model with experts on four nodes of four."""
    size = {"trainer__num_nodes": 4, "trainer__devices": 4, "model__global_batch_size": 32}
    return tiny_config(**tiny_family("moe", **size)).with_layout(replace(layout, mbs=1))


def test_an_override_fixes_the_expert_parallel_size() -> None:
    key = "model.expert_model_parallel_size=2"
    assert pinned(SearchSpace(), experts(Layout(ep=2)), [key]).ep == (2,)
    with pytest.raises(InputError, match="listed by --ep"):
        pinned(SearchSpace(ep=(1, 2)), experts(Layout(ep=2)), [key])


def test_expert_parallelism_without_experts_is_a_mistake() -> None:
    request = SearchRequest(model="gpt3/126m", cluster="dgx-a100", nodes=1, space=SearchSpace(ep=(2,)))
    with pytest.raises(InputError, match="--ep: 2 given, but no layout can have it: ep > 1 needs a model with experts"):
        make_plan(request)
