"""ProMoE: the checks of its method section."""

import math

import pytest
import torch

from moekit.core.errors import UserError
from moekit.layers import (
    ExpertPool,
    MoELayer,
    RouterContext,
    Routing,
    SharedExpert,
    build_bank,
    build_router,
)
from moekit.layers.routers.prototypes import COSINES, FILLED, routing_contrastive_loss

D, E, T = 16, 5, 24


def hidden(seed: int = 0) -> torch.Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed))


def router(top_k: int = 1, **options):
    torch.manual_seed(1)
    made = build_router("promoe", D, E, top_k, **options)
    torch.nn.init.normal_(made.score.weight)
    return made


def record(cosines: torch.Tensor, filled: torch.Tensor | None = None) -> Routing:
    count = len(cosines)
    filled = torch.ones(count, dtype=torch.bool) if filled is None else filled
    ids = torch.zeros(2, 1, dtype=torch.int64)
    extra = {COSINES: cosines, FILLED: filled}
    return Routing.from_topk(ids, torch.ones(2, 1), count, extra=extra)


def test_unconditional_tokens_touch_their_expert_and_the_shared_one_alone():
    torch.manual_seed(0)
    banks = [build_bank("swiglu", D, count, expert_width=8) for count in (E, 1)]
    made = router(null_type=1)
    layer = MoELayer(made, ExpertPool(banks[:1]), SharedExpert(D, banks[1]))
    context = RouterContext(1, T, token_type=torch.ones(T, dtype=torch.int64), training=True)
    x = hidden()
    out = layer(x[None], context)[0]
    torch.testing.assert_close(out, banks[0].run_one(E - 1, x) + banks[1].run_one(0, x))
    (routing,) = context.records
    assert routing_contrastive_loss(routing).item() == 0
    assert routing.counts().tolist() == [0] * (E - 1) + [T]


@pytest.mark.parametrize("select", ["tokens", "experts"])
def test_mixed_batches_split_by_type(select):
    types = (torch.arange(T) < 12).long()
    made = router(2, null_type=1, select=select)
    routing = made(hidden(), RouterContext(2, 12, token_type=types))
    assert (routing.token.diff() >= 0).all()
    null = types[routing.token] == 1
    assert (routing.expert[null] == E - 1).all()
    assert (routing.weight[null] == 1).all()
    assert int(null.sum()) == 12
    assert (routing.expert[~null] < E - 1).all()
    if select == "experts":
        assert torch.equal(routing.counts()[:-1], torch.full((E - 1,), 12 * 2 // (E - 1) * 1.0))


def test_routing_does_not_depend_on_the_size_of_a_token():
    made = router(2)
    scale = torch.rand(T, 1, generator=torch.Generator().manual_seed(2)) + 0.1
    one, other = (made(x, RouterContext(1, T)) for x in (hidden(), hidden() * scale))
    assert torch.equal(one.expert, other.expert)
    torch.testing.assert_close(one.weight, other.weight)


@pytest.mark.parametrize("score_map", ["identity", "softmax", "sigmoid"])
def test_weights_are_the_mapped_cosines(score_map):
    made = router(2, score_map=score_map)
    x = hidden()
    routing = made(x, RouterContext(1, T))
    cosine = torch.cosine_similarity(x[:, None], made.score.weight[None], dim=-1)
    mapped = {
        "identity": cosine,
        "softmax": cosine.softmax(-1),
        "sigmoid": cosine.sigmoid(),
    }[score_map]
    torch.testing.assert_close(routing.weight.view(T, 2), mapped.topk(2, -1).values)


def test_the_contrastive_loss_at_its_ends():
    equal = routing_contrastive_loss(record(torch.full((4, 4), 0.3)))
    assert equal.item() == pytest.approx(math.log(4), rel=1e-6)
    apart = routing_contrastive_loss(record(torch.eye(4)), temperature=0.02)
    assert apart.item() < 1e-6
    empty = torch.tensor([True, False, False, True])
    two = routing_contrastive_loss(record(torch.full((4, 4), 0.1), empty))
    assert two.item() == pytest.approx(math.log(2), rel=1e-6)
    with pytest.raises(ValueError, match="promoe"):
        routing_contrastive_loss(Routing.from_topk(torch.zeros(1, 1).long(), torch.ones(1, 1), 2))


def test_the_record_holds_the_means_of_each_experts_own_tokens():
    made, mask = router(), torch.arange(T) < 20
    x = hidden()
    routing = made(x, RouterContext(1, T, token_mask=mask, training=True))
    for j in range(E):
        own = x[:20][routing.expert[:20] == j]
        assert bool(routing.extra[FILLED][j]) == bool(len(own))
        if len(own):
            expected = torch.cosine_similarity(made.score.weight, own.mean(0)[None], dim=-1)
            torch.testing.assert_close(routing.extra[COSINES][:, j], expected)


def test_the_contrastive_loss_draws_each_prototype_to_its_own_tokens():
    generator = torch.Generator().manual_seed(3)
    centres = 3 * torch.randn(E, D, generator=generator)
    x = centres.repeat(40, 1) + 0.3 * torch.randn(E * 40, D, generator=generator)
    made = router()

    def margin() -> float:
        """How much nearer used prototypes are to their own mean than to any other's."""
        extra = made(x, RouterContext(1, len(x), training=True)).extra
        used = extra[FILLED].nonzero().flatten()
        cosine = extra[COSINES][used][:, used].detach()
        other = cosine.masked_fill(torch.eye(len(used), dtype=torch.bool), -2)
        return float((cosine.diagonal() - other.amax(1)).mean())

    before = margin()
    optimizer = torch.optim.Adam(made.parameters(), lr=0.05)
    for _ in range(40):
        loss = routing_contrastive_loss(made(x, RouterContext(1, len(x), training=True)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert margin() > before + 0.1


def test_bad_options_are_told():
    with pytest.raises(UserError, match="score_map"):
        router(score_map="cosine")
    with pytest.raises(UserError, match="exceeds the 4 experts"):
        router(5, null_type=0)
