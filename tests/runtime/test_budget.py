"""Budget: the rows add up to the limit, and what cannot fit is refused with the numbers."""

import re

import numpy as np
import pytest

from moekit.core.errors import UserError
from moekit.core.memory import bytes_of
from moekit.runtime.budget import Needs, plan_budget

MB = 10**6
SIZES = np.full((4, 8), 3 * 2**20)
EVERYTHING = int(SIZES.sum())
NEEDS = Needs(400 * MB, 50 * MB, 20 * MB, 30 * MB, streams=2, max_context=1000)


def plan(limit, needs=NEEDS, available=10**12, **options):
    return plan_budget(limit, needs, SIZES, 2, available, **options)


@pytest.mark.parametrize("limit", [510 * MB, 555_555_555, 600 * MB, 2000 * MB, None])
@pytest.mark.parametrize("cache", [None, 20 * MB])
def test_rows_add_up(limit, cache):
    made = plan(limit, expert_cache=cache)
    *parts, (name, total, _) = made.rows()
    assert (name, total) == ("limit", made.limit)
    assert sum(count for _, count, _ in parts) == total
    assert all(count >= 0 for _, count, _ in parts)
    assert made.expert_cache <= min(EVERYTHING, cache or EVERYTHING)
    values = made.to_dict()
    assert values["expert_cache"] == made.expert_cache
    assert values["limit"] == made.limit


def test_the_rest_is_for_experts():
    small, large = plan(550 * MB), plan(560 * MB)
    grown = large.expert_cache - small.expert_cache
    assert grown == pytest.approx(10 * MB * 0.995, abs=4096)
    assert not large.complete
    whole = plan(2000 * MB)
    assert whole.complete
    assert whole.unused > 10**9


def test_without_a_limit_all_experts_or_what_is_left():
    assert plan(None).complete
    assert plan(None).unused < 10_000
    tight = plan(None, available=620 * MB)
    assert not tight.complete
    assert tight.limit == 558 * MB


def test_refused_with_all_numbers_and_a_way_out():
    with pytest.raises(UserError) as caught:
        plan(505 * MB)
    message = str(caught.value)
    for number in ("505 MB", "400 MB", "50.0 MB", "20.0 MB", "30.0 MB", "6.29 MB"):
        assert number in message
    least = bytes_of(re.search(r"at least (\d+ MB)", message)[1])
    assert plan(least).expert_cache >= 2 * 3 * 2**20


def test_a_cache_too_small_for_a_layer_is_refused():
    with pytest.raises(UserError, match="2 experts"):
        plan(None, expert_cache=3 * 2**20)
