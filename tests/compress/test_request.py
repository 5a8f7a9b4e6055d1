"""Requests: how many experts stay, and what is refused with its numbers."""

import pytest

from moekit.compress.request import check_protected, experts_per_layer
from moekit.core.errors import UserError
from moekit.core.layout import with_num_experts
from moekit.core.spec import spec_from_config
from tests.families.tiny import TINY


def spec(family="mixtral", experts=8):
    return spec_from_config(with_num_experts(TINY[family](), experts))


def kept(**measure):
    return set(experts_per_layer(spec(), **measure).values())


def test_ratio_rounds_the_share_that_goes_down():
    assert kept(ratio=0) == {8}
    assert kept(ratio=0.25) == {6}
    assert kept(ratio=0.3) == {6}
    assert kept(ratio=0.375) == {5}
    # 0.29 * 100 is 28.999999999999996 in binary.
    many = experts_per_layer(spec(experts=100), ratio=0.29)
    assert set(many.values()) == {71}


def test_size_is_that_of_the_whole_model():
    made = spec()
    routed = sum(8 * layer.params_per_expert for layer in made.per_layer)
    width = {"float32": 4}.get(made.dtype, 2)
    rest = (made.total_params - routed) * width
    one = routed // 8 * width
    assert kept(size=rest + 5 * one) == {5}
    assert kept(size=rest + 6 * one - 1) == {5}
    assert kept(size=10 * made.total_params) == {8}
    with pytest.raises(UserError, match="with the fewest the routers allow the model takes"):
        kept(size=rest + 2 * one - 1)


def test_groups_keep_as_many_each():
    grouped = spec("deepseek_v3", 16)
    groups = grouped.per_layer[0].num_groups
    assert groups > 1
    for count in range(2 * groups, 17):
        left = set(experts_per_layer(grouped, count=count).values())
        assert left == {-(-count // groups) * groups}
    with pytest.raises(UserError, match="needs"):
        experts_per_layer(grouped, count=1)


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        ({}, "give one of --ratio, --experts, --size, not none"),
        ({"ratio": 0.5, "count": 4}, "not --ratio and --experts"),
        ({"ratio": 1.0}, "from 0 to below 1"),
        ({"ratio": -0.1}, "from 0 to below 1"),
        ({"count": 1}, r"1 of 8 experts would stay in layer 0, and its router needs 2 \(top_k 2\)"),
        ({"ratio": 0.9}, "1 of 8 experts would stay in layer 0"),
        ({"count": 9}, "9 experts are to stay in layer 0, which has 8"),
    ],
)
def test_what_cannot_be_asked(measure, message):
    with pytest.raises(UserError, match=message):
        experts_per_layer(spec(), **measure)


def test_protected_experts():
    keep = experts_per_layer(spec(), count=3)
    check_protected(spec(), keep, {0: [1, 2, 3]})
    with pytest.raises(UserError, match="layer 0 protects 4 experts and keeps 3"):
        check_protected(spec(), keep, {0: [1, 2, 3, 4]})
    with pytest.raises(UserError, match="expert 8 cannot be protected"):
        check_protected(spec(), keep, {1: [8]})
    with pytest.raises(UserError, match="layer 7 has protected experts but is no MoE layer"):
        check_protected(spec(), keep, {7: [0]})
