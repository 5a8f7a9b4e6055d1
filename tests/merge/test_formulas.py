"""Spherical, competitive and subspace merges: the identities that their sections name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.merge.competition import pcb, ram, sce, widen
from moekit.merge.spherical import (
    arcee_fusion,
    karcher,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    slerp,
)
from moekit.merge.subspace import isotropic, knots, tsv_merge

CLOSE = {"atol": 2e-6, "rtol": 0}


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(12, 10, generator=draw), torch.randn(12, 10, generator=draw)


def deltas(count: int, rows: int = 20, columns: int = 16) -> Tensor:
    return torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(7))


def test_slerp_ends_at_its_inputs(pair) -> None:
    torch.testing.assert_close(slerp(*pair, 0.0), pair[0], **CLOSE)
    torch.testing.assert_close(slerp(*pair, 1.0), pair[1], **CLOSE)
    torch.testing.assert_close(slerp(pair[0], pair[0], 0.3), pair[0], **CLOSE)
    assert torch.equal(slerp(pair[0] * 0, pair[1] * 0, 0.5), pair[0] * 0)


def test_nuslerp_is_slerp_away_from_the_line(pair) -> None:
    torch.testing.assert_close(nuslerp(*pair, [0.7, 0.3]), slerp(*pair, 0.3), atol=1e-5, rtol=0)
    # Weights that cancel mean the middle.
    torch.testing.assert_close(nuslerp(*pair, [1, -1]), nuslerp(*pair, [1, 1]), **CLOSE)
    same = nuslerp(pair[0], pair[0], [1, 1], row_wise=True, flatten=False)
    torch.testing.assert_close(same, pair[0], **CLOSE)
    base = torch.ones_like(pair[0])
    shifted = nuslerp(pair[0] + base, pair[1] + base, [0.7, 0.3], base)
    torch.testing.assert_close(shifted - base, nuslerp(*pair, [0.7, 0.3]), atol=1e-5, rtol=0)


def test_karcher_of_two_is_the_midpoint_of_the_sphere(pair) -> None:
    a, b = pair
    middle = a / a.norm() + b / b.norm()
    expected = middle / middle.norm() * (a.norm() + b.norm()) / 2
    # The iteration stops where a step is below 1e-5.
    torch.testing.assert_close(karcher(pair), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(karcher([a, a, a]), a, atol=1e-5, rtol=0)
    # A tensor of zeros has no direction but counts in the norm.
    torch.testing.assert_close(karcher([a, a * 0]), a / 2, atol=1e-5, rtol=0)


def test_multislerp_of_equals_is_that_model(pair) -> None:
    torch.testing.assert_close(multislerp([pair[0]] * 3, [1, 1, 1]), pair[0], atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="cancel"):
        multislerp([pair[0], -pair[0], pair[0] * 0], [1, 1, 1])


def test_model_stock_trusts_agreement(pair) -> None:
    base, delta = pair
    moved = base + 0.1 * delta
    torch.testing.assert_close(model_stock(base, [moved, moved]), moved, atol=1e-5, rtol=0)
    across = torch.zeros_like(base)
    across[0, 0], other = 1.0, torch.zeros_like(base)
    other[0, 1] = 1.0
    assert torch.equal(model_stock(base, [base + across, base + other]), base)
    # Task vectors so small that a clamped norm would lose their agreement.
    tiny = model_stock(base * 0, [delta * 1e-9, delta * 1e-9])
    torch.testing.assert_close(tiny, delta * 1e-9, atol=0, rtol=1e-4)
    # Opposite ones divide by zero in the formula.
    assert torch.isfinite(model_stock(base, [moved, 2 * base - moved])).all()
    with pytest.raises(UserError, match="at least 2"):
        model_stock(base, [moved])


def test_nearswap_and_fusion_take_over_what_their_rule_says(pair) -> None:
    base = torch.zeros(4)
    near = nearswap(base, torch.tensor([1e-3, 0.1, 1.0, 0.0]), 0.01)
    torch.testing.assert_close(near, torch.tensor([1e-3, 0.01, 0.01, 0.0]), **CLOSE)
    moved = pair[0] + 1e-4
    moved[3, 3] += 5
    fused = arcee_fusion(pair[0], moved)
    changed = (fused != pair[0]).nonzero()
    assert [3, 3] in changed.tolist()
    assert len(changed) < pair[0].numel() / 2


def test_sce_of_one_or_of_equals_returns_it() -> None:
    one = deltas(1)
    torch.testing.assert_close(sce(one), one[0], **CLOSE)
    torch.testing.assert_close(sce(one.repeat(2, 1, 1)), one[0], **CLOSE)
    two = deltas(2)
    # The authors merge all entries, mergekit those that were selected.
    selected, whole = (sce(two, 0.1, erase_from=e) for e in ("deltas", "weights"))
    assert int((selected != 0).sum()) == int(0.1 * two[0].numel())
    assert int((whole != 0).sum()) == two[0].numel()


def test_pcb_keeps_the_share_it_is_given() -> None:
    flat = deltas(3).flatten(1)
    one = pcb(flat[:1], density=0.25, scale=1.0)
    kept = int((one != 0).sum())
    # The entry at the quantile itself is pressed to zero.
    assert abs(kept - 0.25 * flat.shape[1]) <= 2
    low, high = flat[0].abs().quantile(1e-4), flat[0].abs().quantile(1 - 1e-4)
    inside = (one != 0) & (flat[0].abs() > low) & (flat[0].abs() < high)
    torch.testing.assert_close(one[inside], flat[0][inside], **CLOSE)
    scaled = flat * torch.tensor([[10.0], [1.0], [1.0]])
    # By its own size a task vector's balance does not change: only its values do.
    normal, larger = pcb(flat, 0.2), pcb(scaled, 0.2)
    assert torch.equal(normal == 0, larger == 0)
    raw, raw_larger = pcb(flat, 0.2, inter="raw"), pcb(scaled, 0.2, inter="raw")
    assert not torch.equal(raw == 0, raw_larger == 0)


def test_widen_of_one_model_is_that_model() -> None:
    base, first, second = deltas(3)
    moved = base + 0.1 * first
    torch.testing.assert_close(widen(base, moved.unsqueeze(0)), moved, **CLOSE)
    torch.testing.assert_close(widen(base[0], moved[:1]), moved[0], **CLOSE)
    both = torch.stack([moved, base + 0.1 * second])
    # Of embeddings the rows are the tokens.
    turned = widen(base.T.contiguous(), both.transpose(1, 2).contiguous(), by_row=True)
    torch.testing.assert_close(turned.T, widen(base, both), **CLOSE)


def test_ram_keeps_unique_changes_whole() -> None:
    stack = torch.tensor([[1.0, 0.0, 2.0, 0.0], [3.0, 4.0, 0.0, 0.0]])
    assert torch.equal(ram(stack), torch.tensor([2.0, 4.0, 2.0, 0.0]))
    boosted = ram(stack, gain=0.1)
    torch.testing.assert_close(boosted, torch.tensor([2.0, 4 * 1.02, 2 * 1.02, 0.0]), **CLOSE)


def test_tsv_adds_orthogonal_tasks_of_low_rank() -> None:
    left, _ = torch.linalg.qr(torch.randn(40, 16, generator=torch.Generator().manual_seed(1)))
    right, _ = torch.linalg.qr(torch.randn(32, 16, generator=torch.Generator().manual_seed(2)))
    tasks = torch.stack([left[:, :8] @ right[:, :8].T, left[:, 8:] @ right[:, 8:].T])
    # Directions beyond the rank of a task would bend the others (0.26 in the published code).
    torch.testing.assert_close(tsv_merge(tasks), tasks.sum(0), atol=1e-5, rtol=0)


def test_tsv_of_twins_splits_between_them() -> None:
    one = deltas(1)[0]
    merged = tsv_merge(torch.stack([one, one]))
    left, value, right = torch.linalg.svd(one, full_matrices=False)
    room = len(value) // 2
    kept = (left[:, :room] * value[:room]) @ right[:room]
    assert float(merged.norm()) <= math.sqrt(2) * float(kept.norm()) * (1 + 1e-4)
    assert torch.equal(tsv_merge(one.unsqueeze(0) * 0), one * 0)


def test_uniform_weights_and_ranks_are_plain_tsv() -> None:
    stack = deltas(2)
    plain = tsv_merge(stack)
    torch.testing.assert_close(tsv_merge(stack, weights=[1, 1], ranks=[8, 8]), plain, **CLOSE)


def test_isotropic_has_one_singular_value() -> None:
    stack = deltas(2)
    values = torch.linalg.svdvals(isotropic(stack))
    torch.testing.assert_close(values, values.mean().expand_as(values), atol=1e-4, rtol=0)
    both = torch.linalg.svdvals(isotropic(stack, common=0.5))
    torch.testing.assert_close(both, both.mean().expand_as(both), atol=1e-4, rtol=0)


def test_knots_by_addition_is_addition() -> None:
    stack = deltas(3)
    torch.testing.assert_close(knots(stack, lambda c: c.sum(0)), stack.sum(0), atol=1e-4, rtol=0)
