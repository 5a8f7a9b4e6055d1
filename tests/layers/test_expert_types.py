"""Latent and ternary experts: the checks of MoLAE and MoTE."""

import pytest
import torch

from moekit.core.errors import UserError
from moekit.layers import (
    ExpertPool,
    MoELayer,
    Pairs,
    RouterContext,
    SharedExpert,
    build_bank,
    build_router,
)

D, F, E, T = 16, 24, 6, 10


def hidden() -> torch.Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(0))


def bank(name: str, **options):
    torch.manual_seed(1)
    return build_bank(name, D, E, expert_width=F, **options)


def pairs() -> Pairs:
    generator = torch.Generator().manual_seed(2)
    token = torch.arange(T).repeat_interleave(3)
    expert = torch.stack([torch.randperm(E, generator=generator)[:3] for _ in range(T)])
    return Pairs(token, expert.flatten(), torch.rand(3 * T, generator=generator))


@pytest.mark.parametrize("latent_down", [False, True])
def test_a_latent_expert_is_the_product_of_its_matrices(latent_down):
    made = bank("latent", group=3, latent_width=8, latent_down=latent_down)
    gate_in, up_in = made.shared_gate_up.chunk(2, 1)
    gate_up = [
        torch.cat([made.gate[e] @ gate_in[e // 3], made.up[e] @ up_in[e // 3]]) for e in range(E)
    ]
    down = [
        made.shared_down[e // 3] @ made.down[e] if latent_down else made.down[e] for e in range(E)
    ]
    plain = bank("swiglu")
    with torch.no_grad():
        plain.gate_up_proj.copy_(torch.stack(gate_up))
        plain.down_proj.copy_(torch.stack(down))
    # Three products in place of two, and sums in another order.
    torch.testing.assert_close(
        made(hidden(), pairs()), plain(hidden(), pairs()), rtol=1e-4, atol=1e-7
    )


def test_the_shared_projection_is_computed_once_for_a_token_and_group(monkeypatch):
    from moekit.layers.experts import latent

    rows = []
    grouped = latent.grouped_linear
    monkeypatch.setattr(
        latent, "grouped_linear", lambda x, w, ends: rows.append(len(x)) or grouped(x, w, ends)
    )
    made = bank("latent", group=E, latent_width=8)
    made(hidden(), pairs())
    # One group: as many rows as tokens for the shared ends, as pairs for the private ones.
    assert rows == [T, 3 * T, 3 * T, 3 * T, T]


def test_latent_experts_have_the_parameters_of_the_paper():
    made, group, latent = bank("latent", group=3, latent_width=8), 3, 8
    numbers = sum(p.numel() for p in made.parameters())
    assert numbers == 3 * (E * F * latent + E // group * latent * D)
    low = bank("low-rank", latent_width=8)
    assert sum(p.numel() for p in low.parameters()) == 3 * E * 8 * (F + D)


def test_the_product_of_two_factors_starts_as_wide_as_one_matrix():
    torch.manual_seed(0)
    made = build_bank("latent", 256, 4, expert_width=128, latent_width=64, group=2)
    made.init_weights_with(0.05)
    product = made.gate[0] @ made.shared_gate_up[0, :64]
    assert product.std().item() == pytest.approx(0.05, rel=0.05)


def test_ternary_weights_have_three_values_a_matrix_and_pass_their_gradient():
    made = bank("ternary")
    gate_up, down = made.rounded()
    for matrix, latent in (
        (gate_up[2, :F], made.gate_up_proj[2, :F]),
        (gate_up[2, F:], made.gate_up_proj[2, F:]),
        (down[3], made.down_proj[3]),
    ):
        scale = latent.detach().abs().mean()
        torch.testing.assert_close(
            matrix.detach().unique(), torch.stack([-scale, 0 * scale, scale])
        )
    upstream = torch.randn(gate_up.shape, generator=torch.Generator().manual_seed(3))
    gate_up.backward(upstream)
    assert torch.equal(made.gate_up_proj.grad, upstream)


def test_beside_a_full_precision_expert_ternary_ones_add_what_the_router_says():
    torch.manual_seed(4)
    dense = build_bank("swiglu", D, 1, expert_width=F)
    router = build_router("softmax-raw", D, E, 1)
    layer = MoELayer(router, ExpertPool([bank("ternary")]), SharedExpert(D, dense))
    x = hidden()
    context = RouterContext(1, T)
    added = layer(x[None], context)[0] - dense.run_one(0, x)
    (routing,) = context.records
    for token in range(T):
        expert, weight = int(routing.expert[token]), routing.weight[token]
        expected = weight * layer.pool.run_one(expert, x[token : token + 1])[0]
        torch.testing.assert_close(added[token], expected, rtol=1e-4, atol=1e-6)
    silent = MoELayer(router, ExpertPool([bank("ternary", zero_down=True)]), SharedExpert(D, dense))
    assert torch.equal(silent(x[None])[0], dense.run_one(0, x))


def test_bad_options_are_told():
    with pytest.raises(UserError, match="group 4 does not divide"):
        bank("latent", group=4)
    with pytest.raises(UserError, match="latent_width 12"):
        bank("latent", latent_width=12)
