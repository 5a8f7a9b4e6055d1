"""Losses at balance and at collapse, scopes against concatenation, biases against the optimum."""

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moekit.core.errors import UserError
from moekit.core.registry import registry
from moekit.layers import RouterContext, Routing
from moekit.layers.balance import (
    Balance,
    Schedule,
    coupling_loss,
    dual_value,
    move_bias,
    probabilities,
)
from moekit.layers.balance.load import by_sequence
from moekit.layers.balance.losses import balance_loss, compute_budget, top1_loss, z_loss

T, E, K = 24, 8, 2
SURE = 60.0  # a logit that leaves nothing to the others in float32


def routed(logits: Tensor, top_k: int = K, **fields) -> Routing:
    scores = logits.softmax(-1)
    weights, ids = scores.topk(top_k)
    return Routing.from_topk(ids, weights, logits.shape[1], logits=logits, scores=scores, **fields)


def balanced(top_k: int = K, experts: int = E) -> Routing:
    """Every expert chosen equally often, a token's probability in equal parts on its experts."""
    first = torch.arange(3 * experts) % experts
    logits = torch.zeros(3 * experts, experts)
    for k in range(top_k):
        logits[torch.arange(3 * experts), (first + k) % experts] = SURE
    return routed(logits, top_k)


def collapsed(top_k: int = 1) -> Routing:
    return routed(torch.nn.functional.one_hot(torch.zeros(T, dtype=torch.long), E) * SURE, top_k)


def random_logits(tokens: int = T, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(tokens, E, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def declared(name: str):
    """The value at perfect balance that a loss declares; None where the load does not decide it."""
    loss = registry.find(name, kind="balance").load()
    return getattr(getattr(loss, "func", loss), "at_balance", None)


BALANCE = [method.name for method in registry.methods(kind="balance")]
# Presets for pools with free experts read their costs, which these routings have not.
LOSSES = [n for n in BALANCE if declared(n) and n not in ("heterogeneous-loss", "null-mean-loss")]


@pytest.mark.parametrize("top_k", [1, K])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_at_perfect_balance_have_the_value_that_they_declare(name, top_k) -> None:
    found = float(registry.find(name, kind="balance").load()(balanced(top_k)))
    # Probabilities of float32, summed over 8 experts.
    assert found == pytest.approx(declared(name)(E, top_k), abs=1e-5)


def test_only_losses_that_the_load_does_not_decide_declare_nothing() -> None:
    own = [m for m in registry.methods(kind="balance") if ".layers.balance." in m.target]
    silent = {method.name for method in own if declared(method.name) is None}
    assert silent == {"z-loss", "compute-budget", "coupling", "expert-bias"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("balance-loss", E),
        ("first-choice-loss", E),
        ("top1-loss", E),
        ("importance-loss", E - 1),
        ("mutual-information", 0.0),
        ("concentration", 0.0),
        ("entropy-loss", 0.0),
    ],
)
def test_losses_at_collapse(name, value) -> None:
    loss = registry.find(name, kind="balance").load()
    assert float(loss(collapsed())) == pytest.approx(value, abs=1e-4)


def test_flat_probabilities_win_the_product_loss_but_not_the_top1_loss() -> None:
    """Sigma's failure: a flat router with a tiny preference, so that every token goes one way."""
    logits = torch.zeros(T, E)
    logits[:, 3] = 1e-4
    flat = routed(logits, 1)
    assert float(balance_loss(flat)) == pytest.approx(1.0, abs=1e-3)
    for temperature in (0.5, 1.0, 2.0):
        assert float(top1_loss(flat, temperature=temperature)) == pytest.approx(E, abs=1e-2)


def test_mutual_information_is_zero_where_tokens_do_not_differ() -> None:
    loss = registry.find("mutual-information", kind="balance").load()
    same = routed(random_logits(1).expand(T, E))
    assert float(loss(same)) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("name", [*LOSSES, "z-loss"])
def test_padding_counts_nothing_and_gradients_reach_the_logits(name) -> None:
    loss = registry.find(name, kind="balance").load()
    logits = random_logits().requires_grad_()
    mask = torch.arange(T) < 15
    padded = loss(routed(logits, token_mask=mask))
    alone = loss(routed(logits[:15]))
    torch.testing.assert_close(padded, alone)
    (grad,) = torch.autograd.grad(padded, logits)
    assert grad[:15].abs().sum() > 0
    assert not grad[15:].any()


def test_one_expert_a_group_is_the_plain_loss_and_one_group_is_one() -> None:
    routing = routed(random_logits())
    torch.testing.assert_close(balance_loss(routing, groups=E), balance_loss(routing))
    assert float(balance_loss(routing, groups=1)) == pytest.approx(1.0)


def test_loads_of_null_experts_may_be_exchanged() -> None:
    cost = torch.tensor([1.0] * 5 + [0.0] * 3)
    routing = routed(random_logits(), cost=cost)
    mean = balance_loss(routing, free="mean")
    order = torch.tensor([0, 1, 2, 3, 4, 7, 5, 6])
    swapped = routed(random_logits()[:, order], cost=cost)
    torch.testing.assert_close(balance_loss(swapped, free="mean"), mean)
    assert float(balance_loss(routing, free_weight=0.5)) < float(balance_loss(routing))


def test_the_budget_is_met_where_the_expected_work_equals_it() -> None:
    cost = torch.tensor([4.0] * 4 + [0.0] * 4)
    routing = routed(torch.zeros(T, E), cost=cost)
    assert float(compute_budget(routing, budget=0.5)) == pytest.approx(0.0, abs=1e-6)
    assert float(compute_budget(routing, budget=0.8)) == pytest.approx(0.3, abs=1e-6)


def test_z_loss_is_that_of_the_logits() -> None:
    assert float(z_loss(routed(torch.zeros(T, E)))) == pytest.approx(math.log(E) ** 2)


def test_sigmoid_scores_become_probabilities_over_all_experts() -> None:
    logits = random_logits()
    scores = logits.sigmoid()
    routing = Routing.from_topk(
        logits.topk(K).indices, scores.topk(K).values, E, logits=logits, scores=scores
    )
    torch.testing.assert_close(probabilities(routing), scores / scores.sum(-1, keepdim=True))


@pytest.mark.parametrize("masked", [False, True])
def test_sequences_are_records_of_their_own(masked) -> None:
    logits = random_logits()
    mask = (torch.arange(T) % 5 > 0) if masked else None
    routing = routed(logits, token_mask=mask, dropped=torch.tensor([[1, 0], [13, 2]]))
    for i, part in enumerate(by_sequence(routing, 2)):
        rows = slice(12 * i, 12 * i + 12)
        lost = torch.tensor([[1, 2 * i]])
        own = routed(logits[rows], token_mask=None if mask is None else mask[rows], dropped=lost)
        torch.testing.assert_close(balance_loss(part), balance_loss(own))
        assert torch.equal(part.wanted(), own.wanted())


def context(batch: int = 2) -> RouterContext:
    return RouterContext(batch, T // batch, training=True)


def test_scope_sequence_is_the_mean_of_the_sequences() -> None:
    routing = routed(random_logits())
    found = Balance("balance-loss", weight=0.5, scope="sequence")([routing], context())
    parts = [balance_loss(routed(random_logits()[rows])) for rows in (slice(12), slice(12, T))]
    torch.testing.assert_close(found, 0.5 * torch.stack(parts).mean())


def test_processes_with_shared_loads_have_the_gradient_of_the_tokens_together() -> None:
    """Scope "step" over four shards: the mean of their losses is that of all tokens."""
    shards = [random_logits(seed=s, dtype=torch.float64).requires_grad_() for s in range(4)]
    together = torch.cat(shards)
    total = routed(together).wanted()
    balance = Balance("balance-loss", weight=1.0, scope="step", sum_over_processes=lambda _: total)
    # The load is counted in float32, so the whole is compared at its precision.
    mean = torch.stack([balance([routed(s)], context()) for s in shards]).mean()
    whole = balance_loss(routed(together))
    torch.testing.assert_close(mean, whole, rtol=1e-6, atol=1e-6)
    for found, exact in zip(
        torch.autograd.grad(mean, shards), torch.autograd.grad(whole, shards), strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-9)


def test_two_domains_are_uneven_by_micro_batch_and_even_in_the_global_batch() -> None:
    """Each micro-batch uniform in its own half of the experts: micro 2, global 1 (2501.11873)."""

    def half(first: int) -> Routing:
        chosen = first + torch.arange(T) % (E // 2)
        return routed(torch.nn.functional.one_hot(chosen, E) * SURE, 1)

    micro = Balance("balance-loss", weight=1.0)
    assert float(micro([half(0)], context())) == pytest.approx(2.0)
    balance = Balance("balance-loss", weight=1.0, scope="global")
    assert float(balance([half(0)], context())) == pytest.approx(2.0)
    assert float(balance([half(E // 2)], context())) == pytest.approx(1.0)
    balance.after_step()
    assert float(balance([half(E // 2)], context())) == pytest.approx(2.0)


def test_a_schedule_ends_a_weight() -> None:
    schedule = Schedule(begin=0.25, end=0.75, last=0.0)
    assert [schedule.at(p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0, 1, 0.5, 0, 0]
    ended = Balance("balance-loss", weight=1.0, schedule=Schedule(end=0.5))
    assert float(ended([routed(random_logits())], context(), progress=0.6)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "balance-los"}, "balance-loss"),
        ({"name": "balance-loss", "scope": "globl"}, "global"),
        ({"name": "z-loss", "scope": "global"}, "no load"),
        ({"name": "balance-loss", "grups": 2}, "groups"),
        ({"name": "compute-budget"}, "budget"),
        ({"name": "expert-bias"}, "no loss"),
    ],
)
def test_wrong_settings_are_told(options, message) -> None:
    with pytest.raises(UserError, match=message):
        Balance(weight=1.0, **options)


def test_coupling_is_zero_for_experts_on_blocks_of_their_own_and_not_when_permuted() -> None:
    experts, width, inner = 4, 8, 3
    draw = torch.Generator().manual_seed(0)
    router, gate = torch.zeros(experts, width), torch.zeros(experts, inner, width)
    for e in range(experts):
        block = slice(2 * e, 2 * e + 2)
        router[e, block] = torch.rand(2, generator=draw) + 0.5
        gate[e, :, block] = torch.randn(inner, 2, generator=draw)
    assert float(coupling_loss(router, gate, generator=draw)) == 0
    assert float(coupling_loss(router.roll(1, 0), gate, generator=draw)) > 0


def test_coupling_equals_its_double_sum_and_grows_with_the_router() -> None:
    draw = torch.Generator().manual_seed(1)
    router, gate = torch.randn(E, 6, generator=draw), torch.randn(E, 5, 6, generator=draw)
    state = draw.get_state()
    found = coupling_loss(router, gate, alpha=0.5, generator=draw)
    draw.set_state(state)
    distance = torch.cdist(router, router) + torch.eye(E) * 1e9
    reach = distance.amin(1) / (2 * router.norm(dim=1))
    noise = 1 + (2 * torch.rand(router.shape, generator=draw) - 1) * reach[:, None]
    total = 0.0
    norm = [[float((gate[j] @ (router * noise)[i]).norm()) for j in range(E)] for i in range(E)]
    for i in range(E):
        for j in range(E):
            if i != j:
                total += max(0.0, norm[i][j] - 0.5 * norm[i][i])
                total += max(0.0, norm[j][i] - 0.5 * norm[i][i])
    assert float(found) == pytest.approx(total / E**2, rel=1e-5)
    draw.set_state(state)
    scaled = coupling_loss(3 * router, gate, alpha=0.5, generator=draw)
    assert float(scaled) == pytest.approx(3 * float(found), rel=1e-5)


@pytest.mark.parametrize(("rule", "rate"), [("proportional-sqrt", 0.1), ("sign-sqrt", 0.02)])
def test_shrinking_bias_steps_reach_the_optimal_assignment(rule, rate) -> None:
    """ALF-LB's dual view: in the end every load is fair and the affinity the greatest."""
    tokens, experts = 64, 4
    draw = torch.Generator().manual_seed(0)
    affinity = torch.sigmoid(
        torch.randn(tokens, experts, generator=draw) + torch.randn(experts, generator=draw)
    ).double()
    bias = torch.zeros(experts, dtype=torch.float64)
    for number in range(1, 3001):
        counts = torch.bincount((affinity + bias).argmax(1), minlength=experts)
        move_bias(bias, counts, rate, rule=rule, number=number, centre=True)
    chosen = (affinity + bias).argmax(1)
    assert torch.bincount(chosen, minlength=experts).tolist() == [tokens // experts] * experts
    columns = affinity.repeat_interleave(tokens // experts, 1).numpy()
    rows, best = linear_sum_assignment(columns, maximize=True)
    found = float(affinity.gather(1, chosen[:, None]).sum())
    assert found == pytest.approx(columns[rows, best].sum(), rel=1e-9)
    assert float(dual_value(affinity, bias, 1)) == pytest.approx(found, rel=1e-9)


def test_the_dual_falls_by_the_lack_of_load() -> None:
    draw = torch.Generator().manual_seed(0)
    affinity = torch.rand(T, E, generator=draw, dtype=torch.float64)
    bias = torch.rand(E, generator=draw, dtype=torch.float64)
    counts = torch.bincount((affinity + bias).topk(K).indices.flatten(), minlength=E)
    for e in range(E):
        step = torch.zeros(E, dtype=torch.float64)
        step[e] = 1e-7
        slope = (dual_value(affinity, bias + step, K) - dual_value(affinity, bias, K)) / 1e-7
        assert float(slope) == pytest.approx(float(counts[e]) - K * T / E, abs=1e-4)


def test_a_step_raises_what_is_underloaded_by_the_rate() -> None:
    bias = torch.zeros(4)
    move_bias(bias, torch.tensor([10.0, 2.0, 6.0, 6.0]), 0.5)
    assert bias.tolist() == [-0.5, 0.5, 0.0, 0.0]


def test_a_limit_bounds_the_bias() -> None:
    bias = torch.zeros(4)
    for _ in range(100):
        move_bias(bias, torch.tensor([9.0, 1, 1, 1]), 0.1, limit=0.5)
    assert bias.tolist() == [-0.5, 0.5, 0.5, 0.5]
