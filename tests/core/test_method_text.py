"""Names of methods with options."""

import pytest

from moekit.core.cache_score import policy
from moekit.core.errors import UserError
from moekit.core.method_text import parse_method


def test_name_and_options():
    assert parse_method("lru") == ("lru", {})
    assert parse_method("a-b: x=1.5 , y=true,z=word,w=null") == (
        "a-b",
        {"x": 1.5, "y": True, "z": "word", "w": None},
    )


@pytest.mark.parametrize("text", ["lfu:", "lfu:half_life", ":x=1", "lfu:=3"])
def test_other_forms_are_refused(text):
    with pytest.raises(UserError, match="NAME:OPTION=VALUE"):
        parse_method(text)


def test_options_of_a_policy_change_its_settings():
    assert policy("lfu-aged").half_life == 128
    changed = policy("refreshed-set:half_life=64,refresh=32,hysteresis=0.5")
    assert (changed.half_life, changed.refresh, changed.hysteresis) == (64, 32, 0.5)
    assert changed.frequency


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lfu-aged:half_life=long", "half_life='long' is no number"),
        ("lfu-aged:age=3", "policy lfu-aged has no option 'age'; it has half_life"),
        ("lru:half_life=3", "policy lru has no option 'half_life'; it has none"),
        ("lfu-aged:half_life=-1", "half_life is -1 tokens"),
    ],
)
def test_wrong_options_of_a_policy(text, message):
    with pytest.raises(UserError, match=message):
        policy(text)
