"""Union of Experts: the checks of its method section."""

import pytest
import torch

from moekit.core.errors import UserError
from moekit.layers import (
    ExpertPool,
    MoELayer,
    RouterContext,
    Routing,
    build_bank,
    build_router,
)

B, S, D, E = 2, 12, 16, 4


def hidden(seed: int = 0) -> torch.Tensor:
    return torch.randn(B * S, D, generator=torch.Generator().manual_seed(seed))


def router(name: str = "uoe-data", top_k: int = 2, **options):
    torch.manual_seed(1)
    made = build_router(name, D, E, top_k, **options)
    torch.nn.init.normal_(made.score.weight)
    return made


def context(**fields) -> RouterContext:
    return RouterContext(B, S, **fields)


def test_all_slices_on_all_tokens_are_the_dense_block():
    torch.manual_seed(0)
    dense = build_bank("swiglu", D, 1, expert_width=32)
    slices = build_bank("swiglu", D, E, expert_width=8)
    gate, up = dense.gate_up_proj[0].chunk(2)
    with torch.no_grad():
        slices.gate_up_proj.copy_(torch.cat([part.view(E, 8, D) for part in (gate, up)], 1))
        slices.down_proj.copy_(dense.down_proj[0].view(D, E, 8).transpose(0, 1))
    every = Routing.from_topk(torch.arange(E).expand(B * S, E), torch.ones(B * S, E), E)
    # The sum over the hidden values in four parts.
    torch.testing.assert_close(
        ExpertPool([slices])(hidden(), every), dense.run_one(0, hidden()), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("normalised", ["none", "batch"])
def test_slices_take_their_best_positions_by_the_naive_rule(normalised):
    made, x = router(normalised=normalised), hidden()
    scores = (x @ made.score.weight.T).softmax(-1).view(B, S, E).detach()
    kept = torch.where(scores >= scores.topk(2, -1).values[..., -1:], scores, 0.0)
    if normalised == "batch":
        kept = kept / kept.sum(0, keepdim=True).clamp_min(1e-8)
    expected = {}
    for b in range(B):
        for e in range(E):
            order = kept[b, :, e].argsort(descending=True)[: S // 2]
            for s in order.tolist():
                if kept[b, s, e] > 0:
                    expected[b * S + s, e] = kept[b, s, e].item()
    routing = made(x, context())
    found = {
        (t, e): w.item()
        for t, e, w in zip(
            routing.token.tolist(), routing.expert.tolist(), routing.weight, strict=True
        )
    }
    assert found == pytest.approx(expected)
    assert made.sees_batch == (normalised == "batch")


def test_slices_that_may_take_every_token_are_plain_top_k():
    made = router(fraction=1.0)
    plain = build_router("softmax-raw", D, E, 2)
    plain.score.weight = made.score.weight
    ours, theirs = made(hidden(), context()), plain(hidden(), context())
    assert torch.equal(ours.expert, theirs.expert)
    assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize("name", ["uoe-data", "uoe-sequence"])
@pytest.mark.parametrize("gated", [True, False])
def test_the_router_learns_only_where_its_weights_count(name, gated):
    torch.manual_seed(0)
    made = router(name, gated=gated)
    layer = MoELayer(made, ExpertPool([build_bank("swiglu", D, E, expert_width=8)]))
    layer(hidden().view(B, S, D)).square().sum().backward()
    learned = made.score.weight.grad is not None and bool(made.score.weight.grad.any())
    assert learned == gated


def test_one_choice_serves_a_sequence_and_looks_ahead():
    made = router("uoe-sequence")
    routing = made(hidden(), context())
    ids = routing.expert.view(B, S, 2)
    assert (ids == ids[:, :1]).all()
    assert not made.causal
    changed = hidden()
    changed[S - 1] += 20 * made.score.weight[ids[0, 0, 1]].detach()
    assert not torch.equal(made(changed, context()).weight[:2], routing.weight[:2])


def test_padding_is_not_taken():
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[:, 7:] = False
    routing = router(fraction=1.0)(hidden(), context(token_mask=mask.flatten()))
    assert mask.flatten()[routing.token].all()


def test_bad_options_are_told():
    with pytest.raises(UserError, match="fraction 0"):
        router(fraction=0.0)
    with pytest.raises(UserError, match="did you mean 'batch'"):
        router(normalised="bach")
