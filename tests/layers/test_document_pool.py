"""EMO: the checks of its method section."""

import pytest
import torch

from moekit.core.errors import UserError
from moekit.layers import RouterContext, build_router
from moekit.layers.routers.document_pool import document_index, document_pools

B, S, D, E, K, END = 2, 12, 16, 8, 2, 7


def hidden() -> torch.Tensor:
    return torch.randn(B * S, D, generator=torch.Generator().manual_seed(0))


def tokens() -> torch.Tensor:
    ids = torch.zeros(B, S, dtype=torch.int64)
    ids[0, [3, 8]] = END
    ids[1, 5] = END
    return ids.flatten()


def router(**options):
    made = build_router("emo", D, E, K, **options)
    torch.nn.init.normal_(made.score.linear.weight, generator=torch.Generator().manual_seed(1))
    return made


def context(**fields) -> RouterContext:
    return RouterContext(B, S, token_id=tokens(), training=True, **fields)


def test_documents_end_at_the_end_token_and_with_the_sequence():
    index = document_index((tokens() == END).view(B, S)).view(B, S)
    assert index.tolist() == [[0] * 4 + [1] * 5 + [2] * 3, [3] * 6 + [4] * 6]


def test_the_pool_are_the_experts_of_the_largest_sum():
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.0, 0.9, 0.1], [0.1, 0.1, 0.8]])
    document, sizes = torch.tensor([0, 0, 1]), torch.tensor([1, 2])
    pools = document_pools(probabilities, document, sizes)
    assert pools.tolist() == [[False, True, False]] * 2 + [[True, False, True]]
    forced = document_pools(probabilities, document, torch.tensor([2, 1]), forced=1)
    assert forced.tolist() == [[False, True, True]] * 2 + [[False, False, True]]


def test_a_pool_of_all_experts_is_the_plain_router_with_its_gradients():
    made = router(smallest_pool=E, end_id=END)
    plain = build_router("softmax-raw", D, E, K)
    plain.score.weight = torch.nn.Parameter(made.score.linear.weight.detach().clone())
    assert made.causal
    ours, theirs = made(hidden(), context()), plain(hidden(), context())
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.expert, theirs.expert)
    for routing in (ours, theirs):
        (routing.weight * torch.arange(len(routing.weight))).sum().backward()
    assert torch.equal(made.score.linear.weight.grad, plain.score.weight.grad)


def test_a_document_touches_no_more_experts_than_its_pool():
    made = router(smallest_pool=3, largest_pool=3, end_id=END)
    routing = made(hidden(), context())
    assert not made.causal
    documents = document_index((tokens() == END).view(B, S))[routing.token]
    for document in documents.unique():
        assert len(routing.expert[documents == document].unique()) <= 3
    assert len(routing.expert.unique()) > 3
    # Scores are of the pool alone, so that weights and losses never see the others.
    assert ((routing.scores > 0).sum(1) == 3).all()


def test_sizes_are_drawn_for_each_document_and_layer():
    made = router(smallest_pool=2, largest_pool=6, end_id=END)
    sizes = []
    for layer in range(20):
        routing = made(hidden(), context(layer=layer))
        pool = (routing.scores > 0).sum(1)
        documents = document_index((tokens() == END).view(B, S))
        firsts = [int(pool[documents == document][0]) for document in range(5)]
        sizes += firsts
    assert set(sizes) == {2, 3, 4, 5, 6}


def test_evaluation_has_no_pool_or_a_fixed_one():
    plain = RouterContext(B, S, token_id=tokens())
    made = router(end_id=END).eval()
    assert made.causal
    assert (made(hidden(), plain).scores > 0).all()
    fixed = router(end_id=END, eval_pool=4).eval()
    assert not fixed.causal
    assert ((fixed(hidden(), plain).scores > 0).sum(1) == 4).all()


def test_shuffling_documents_shuffles_their_routes():
    made = router(smallest_pool=3, largest_pool=3)
    kind = torch.tensor([0] * 4 + [1] * 8)
    order = torch.cat([torch.arange(4, 12), torch.arange(4)])
    x = hidden()[:S]
    first = made(x, RouterContext(1, S, token_type=kind, training=True))
    second = made(x[order], RouterContext(1, S, token_type=kind[order], training=True))
    torch.testing.assert_close(first.scores[order], second.scores)


def test_bad_pools_are_told():
    with pytest.raises(UserError, match="smallest_pool 1"):
        router(smallest_pool=1)
    with pytest.raises(UserError, match="eval_pool 9"):
        router(eval_pool=9)
    with pytest.raises(UserError, match="needs token ids"):
        router(end_id=END)(hidden(), RouterContext(B, S, training=True))
