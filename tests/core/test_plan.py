"""Plans: what they mean, how they compose, and what is refused with which numbers."""

import dataclasses
import json
import random

import pytest

from moekit.core.errors import UserError
from moekit.core.plan import Action, ExpertPlan, Fingerprint


@dataclasses.dataclass
class Layer:
    layer_index: int
    num_experts: int = 8
    top_k: int = 2
    num_groups: int = 1
    topk_groups: int = 1
    group_score: str | None = None
    hidden_size: int = 32
    expert_width: int = 24


@dataclasses.dataclass
class Spec:
    model_type: str = "mixtral"
    per_layer: list = dataclasses.field(default_factory=lambda: [Layer(1), Layer(2)])


MODEL = {"model_type": "mixtral", "layers": [1, 2], "num_experts": 8, "top_k": 2}


def text(layers=None, **more):
    head = {"format": "moekit.plan", "version": 1, "layers": layers or {}}
    return json.dumps(head | more)


def plan(layers=None, **more):
    return ExpertPlan.from_json(text(layers, **more))


def test_json_has_every_action():
    made = plan(
        {
            "1": {
                "drop": [5, 1],
                "protect": [2],
                "groups": [{"0": 0.6, "3": 0.4}],
                "bits": {"2": 4, "4-6": 8, "3": 2.5},
                "rank": {"7": 3},
                "width": {"4": 16},
            },
            "2": {},
        },
        note="by hand",
        model=MODEL,
    )
    assert made.layers == {
        1: {
            0: Action(group=0, weight=0.6, bits=2.5),
            1: Action(drop=True),
            2: Action(bits=4, protect=True),
            3: Action(group=0, weight=0.4),
            4: Action(bits=8, width=16),
            5: Action(drop=True),
            6: Action(bits=8),
            7: Action(rank=3),
        }
    }
    assert made.note == "by hand"
    assert made.dropped(1) == [1, 5]
    assert made.groups(1) == {0: {0: 0.6, 3: 0.4}}
    assert made.survivors(1, 8) == [0, 2, 4, 6, 7]
    assert made.survivors(2, 8) == list(range(8))
    assert made.uses() == ["drop", "group", "bits", "rank", "width", "protect"]
    assert made.result().num_experts == (5, 8)
    assert ExpertPlan.from_json(made.to_json()) == made
    made.validate(Spec())


def test_keep_is_the_complement_of_drop():
    kept = plan({"2": {"keep": [7, 0, 2]}}, model=MODEL)
    assert kept == plan({"2": {"drop": [1, 3, 4, 5, 6]}}, model=MODEL)


def test_group_is_named_by_its_lowest_member_whatever_the_label():
    a = ExpertPlan({1: {3: Action(group=9, weight=0.5), 6: Action(group=9, weight=0.5)}})
    b = ExpertPlan({1: {6: Action(group=0, weight=0.5), 3: Action(group=0, weight=0.5)}})
    assert a == b
    assert a.groups(1) == {3: {3: 0.5, 6: 0.5}}


def test_equal_neighbours_share_a_key():
    made = plan({"1": {"bits": {"0-3": 4, "4": 8, "6": 8, "7": 8}}})
    line = made.to_json().splitlines()[4]
    assert json.loads("{" + line + "}") == {"1": {"bits": {"0-3": 4, "4": 8, "6-7": 8}}}


def test_save_and_load(tmp_path):
    made = plan({"1": {"drop": [1]}}, model=MODEL | {"num_experts": [8, 4], "top_k": [2, 1]})
    made.save(tmp_path / "plan.json")
    assert ExpertPlan.load(tmp_path / "plan.json") == made
    assert ExpertPlan.load(tmp_path / "plan.json").model == made.model
    with pytest.raises(UserError, match="cannot be read"):
        ExpertPlan.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 50_000, "not valid JSON"),
        ("[]", "no plan"),
        ('{"version": 1}', '"format" must be "moekit.plan"'),
        (text(version=2), "version 2; this moekit reads version 1"),
        (text(extra=1), "unknown key 'extra'"),
        (text(note=3), "note"),
        (text(layers=[1]), "must map layer numbers"),
        (text({"one": {}}), "layer 'one' is no number"),
        (text({"-1": {}}), "layer '-1' is no number"),
        (text({"1": []}), "layer 1 must map actions"),
        (text({"1": {"prune": [1]}}), "layer 1 has the unknown key 'prune'; known: keep, drop"),
        (text({"1": {"drop": 3}}), "layer 1, drop must be a list"),
        (text({"1": {"drop": ["x"]}}), "expert 'x' is no number"),
        (text({"1": {"drop": [True]}}), "expert True is no number"),
        (text({"1": {"keep": [0, 1]}}), 'keep, which needs "model"'),
        (text({"1": {"keep": [0], "drop": [1]}}, model=MODEL), "both keep and drop"),
        (text({"1": {"keep": [0, 8]}}, model=MODEL), "keeps expert 8, it has 0 to 7"),
        (text({"1": {"bits": [4]}}), "bits must map experts to numbers"),
        (text({"1": {"bits": {"0": "4"}}}), "'4' for expert 0 is no number"),
        (text({"1": {"rank": {"0": 1.5}}}), "1.5 for expert 0 is no number"),
        (text({"1": {"bits": {"5-2": 4}}}), "'5-2' is no range"),
        (text({"1": {"bits": {"0-99999999999": 4}}}), "is no range"),
        (text({"1": {"bits": {"0-3": 4, "2": 8}}}), "layer 1, expert 2 has two values of bits"),
        (text({"1": {"groups": [[0, 1]]}}), "must map experts to weights"),
        (text({"1": {"groups": [{"0": 1}, {"0": 1}]}}), "expert 0 has two values of group"),
        (text({"1": {"groups": [{"0": 1, "1": 1}], "drop": [1]}}), "both dropped and folded"),
        (text({"1": {"drop": [1], "protect": [1]}}), "both dropped and protected"),
        (text({"1": {"groups": [{"0": float("nan")}]}}), "NaN is no JSON number"),
        (text({"1": {"groups": [{"0": 7}]}}).replace("7", "1e999"), "weight inf"),
        (text({"1": {"groups": [{"0": 1, "1": 1}], "bits": {"0": 4, "1": 8}}}), "bits [4, 8]"),
        (text(model=[]), '"model" must have'),
        (text(model={**MODEL, "layers": 3}), "layers a list"),
        (text(model={**MODEL, "num_experts": [8]}), "1 values of num_experts for 2 layers"),
        (text(model={**MODEL, "top_k": "two"}), "top_k 'two' is no number"),
    ],
)
def test_bad_json(content, message):
    with pytest.raises(UserError) as caught:
        ExpertPlan.from_json(content, "my.json")
    assert message in str(caught.value)
    assert "my.json" in str(caught.value) or "Layer 1" in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"3": {"drop": [1]}}, r"layer 3, which is no MoE layer; those are 1-2 \(2 layers\)"),
        ({"1": {"drop": [8]}}, "layer 1, expert 8; the layer has experts 0 to 7"),
        ({"1": {"drop": list(range(7))}}, r"leaves 1 of 8 experts in layer 1, .* chooses 2"),
        ({"1": {"groups": [{str(e): 0.1 for e in range(7)}], "drop": [7]}}, "leaves 1 of 8"),
        ({"1": {"bits": {"0": 33}}}, "expert 0 bits 33; it must be at most 32"),
        ({"1": {"bits": {"0": 0}}}, "bits 0"),
        ({"1": {"rank": {"0": 25}}}, "rank 25; it must be at most 24"),
        ({"1": {"rank": {"0": 0}}}, "rank 0"),
        ({"1": {"width": {"0": 25}}}, "width 25; it must be at most 24"),
        (
            {"1": {"groups": [{"0": 0, "2": 0}]}},
            r"folds experts \[0, 2\] .* all 0",
        ),
    ],
)
def test_what_does_not_fit_the_model(layers, message):
    with pytest.raises(UserError, match=message):
        plan(layers).validate(Spec())


def test_plan_for_another_model():
    made = plan({"1": {"drop": [1]}}, model=MODEL)
    made.validate(Spec())
    for spec, message in [
        (Spec("olmoe"), "mixtral, 2 MoE layers, 8 experts, top-2; this one has olmoe"),
        (Spec(per_layer=[Layer(1), Layer(3)]), r"layers 1, 3 instead of 1-2"),
        (Spec(per_layer=[Layer(1), Layer(2, num_experts=6)]), "layer 2: 6 experts instead of 8"),
        (Spec(per_layer=[Layer(1), Layer(2, top_k=3)]), "top-2-3"),
    ]:
        with pytest.raises(UserError, match=message):
            made.validate(spec)


def test_layer_numbers_that_occur_twice():
    spec = Spec("nllb-moe", [Layer(1), Layer(3), Layer(3)])
    with pytest.raises(UserError, match="has 2 sets of experts with layer number 3"):
        plan({"1": {"drop": [1]}}).validate(spec)
    plan().validate(spec)


def grouped(**more):
    layer = {"num_groups": 4, "topk_groups": 2, "num_experts": 16, "top_k": 2} | more
    return Spec(per_layer=[Layer(1, **layer)])


@pytest.mark.parametrize(
    ("drop", "more", "message"),
    [
        ([0, 4, 8, 12], {}, None),
        ([0, 1, 2, 3], {}, r"leaves \[0, 4, 4, 4\] experts in the 4 groups of layer 1 \(4 each"),
        ([0], {}, r"\[3, 4, 4, 4\]"),
        ([e for e in range(16) if e % 4], {"group_score": "max"}, None),
        ([e for e in range(16) if e % 4], {"group_score": "top2"}, "leaves 1 .* 2 are needed"),
        ([e for e in range(16) if e % 4 > 1], {"top_k": 6}, "leaves 2 .* 3 are needed"),
        ([e for e in range(16) if e % 4 > 1], {"top_k": 4}, None),
    ],
)
def test_group_limited_routing(drop, more, message):
    made = plan({"1": {"drop": drop}})
    if message is None:
        made.validate(grouped(**more))
    else:
        with pytest.raises(UserError, match=message):
            made.validate(grouped(**more))


def random_plan(rng, num_experts, layers=(1, 2), **more):
    """A random valid plan; keeps at least one expert."""
    made = {}
    for layer in layers:
        actions = {}
        free = list(range(num_experts))
        rng.shuffle(free)
        for expert in [free.pop() for _ in range(rng.randint(0, num_experts // 3))]:
            actions[expert] = Action(drop=True)
        while len(free) > 2 and rng.random() < 0.5:
            members = [free.pop() for _ in range(rng.randint(1, min(3, len(free) - 1)))]
            bits = rng.choice([None, 4, 8])
            for expert in members:
                weight = rng.uniform(-1, 1)
                actions[expert] = Action(group=members[0], weight=weight, bits=bits)
        for expert in free:
            actions[expert] = Action(
                bits=rng.choice([None, 2, 4]),
                rank=rng.choice([None, 5]),
                width=rng.choice([None, 8, 16]),
                protect=rng.random() < more.get("protect", 0),
            )
        made[layer] = actions
    return ExpertPlan(made)


def apply(made, layer, experts):
    """What a plan does, said once more without looking at the code: experts are
    (vector over original experts, bits, rank, width)."""
    result = {}
    for index, (vector, *kept) in enumerate(experts):
        action = made.action(layer, index)
        if action.drop:
            continue
        if action.group is None:
            given = (action.bits, action.rank, action.width)
            new = [old if value is None else value for old, value in zip(kept, given, strict=True)]
            new[2] = min((w for w in (kept[2], action.width) if w is not None), default=None)
            result[index] = (vector, *new)
        else:
            scaled = [action.weight * x for x in vector]
            if action.group == index:
                result[index] = (scaled, action.bits, action.rank, action.width)
            else:
                leader = result[action.group]
                added = [a + b for a, b in zip(leader[0], scaled, strict=True)]
                result[action.group] = (added, *leader[1:])
    return [result[index] for index in sorted(result)]


def originals(count):
    return [([float(i == j) for j in range(count)], None, None, None) for i in range(count)]


def same(a, b):
    """Equal up to the rounding of products of weights (three factors below one)."""
    return len(a) == len(b) and all(
        x[1:] == y[1:] and x[0] == pytest.approx(y[0], abs=1e-12) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("seed", range(60))
def test_composition_equals_applying_one_after_the_other(seed):
    rng = random.Random(seed)
    count = rng.randint(4, 12)
    plans, left = [], originals(count)
    for _ in range(3):
        plans.append(random_plan(rng, len(left), layers=(1,)))
        left = apply(plans[-1], 1, left)
    a, b, c = plans
    assert same(apply(a.then(b).then(c), 1, originals(count)), left)
    assert same(apply(a.then(b.then(c)), 1, originals(count)), left)


@pytest.mark.parametrize("seed", range(60))
def test_composition_is_associative_and_has_an_identity(seed):
    rng = random.Random(seed)
    count = rng.randint(4, 12)
    a = random_plan(rng, count)
    left = min(len(a.survivors(layer, count)) for layer in (1, 2))
    b = random_plan(rng, left)
    left = min(len(b.survivors(layer, left)) for layer in (1, 2))
    c = random_plan(rng, left)
    one, two = a.then(b).then(c), a.then(b.then(c))
    assert one.layers.keys() == two.layers.keys()
    for layer, actions in one.layers.items():
        assert actions.keys() == two.layers[layer].keys()
        for expert, action in actions.items():
            other = two.action(layer, expert)
            assert dataclasses.replace(action, weight=None) == dataclasses.replace(
                other, weight=None
            )
            # Three factors in another order: a few roundings of doubles.
            assert (action.weight or 0) == pytest.approx(other.weight or 0, rel=1e-12)
    assert a.then(ExpertPlan()) == a
    assert ExpertPlan().then(a) == a


def test_prune_then_condense_then_quantize():
    prune = plan({"1": {"drop": [1, 5]}}, model=MODEL, note="pruned")
    # Left are 0 2 3 4 6 7, now called 0 to 5.
    condense = plan({"1": {"groups": [{"1": 0.5, "4": 0.5}]}}, note="condensed")
    # 2 and 6 are one now; 0 2+6 3 4 7 are called 0 to 4.
    quantize = plan({"1": {"bits": {"0-4": 4}}, "2": {"bits": {"0-7": 8}}})
    whole = prune.compose(condense).compose(quantize)
    assert whole.dropped(1) == [1, 5]
    assert whole.groups(1) == {2: {2: 0.5, 6: 0.5}}
    assert [whole.action(1, e).bits for e in range(8)] == [4, None, 4, 4, 4, None, None, 4]
    assert whole.survivors(1, 8) == [0, 2, 3, 4, 7]
    assert whole.note == "pruned; condensed"
    assert whole.model == prune.model
    assert whole.result().num_experts == (5, 8)
    whole.validate(Spec())


def test_composition_checks_the_model_in_between():
    first = plan({"1": {"drop": [1]}}, model=MODEL)
    fits = plan({"1": {"drop": [6]}}, model=MODEL | {"num_experts": [7, 8]})
    assert first.then(fits).dropped(1) == [1, 7]
    with pytest.raises(UserError, match="is for mixtral, 2 MoE layers, 8 experts, top-2; the"):
        first.then(first)


def test_a_later_plan_tells_the_model_only_if_nothing_was_removed_before():
    later = plan({"1": {"drop": [1]}}, model=MODEL)
    assert plan({"1": {"bits": {"0": 4}}}).then(later).model == later.model
    assert plan({"1": {"drop": [0]}}).then(later).model is None


def test_protection_lasts():
    first = plan({"1": {"protect": [2], "drop": [0]}})
    with pytest.raises(UserError, match="drops expert 1, which holds expert 2 that"):
        first.then(plan({"1": {"drop": [1]}}))
    assert first.then(plan({"1": {"drop": [2]}})).dropped(1) == [0, 3]
    assert first.then(plan({"1": {"bits": {"1": 4}}})).action(1, 2) == Action(bits=4, protect=True)
    folded = plan({"1": {"protect": [2], "groups": [{"0": 0.5, "2": 0.5}]}})
    with pytest.raises(UserError, match="drops expert 0, which holds expert 2"):
        folded.then(plan({"1": {"drop": [0]}}))


def test_folding_forgets_earlier_bits():
    first = plan({"1": {"bits": {"0": 4, "1": 8, "2": 2}}})
    assert [first.then(plan({"1": {"groups": [{"0": 0.5, "1": 0.5}]}})).action(1, e).bits
            for e in range(3)] == [None, None, 2]  # fmt: skip


def test_table():
    made = plan(
        {"1": {"drop": [1, 5], "groups": [{"0": 0.6, "3": 0.4}], "bits": {"2": 4, "4": 8}}},
        model=MODEL,
        note="by hand",
    )
    lines = made.table().splitlines()
    assert lines[:2] == ["mixtral, 2 MoE layers, 8 experts, top-2", "by hand"]
    assert lines[2].split() == [
        "layer",
        "experts",
        "drop",
        "folded",
        "left",
        "router",
        "bits",
        "rank",
        "width",
        "protect",
    ]
    assert lines[3].split() == [
        "1",
        "8",
        "2",
        *["2", "to", "1"],
        "5",
        "slice",
        *["4", "to", "8"],
        "-",
        "-",
        "0",
    ]
    assert lines[4].split() == ["2", "8", "0", "0", "8", "slice", "-", "-", "-", "0"]
    assert len({len(line) for line in lines[2:]}) == 1
    assert plan({"1": {"drop": [1]}}).table().splitlines()[1].split()[:5] == [
        "1",
        "-",
        "1",
        "0",
        "-",
    ]


def test_diff():
    a = plan({"1": {"drop": [1], "bits": {"2": 4}, "protect": [2]}})
    b = plan({"1": {"bits": {"2": 8}, "groups": [{"3": 0.5, "4": 0.5}]}}, model=MODEL)
    assert a.diff(a) == []
    assert a.diff(b) == [
        "model: any model -> mixtral, 2 MoE layers, 8 experts, top-2",
        "layer 1, expert 1: drop -> keep",
        "layer 1, expert 2: bits 4, protect -> bits 8",
        "layer 1, expert 3: keep -> fold into 3 with weight 0.5",
        "layer 1, expert 4: keep -> fold into 3 with weight 0.5",
    ]


def test_fingerprint_of_a_spec():
    assert Fingerprint.of(Spec()) == Fingerprint("mixtral", (1, 2), (8, 8), (2, 2))
    assert Fingerprint.of(Spec()).experts_in(2) == 8
    assert Fingerprint.of(Spec()).experts_in(3) is None
