"""Parameters are checked when a policy is built, and huge ones are clamped to the problem."""

from __future__ import annotations

import numpy as np
import pytest
from policy_cases import denoise, make_block

from sparse_dlm_attn import InvalidArgumentError, InvalidTypeError, UnknownNameError, get_policy


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("sliding-window:window=0", "window must be at least 1; got 0"),
        ("sliding-window:after=-1", "after must be at least 0; got -1"),
        ("streaming-llm:sinks=-1", "sinks must be at least 0; got -1"),
        ("streaming-llm:window=0", "window must be at least 1; got 0"),
        ("quest:budget=0", "budget must be at least 1; got 0"),
        ("quest:min_pages=0", "min_pages must be at least 1; got 0"),
        ("quest:dense_layers=-1", "dense_layers must be at least 0; got -1"),
        ("quest:page_count=round", "page_count must be one of floor, ceil; got 'round'"),
        ("quest:pages=all", "pages must be one of union, own; got 'all'"),
        ("quest:union_over=head", "union_over must be one of kv_head, query_head, layer; got 'head'"),
        ("quest:group_scores=sum", "group_scores must be one of query_head, mean, max; got 'sum'"),
        ("quest:first_pass=none", "first_pass must be one of dense, sparse; got None"),
        ("losa:budget=0", "budget must be at least 1; got 0"),
        ("losa:active=-1", "active must be at least 0; got -1"),
        ("losa:mass=1.5", r"mass must lie in 0\.\.1; got 1.5"),
        ("losa:mass=nan", r"mass must lie in 0\.\.1; got nan"),
        ("losa:drift=last", "drift must be one of previous, refresh; got 'last'"),
        ("losa:save_pass=skip", "save_pass must be one of step, dense, reuse; got 'skip'"),
        ("flashblock:limit=-1", "limit must be at least 0; got -1"),
        ("flashblock:dirty_rows=zero", "dirty_rows must be one of drop, keep; got 'zero'"),
        ("flashblock:save_pass=dense", "save_pass must be one of refresh, reuse; got 'dense'"),
        ("mage:budget=0", "budget must be at least 1; got 0"),
        ("mage:dense_layers=-2", "dense_layers must be at least 0; got -2"),
        ("sparsed:ratio=-0.1", r"ratio must lie in 0\.\.1; got -0.1"),
        ("sparsed:skip=2", r"skip must lie in 0\.\.1; got 2"),
        ("sparsed:warmup=-1", "warmup must be at least 0; got -1"),
        ("sparsed:variant=theirs", "variant must be one of code, paper; got 'theirs'"),
        ("sparsed:score_scale=0.1", r"score_scale must be one of attention, heads; got 0\.1"),
        ("fast-dllm:mode=triple", "mode must be one of prefix, dual; got 'triple'"),
        ("dkv-cache:mode=random", "mode must be one of decode, greedy; got 'random'"),
        ("dkv-cache:reload=0", "reload must be at least 1; got 0"),
        ("dkv-cache:neighbours=-1", "neighbours must be at least 0; got -1"),
        ("sparse-dllm:ratio=1.5", r"ratio must lie in 0\.\.1; got 1.5"),
        ("sparse-dllm:kernel=2", "kernel must be odd, so that it has a middle; got 2"),
        ("sparse-dllm:delay=-1", "delay must be at least 0; got -1"),
        ("snapkv:capacity=32", "capacity must exceed window=32; got 32"),
        ("snapkv:window=0", "window must be at least 1; got 0"),
        ("snapkv:kernel=4", "kernel must be odd, so that it has a middle; got 4"),
        ("snapkv:pooling=sum", "pooling must be one of avg, max; got 'sum'"),
        ("sparsed:span=0", "span must be at least 1; got 0"),
    ],
)
def test_a_value_outside_its_range_is_refused_by_name(policy: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        get_policy(policy)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("quest:budget=2.5", "budget must be an int; got 2.5"),
        ("quest:budget=true", "budget must be an int; got True"),
        ("quest:newest=1", "newest must be true or false; got 1"),
        ("losa:active=none", "active must be an int; got None"),
        ("losa:mass=half", "mass must be a number in 0..1; got 'half'"),
        ("sparsed:isolated=yes", "isolated must be true or false; got 'yes'"),
        ("sparsed:ratio=true", "ratio must be a number in 0..1; got True"),
        ("mage:budget=big", "budget must be an int; got 'big'"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(policy: str, message: str) -> None:
    with pytest.raises(InvalidTypeError, match=message):
        get_policy(policy)


def test_an_unknown_parameter_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'budget'"):
        get_policy("quest:buget=8")


@pytest.mark.parametrize(
    "policy",
    [
        "sliding-window:window={n},after={n}",
        "streaming-llm:sinks={n},window={n}",
        "quest:budget={n}",
        "quest:budget=1,min_pages={n},pages=own",
        "losa:active={n},budget={n},dense_layers={n}",
        "flashblock:limit={n}",
        "mage:budget={n},dense_layers={n}",
        "sparsed:warmup={n},span={n}",
        "dkv-cache:reload={n}",
        "dkv-cache:mode=greedy,neighbours={n}",
        "sparse-dllm:delay={n}",
        "snapkv:capacity={n}",
    ],
)
def test_values_beyond_every_integer_type_are_clamped(policy: str) -> None:
    block = make_block(80)
    for out, _ in denoise(policy.format(n=10**30), block):
        assert np.isfinite(out).all()


@pytest.mark.parametrize("name", ["losa", "quest", "sparsed", "mage", "flashblock", "streaming-llm"])
def test_policies_with_equal_parameters_are_equal_and_hashable(name: str) -> None:
    assert get_policy(name) == get_policy(name)
    assert len({get_policy(name), get_policy(name), get_policy("dense")}) == 2
