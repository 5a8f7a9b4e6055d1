"""Graph of tokens: the checks of its method section."""

import pytest
import torch

from moekit.core.errors import UserError
from moekit.layers import RouterContext, build_router
from moekit.layers.context import ATTENTION
from moekit.layers.routers.graph_of_tokens import causal_visibility, similarity

B, S, D, E, K = 2, 6, 16, 4, 2


def hidden() -> torch.Tensor:
    return torch.randn(B * S, D, generator=torch.Generator().manual_seed(0))


def router(graph: str):
    made = build_router("graph-of-tokens", D, E, K, graph=graph, temperature=4.0)
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(made.score.linear.weight, std=0.5, generator=generator)
    return made


def entropy(scores: torch.Tensor) -> torch.Tensor:
    return -torch.xlogy(scores, scores).sum(-1)


def test_the_identity_is_plain_top_k():
    made = router("attention")
    plain = build_router("softmax-renormalised", D, E, K)
    plain.score.weight = made.score.linear.weight
    attention = torch.eye(S).expand(B, 3, S, S)
    context = RouterContext(B, S, carry={ATTENTION: attention})
    ours, theirs = made(hidden(), context), plain(hidden(), RouterContext(B, S))
    assert torch.equal(ours.expert, theirs.expert)
    # Through a logarithm and back.
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-6)


def test_mixed_scores_are_averages_and_obey_jensens_inequality():
    made = router("similarity")
    x = hidden()
    mixed = made(x, RouterContext(B, S)).scores.view(B, S, E)
    torch.testing.assert_close(mixed.sum(-1), torch.ones(B, S))
    visible = causal_visibility(torch.ones(B, S, dtype=torch.bool))
    graph = similarity(x.view(B, S, D), made.score.form, 4.0, visible)
    own = made.score.linear(x, RouterContext(B, S)).softmax(-1).view(B, S, E)
    torch.testing.assert_close(mixed, graph @ own, rtol=1e-5, atol=1e-6)
    assert (entropy(mixed) >= (graph @ entropy(own)[..., None])[..., 0] - 1e-5).all()


def test_attention_is_averaged_over_heads():
    made = router("attention")
    attention = torch.rand(B, 3, S, S, generator=torch.Generator().manual_seed(2)).tril()
    attention = attention / attention.sum(-1, keepdim=True)
    scores = made(hidden(), RouterContext(B, S, carry={ATTENTION: attention})).scores
    own = made.score.linear(hidden(), RouterContext(B, S)).softmax(-1).view(B, S, E)
    expected = (attention.mean(1) @ own).view(B * S, E)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


def test_padding_does_not_count():
    made = router("similarity")
    mask = torch.ones(B * S, dtype=torch.bool)
    mask[:2] = False
    x, changed = hidden(), hidden()
    changed[:2] = 9.0
    first, second = (made(y, RouterContext(B, S, token_mask=mask)).scores for y in (x, changed))
    assert torch.equal(first[2:], second[2:])


def test_a_similar_confident_neighbour_makes_up_a_tokens_mind():
    """The claim that holds: an undecided token among decided ones like it has lower entropy."""
    made = router("attention")
    with torch.no_grad():
        made.score.linear.weight.copy_(torch.eye(E, D) * 5)
    x = torch.zeros(B * S, D)
    x[::S, 0] = 1.0
    attention = torch.zeros(B, 1, S, S)
    attention[..., 0] = 1.0
    scores = made(x, RouterContext(B, S, carry={ATTENTION: attention})).scores
    assert (entropy(scores) < entropy(torch.full((E,), 1 / E)) / 2).all()


def test_what_is_missing_is_told():
    with pytest.raises(UserError, match="attention implementation to eager"):
        router("attention")(hidden(), RouterContext(B, S))
    with pytest.raises(UserError, match="temperature 0"):
        build_router("graph-of-tokens", D, E, K, temperature=0)
