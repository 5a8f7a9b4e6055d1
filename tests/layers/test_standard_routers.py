"""Switch, GShard, expert choice, DeepSeek, MoGE, top-p, hash: what their papers say of them."""

import itertools
import math

import pytest
import torch

from moekit.core.errors import UserError
from moekit.layers import ExpertPool, MoELayer, SharedExpert, build_bank, build_router
from moekit.layers.select import taken_units
from moekit.layers.terms import ExpertBias
from tests.layers.examples import EXPERTS, WIDTH, context, hidden, router
from tests.layers.test_contract import weights_by_token


def softmax_of(module, rows):
    return (rows @ module.score.weight.T).softmax(-1)


def swiglu(count=EXPERTS, seed=0, expert_width=16):
    torch.manual_seed(seed)
    bank = build_bank("swiglu", WIDTH, count, expert_width=expert_width)
    with torch.no_grad():
        for param in bank.parameters():
            param.normal_(std=0.3)
    return bank


# -- plain top-k: what the others reduce to --


@pytest.mark.parametrize("name", ["softmax-raw", "softmax-renormalised"])
def test_plain_top_k_equals_its_definition(name):
    module, rows = router(name), hidden()
    probability = softmax_of(module, rows)
    weight, ids = probability.topk(2, -1)
    if name == "softmax-renormalised":
        weight = weight / weight.sum(-1, keepdim=True)
    found_ids, found = module(rows, context()).topk()
    assert torch.equal(found_ids, ids)
    torch.testing.assert_close(found, weight, rtol=1e-6, atol=0)


PLAIN = {
    "switch": ("softmax-raw", {"eval_capacity": 100.0}),
    "gshard": ("softmax-renormalised", {"eval_capacity": 100.0}),
    "deepseek-v2 all groups": ("softmax-raw", {"groups": 4, "keep_groups": 4}),
    "moge of one group": ("softmax-raw", {"groups": 1}),
}


@pytest.mark.parametrize("case", PLAIN)
def test_reduces_to_plain_top_k(case):
    name, (plain, options) = case.split()[0], PLAIN[case]
    routes = [router(name, **options), router(plain)]
    first, second = (weights_by_token(module(hidden(), context())) for module in routes)
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-7)


def test_all_groups_of_v3_are_plain_sigmoid_top_k():
    grouped = router("deepseek-v3", groups=4, keep_groups=4, scale=1.0)
    plain = router("loss-free")
    assert torch.equal(
        weights_by_token(grouped(hidden(), context())), weights_by_token(plain(hidden(), context()))
    )


@pytest.mark.parametrize(
    ("name", "options", "top_k"),
    [
        ("softmax-raw", {}, EXPERTS),
        ("switch", {"eval_capacity": 100.0}, EXPERTS),
        ("top-p", {"threshold": 1.0}, EXPERTS),
        ("expert-choice", {}, EXPERTS),
        ("moge", {"groups": 4}, EXPERTS),
    ],
)
def test_all_experts_make_the_dense_mixture(name, options, top_k):
    torch.manual_seed(0)
    module = build_router(name, WIDTH, EXPERTS, top_k, **options)
    with torch.no_grad():
        module.score.weight.normal_(std=0.5)
    rows, bank = hidden(), swiglu()
    probability = softmax_of(module, rows)
    dense = sum(probability[:, e, None] * bank.run_one(e, rows) for e in range(EXPERTS))
    out = ExpertPool([bank])(rows, module(rows, context()))
    torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-6)


# -- capacity --


def capped(order, top_k=2, factor=1.0):
    torch.manual_seed(0)
    options = {"weights": "raw", "eval_capacity": factor, "order": order}
    module = build_router("pipeline", WIDTH, EXPERTS, top_k, **options)
    with torch.no_grad():
        module.score.weight.normal_(std=0.5)
    return module


@pytest.mark.parametrize("order", ["token", "choice", "weight", "random"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_no_expert_gets_more_than_its_places(order, factor):
    routing = capped(order, factor=factor)(hidden(), context())
    places = math.ceil(factor * 2 * 12 / EXPERTS)
    assert routing.counts().max() <= places
    assert routing.num_dropped + len(routing.token) == 24
    # An expert loses pairs only when it is full.
    lost = routing.wanted() - routing.counts()
    assert (routing.counts()[lost > 0] == places).all()


def test_first_choices_come_before_second_ones():
    routing = capped("choice", factor=0.5)(hidden(), context())
    all_pairs = router("softmax-raw")(hidden(), context())
    assert torch.equal(all_pairs.wanted(), routing.wanted())
    ids, _ = all_pairs.topk()
    places, taken, kept = math.ceil(0.5 * 2 * 12 / EXPERTS), [0] * EXPERTS, set()
    for choice, token in itertools.product(range(2), range(12)):
        expert = int(ids[token, choice])
        if taken[expert] < places:
            taken[expert] += 1
            kept.add((token, expert))
    found = set(zip(routing.token.tolist(), routing.expert.tolist(), strict=True))
    assert found == kept


def test_the_heaviest_pairs_keep_their_place_by_weight():
    routing = capped("weight", factor=0.5)(hidden(), context())
    full = weights_by_token(router("softmax-raw")(hidden(), context()))
    for expert in routing.dropped[:, 1].unique().tolist():
        lost = full[routing.dropped[routing.dropped[:, 1] == expert, 0], expert]
        assert lost.max() <= routing.weight[routing.expert == expert].min()


def test_order_decides_who_is_dropped_and_never_how_many():
    rows = hidden()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(8))
    module = capped("token", factor=0.5)
    first, turned = module(rows, context()), module(rows[order], context())
    assert torch.equal(first.counts(), turned.counts())
    back = weights_by_token(turned)[order.argsort()]
    assert not torch.equal(back, weights_by_token(first))


def test_gshard_thins_later_choices_in_training_only():
    rows = hidden(8, 64)
    module = router("gshard", capacity=100.0, eval_capacity=100.0)
    whole = module(rows, context(8, 64))
    thinned = module(rows, context(8, 64, training=True))
    assert (thinned.rank() == 0).sum() == 512
    second = whole.weight.detach().view(-1, 2)[:, 1]
    expected = (2 * second).clamp_max(1).sum()
    spread = float((2 * second * (1 - 2 * second).clamp_min(0)).sum().sqrt())
    # Four standard deviations of as many independent draws.
    assert abs(int((thinned.rank() == 1).sum()) - float(expected)) < 4 * spread
    assert thinned.num_dropped == 0


def test_jitter_is_a_matter_of_training():
    module, rows = router("switch"), hidden()
    still = module(rows, context()).logits
    shaken = module(rows, context(training=True)).logits
    assert torch.equal(still, rows @ module.score.weight.T)
    assert 0 < (shaken - still).abs().max() < 0.2


# -- expert choice --


@pytest.mark.parametrize("within", ["batch", "sequence"])
def test_every_expert_takes_the_same_number_of_tokens(within):
    routing = router("expert-choice", within=within)(hidden(2, 8), context(2, 8))
    assert torch.equal(routing.counts(), torch.full((EXPERTS,), 2 * 16 / EXPERTS))


@pytest.mark.parametrize("cap", [None, 3, 2])
def test_a_cap_on_the_experts_of_a_token(cap):
    torch.manual_seed(0)
    module = build_router("expert-choice", WIDTH, EXPERTS, 2, cap=cap)
    with torch.no_grad():
        module.score.weight.normal_(std=0.5)
    routing = module(hidden(4, 16) + 0.5, context(4, 16))
    assert torch.equal(routing.counts(), torch.full((EXPERTS,), 16.0))
    most = int(torch.bincount(routing.token).max())
    assert most == cap if cap is not None else most > 3


def test_who_is_refused_takes_the_next_best():
    # Both experts like unit 0 best; expert 1 more so. Expert 0 goes on to unit 2.
    scores = torch.tensor([[[0.8, 0.9], [0.1, 0.3], [0.5, 0.2]]])
    assert taken_units(scores, take=1)[0].nonzero().tolist() == [[0, 0], [0, 1]]
    assert taken_units(scores, take=1, cap=1)[0].nonzero().tolist() == [[0, 1], [2, 0]]


def test_experts_never_take_padding():
    mask = torch.ones(16, dtype=torch.bool)
    mask[4:8] = False
    routing = router("expert-choice")(hidden(2, 8), context(2, 8, token_mask=mask))
    assert mask[routing.token].all()


# -- DeepSeek --


def test_splitting_experts_changes_nothing():
    """DeepSeekMoE: every expert cut in m parts of its width, its router row copied m times."""
    parts, rows = 2, hidden()
    coarse = MoELayer(router("softmax-raw"), ExpertPool([swiglu()]))
    fine_router = build_router("softmax-raw", WIDTH, parts * EXPERTS, parts * 2, scale=parts)
    bank = coarse.pool.banks[0]
    fine_bank = swiglu(parts * EXPERTS, expert_width=8)
    gate, up = bank.gate_up_proj.chunk(2, 1)
    cut = [(g, u) for g, u in zip(gate.split(8, 1), up.split(8, 1), strict=True)]
    with torch.no_grad():
        fine_router.score.weight.copy_(coarse.router.score.weight.repeat_interleave(parts, 0))
        slices = torch.stack([torch.cat(pair, 1) for pair in cut], 1)
        fine_bank.gate_up_proj.copy_(slices.flatten(0, 1))
        down = torch.stack(bank.down_proj.split(8, 2), 1)
        fine_bank.down_proj.copy_(down.flatten(0, 1))
    fine = MoELayer(fine_router, ExpertPool([fine_bank]))
    batch = rows.view(2, 6, WIDTH)
    torch.testing.assert_close(fine(batch), coarse(batch), rtol=1e-5, atol=1e-5)


def bias_of(module) -> ExpertBias:
    return next(part for part in module.modules() if isinstance(part, ExpertBias))


def test_the_bias_decides_the_choice_and_never_the_weight():
    module, rows = router("loss-free"), hidden()
    before = module(rows, context())
    bias_of(module).expert_bias += 3.0
    assert torch.equal(module(rows, context()).expert, before.expert)
    bias_of(module).expert_bias[5] += 10.0
    after = module(rows, context())
    ids, weight = after.topk()
    assert (ids == 5).any(1).all()
    scores = torch.sigmoid(rows @ module.score.weight.T).gather(1, ids)
    torch.testing.assert_close(weight, scores / scores.sum(-1, keepdim=True))
    assert not bias_of(module).expert_bias.requires_grad


def test_groups_limit_the_experts_of_a_token_also_when_scores_are_negative():
    module = router("deepseek-v3", groups=4, keep_groups=1)
    # Biased scores below zero: a mask of zero would then let forbidden experts win.
    bias_of(module).expert_bias -= 5.0
    ids, _ = module(hidden(), context()).topk()
    assert ((ids // 2).amax(1) == (ids // 2).amin(1)).all()


def test_a_group_is_as_good_as_its_best_or_its_best_two():
    # One token whose best expert sits in group 0 and whose best pair is group 1.
    scores = torch.tensor([[0.9, 0.0, 0.6, 0.5]])
    for name, group in (("max", 0), ("top2", 1)):
        options = {"weights": "raw", "squash": "identity", "groups": 2, "group_score": name}
        module = build_router("pipeline", 8, 4, 2, **options)
        with torch.no_grad():
            module.score.weight.zero_()
            module.score.weight[:, 0] = scores[0]
        ids, _ = module(torch.eye(8)[:1], context(1, 1)).topk()
        assert (ids // 2 == group).all()


def test_the_bias_brings_a_skewed_load_to_balance():
    """Fixed skewed logits, no gradient: MaxVio falls from about 0.9 to a floor of the noise."""
    torch.manual_seed(0)
    experts, tokens, rate = 16, 2000, 1e-3
    module = build_router("loss-free", 16, experts, 2, bias_rate=rate)
    skew = torch.linspace(-0.5, 0.5, experts)
    with torch.no_grad():
        module.score.weight.copy_(torch.eye(16))

    def excess(step: int) -> float:
        rows = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(step))
        counts = module(rows + skew, context(1, tokens)).counts()
        module.after_step(counts)
        return float(counts.max() / counts.mean() - 1)

    course = [excess(step) for step in range(250)]
    assert course[0] > 0.6
    # The largest of 16 loads of 250 expected pairs exceeds the mean by a few of its 1 / sqrt(250).
    assert max(course[-20:]) < 4 / math.sqrt(tokens * 2 / experts)


# -- top-p --


def test_top_p_takes_what_passes_the_threshold_and_no_more():
    for threshold in (0.2, 0.4, 0.7):
        torch.manual_seed(0)
        module = build_router("top-p", WIDTH, EXPERTS, EXPERTS, threshold=threshold)
        with torch.no_grad():
            module.score.weight.normal_(std=0.3)
        routing = module(hidden(), context())
        total = torch.zeros(12).index_add(0, routing.token, routing.weight)
        last = routing.rank() == torch.bincount(routing.token)[routing.token] - 1
        assert (total > threshold).all()
        assert (total - routing.weight[last] <= threshold + 1e-6).all()


def test_top_p_sets_are_nested_and_start_at_top_1():
    sets = []
    for threshold in (0.0, 0.3, 0.6, 0.9):
        module = router("top-p", threshold=threshold)
        module.select.limit = EXPERTS
        routing = module(hidden(), context())
        sets.append(set(zip(routing.token.tolist(), routing.expert.tolist(), strict=True)))
    assert len(sets[0]) == 12
    assert sets[0] < sets[1] < sets[2] < sets[3]


# -- MoGE --


def test_every_group_gets_the_same_number_of_calls():
    torch.manual_seed(0)
    module = build_router("moge", WIDTH, EXPERTS, 4, groups=4)
    plain = build_router("softmax-raw", WIDTH, EXPERTS, 4)
    with torch.no_grad():
        module.score.weight.normal_(std=0.5)
        plain.score.weight.copy_(module.score.weight)
    routing = module(hidden(), context())
    assert torch.equal(routing.counts().view(4, 2).sum(1), torch.full((4,), 12.0))
    # The price of the quota: never more probability than the best experts anywhere.
    _, mass = routing.topk()
    best_ids, best = plain(hidden(), context()).topk()
    assert (mass.sum(1) <= best.sum(1) + 1e-6).all()
    balanced = (best_ids // 2).sort(1).values.eq(torch.arange(4)).all(1)
    same = (mass.sum(1) - best.sum(1)).abs() < 1e-6
    assert torch.equal(balanced, same)


# -- hash --


def test_a_token_id_always_gets_the_same_experts_and_layers_differ():
    module = router("hash")
    ids = torch.tensor([7, 3, 7, 9, 3, 7] * 2)
    rows = hidden()
    chosen, weight = module(rows, context(token_id=ids)).topk()
    assert torch.equal(chosen[0], chosen[2])
    assert torch.equal(chosen[1], chosen[4])
    assert (weight == 0.5).all()
    other, _ = module(rows, context(token_id=ids, layer=1)).topk()
    assert not torch.equal(chosen, other)


def test_a_hash_spreads_ids_evenly():
    ids = torch.arange(8000)
    counts = router("hash")(torch.zeros(8000, WIDTH), context(1, 8000, token_id=ids)).counts()
    # 2000 pairs an expert expected; five standard deviations.
    assert (counts - 2000).abs().max() < 5 * math.sqrt(2000)


def test_hash_without_ids_is_refused():
    with pytest.raises(UserError, match="token id"):
        router("hash")(hidden(), context(token_id=None))


# -- shared experts --


def test_ways_to_join_a_shared_expert():
    rows = hidden()
    routed = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(6))
    own = swiglu(1)
    plain = SharedExpert(WIDTH, own)(rows, routed)
    torch.testing.assert_close(plain, routed + own.run_one(0, rows))
    residual = SharedExpert(WIDTH, own, join="coefficients")
    with torch.no_grad():
        residual.coefficients.weight.zero_()
        # Coefficients (0, 1): the dense model.
        residual.coefficients.bias.copy_(torch.tensor([-100.0, 100.0]))
    torch.testing.assert_close(residual(rows, routed), own.run_one(0, rows))
    gated = SharedExpert(WIDTH, own, join="gate")
    torch.nn.init.zeros_(gated.gate.weight)
    torch.testing.assert_close(gated(rows, routed), routed + 0.5 * own.run_one(0, rows))
