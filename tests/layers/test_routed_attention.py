"""Attention experts: ModuleFormer's modules and heads that see part of the tokens (UoE)."""

import math

import pytest
import torch

from moekit.core.errors import UserError
from moekit.layers import RouterContext, Routing, build_router
from moekit.layers.balance.losses import concentration_loss, mutual_information_loss
from moekit.layers.routed_attention import ATTENTION_ROUND, build_attention, rotate
from moekit.ops.stick_breaking import stick_breaking_attention

B, S, D, E = 2, 9, 16, 4
MODULES = {
    "type": "stick-breaking",
    "count": E,
    "top_k": 2,
    "router": "moduleformer",
    "head_width": 8,
    "heads": 2,
}
HEADS = {"type": "heads", "count": E, "top_k": 2, "router": "softmax-raw"}


class FixedRouter(torch.nn.Module):
    """The first experts for every token, with weight 1."""

    causal, sees_batch = True, False

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def forward(self, hidden, context):
        ids = torch.arange(self.first).expand(len(hidden), self.first)
        return Routing.from_topk(ids, torch.ones(ids.shape), E, token_mask=context.token_mask)


def hidden(seed: int = 0) -> torch.Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(seed))


def attention(recipe):
    torch.manual_seed(1)
    made = build_attention(D, recipe)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


def test_modules_attend_as_one_token_and_module_at_a_time_would():
    made, context = attention(MODULES), RouterContext(B, S)
    x = hidden()
    out = made(x, context)[0]
    (routing,) = context.records
    assert routing.round == ATTENTION_ROUND
    ids, weights = (part.view(B, S, 2) for part in routing.topk())
    key, value = (
        (x @ weight.T).view(B, S, 2, 8).transpose(1, 2) for weight in (made.key, made.value)
    )
    expected = torch.zeros_like(x)
    for e in range(E):
        query = (x @ made.query[e].T).view(B, S, 2, 8).transpose(1, 2)
        attended = stick_breaking_attention(query, key, value).transpose(1, 2).flatten(2)
        share = (weights * (ids == e)).sum(-1, keepdim=True)
        expected = expected + share * (attended @ made.output[e].T)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_every_head_on_every_token_is_ordinary_attention():
    made = attention(HEADS)
    made.router = FixedRouter(E)
    x = hidden()
    query, key, value = (
        torch.einsum("bsd,had->bhsa", x, part) for part in (made.query, made.key, made.value)
    )
    attended = torch.nn.functional.scaled_dot_product_attention(
        rotate(query, 1e4), rotate(key, 1e4), value, is_causal=True
    )
    expected = torch.einsum("bhsa,hda->bsd", attended, made.output)
    torch.testing.assert_close(made(x, RouterContext(B, S))[0], expected, rtol=1e-4, atol=1e-5)


def test_a_head_attends_among_its_own_tokens_with_positions_closed_up():
    made, context = attention(HEADS), RouterContext(B, S)
    x = hidden()
    out = made(x, context)[0]
    (routing,) = context.records
    expected = torch.zeros_like(x)
    for b in range(B):
        for h in range(E):
            own = (routing.expert == h) & (routing.token // S == b)
            places, weight = routing.token[own] % S, routing.weight[own]
            if len(places):
                rows = x[b, places]
                q, k, v = (rows @ part[h].T for part in (made.query, made.key, made.value))
                q, k = rotate(q, 1e4), rotate(k, 1e4)
                logits = q @ k.T / math.sqrt(q.shape[1])
                future = torch.ones(len(rows), len(rows)).triu(1).bool()
                made_by_h = logits.masked_fill(future, -torch.inf).softmax(-1) @ v
                expected[b, places] += weight[:, None] * (made_by_h @ made.output[h].T)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", [MODULES, HEADS], ids=["modules", "heads"])
def test_attention_is_causal_learns_its_router_and_leaves_padding_out(recipe):
    made = attention(recipe)
    x = hidden().requires_grad_()
    out = made(x, RouterContext(B, S))[0]
    out[:, :5].square().sum().backward()
    assert (x.grad[:, 5:] == 0).all()
    assert any(p.grad is not None and p.grad.any() for p in made.router.parameters())
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[0, :3] = False
    noisy = hidden()
    noisy[0, :3] = 50.0
    padded = made(noisy, RouterContext(B, S, token_mask=mask.flatten()))[0]
    alone = made(hidden()[:1, 3:], RouterContext(1, S - 3))[0]
    torch.testing.assert_close(padded[0, 3:], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded[1], out[1], rtol=1e-4, atol=1e-5)


def test_a_module_that_nobody_uses_may_go():
    made = attention(MODULES)
    made.router = FixedRouter(3)
    before = made(hidden(), RouterContext(B, S))[0]
    with torch.no_grad():
        made.query[3], made.output[3] = 9.0, 9.0
    assert torch.equal(made(hidden(), RouterContext(B, S))[0], before)


def test_the_gate_draws_some_modules_in_training():
    torch.manual_seed(0)
    made = build_router("moduleformer", D, 8, 3, sampled=1)
    made.score.init_weights_with(0.2)
    x = torch.randn(400, D, generator=torch.Generator().manual_seed(0))
    routing = made(x, RouterContext(1, 400, training=True))
    ids, weights = routing.topk()
    best = routing.scores.topk(3, -1).indices
    assert torch.equal(ids[:, :2], best[:, :2])
    assert (ids[:, 2:] != ids[:, :2]).all()
    drawn_other = (ids[:, 2] != best[:, 2]).float().mean()
    assert 0.1 < drawn_other < 0.95
    torch.testing.assert_close(weights, routing.scores.gather(1, ids))
    assert torch.equal(made(x, RouterContext(1, 400)).topk()[0], best)


def test_concentration_gathers_on_few_modules_and_mutual_information_on_many():
    x = torch.randn(300, D, generator=torch.Generator().manual_seed(0)) + 0.5

    def modules_in_use(loss) -> int:
        """How many modules cover 95 % of the pairs after training by `loss` alone."""
        torch.manual_seed(1)
        gate = build_router("moduleformer", D, 8, 1, score="linear")
        torch.nn.init.normal_(gate.score.weight, std=0.5)
        optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
        for _ in range(60 if loss else 0):
            optimizer.zero_grad()
            loss(gate(x, RouterContext(1, 300, training=True))).backward()
            optimizer.step()
        share = gate(x, RouterContext(1, 300)).counts().sort(descending=True).values / 300
        return int((share.cumsum(0) < 0.95).sum()) + 1

    few, before, many = (
        modules_in_use(loss) for loss in (concentration_loss, None, mutual_information_loss)
    )
    assert few < before < many


def test_a_linear_gate_without_draws_is_plain_top_k():
    made = build_router("moduleformer", D, 8, 3, score="linear")
    plain = build_router("softmax-raw", D, 8, 3)
    plain.score.weight = made.score.weight
    x, context = hidden()[0], RouterContext(1, S, training=True)
    assert torch.equal(made(x, context).expert, plain(x, context).expert)
    assert torch.equal(made(x, context).weight, plain(x, context).weight)


def test_bad_recipes_are_told():
    with pytest.raises(UserError, match="no type"):
        build_attention(D, {key: value for key, value in MODULES.items() if key != "type"})
    with pytest.raises(UserError, match="head_width 12"):
        build_attention(D, {**MODULES, "heads": 1, "head_width": 12})
    with pytest.raises(UserError, match="as many"):
        attention({**MODULES, "router": {"name": "top-p"}})(hidden(), RouterContext(B, S))
