"""THOR: the checks of its method section."""

import torch
import torch.nn.functional as F

from moekit.layers import ExpertPool, MoELayer, RouterContext, build_bank, build_router
from moekit.layers.routers.stochastic import consistency_loss

B, S, D, E = 3, 5, 16, 4


def hidden() -> torch.Tensor:
    return torch.randn(B * S, D, generator=torch.Generator().manual_seed(0))


def ids(router, **fields) -> torch.Tensor:
    return router(hidden(), RouterContext(B, S, **fields)).topk()[0]


def test_one_draw_for_a_batch_a_sequence_or_a_token():
    made = build_router("thor", D, E, 1)
    steps = [ids(made, training=True, step=step) for step in range(30)]
    assert all(len(step.unique()) == 1 for step in steps)
    assert len(torch.cat(steps).unique()) == E
    by_sequence = ids(made, step=2).view(B, S)
    assert (by_sequence == by_sequence[:, :1]).all()
    assert len(ids(build_router("random", D, E, 1)).unique()) > 1


def test_layers_and_passes_draw_by_themselves():
    made = build_router("thor", D, E, 1)
    for name in ("step", "layer", "part", "seed"):
        drawn = {int(ids(made, training=True, **{name: value})[0, 0]) for value in range(20)}
        assert len(drawn) == E, name


def test_experts_are_drawn_evenly():
    made = build_router("random", D, E, 2)
    counts = sum(
        made(hidden(), RouterContext(B, S, training=True, step=step)).counts()
        for step in range(200)
    )
    # 6000 pairs: about 1500 an expert, standard deviation 27.
    assert ((counts - 1500).abs() < 5 * 27).all()


def test_all_experts_are_an_ensemble():
    torch.manual_seed(0)
    pool = ExpertPool([build_bank("swiglu", D, E, expert_width=8)])
    with torch.no_grad():
        for param in pool.parameters():
            param.normal_(std=0.3)
    layer = MoELayer(build_router("thor", D, E, 1, eval_draw="all"), pool)
    average = torch.stack([pool.run_one(e, hidden()) for e in range(E)]).mean(0)
    torch.testing.assert_close(
        layer.eval()(hidden().view(B, S, D)).view(-1, D), average, rtol=1e-5, atol=1e-6
    )


def test_consistency_is_zero_for_equal_passes_and_the_symmetric_divergence_else():
    first, second = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(1))
    # One expert without dropout: both passes agree, and the loss is twice the cross-entropy.
    assert consistency_loss(first, first) == 0
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    both = F.kl_div(q, p, reduction="sum", log_target=True)
    both = both + F.kl_div(p, q, reduction="sum", log_target=True)
    torch.testing.assert_close(consistency_loss(first, second), both / 2)
    mask = torch.arange(7) < 3
    torch.testing.assert_close(
        consistency_loss(first, second, mask), consistency_loss(first[:3], second[:3])
    )


def test_consistency_makes_experts_agree():
    def disagreement(alpha: float) -> float:
        torch.manual_seed(0)
        pool = ExpertPool([build_bank("swiglu", D, 2, expert_width=16)])
        with torch.no_grad():
            for param in pool.parameters():
                param.normal_(std=0.3)
        layer = MoELayer(build_router("thor", D, 2, 1), pool)
        x, labels = hidden(), torch.arange(B * S) % 5
        optimizer = torch.optim.Adam(pool.parameters(), lr=0.01)
        for step in range(150):
            contexts = [RouterContext(B, S, step=step, part=p, training=True) for p in (0, 1)]
            first, second = (layer(x.view(B, S, D), c).view(-1, D)[:, :5] for c in contexts)
            loss = F.cross_entropy(first, labels) + F.cross_entropy(second, labels)
            loss = loss + alpha * consistency_loss(first, second) / len(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        fresh = torch.randn(200, D, generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            draws = torch.stack([pool.run_one(e, fresh)[:, :5].softmax(-1) for e in range(2)])
        return float(draws.var(0).mean())

    assert disagreement(5.0) < disagreement(0.0)
