"""The coupling of routers and experts: planted, broken, random."""

import numpy as np
import pytest
import torch

from moekit.analyze.coupling import coupling, coupling_loss, response
from moekit.core.errors import UserError

from .models import tiny_view


def coupled():
    """Each expert reads two coordinates of its own, and its router row lies in them."""
    view = tiny_view(num_hidden_layers=1)
    layer = view[0]
    with torch.no_grad():
        layer.router_weight.zero_()
        for e in range(16):
            block = slice(2 * e, 2 * e + 2)
            kept = layer.expert_views(e).gate[:, block].clone()
            layer.expert_views(e).gate.zero_()
            layer.expert_views(e).gate[:, block] = kept
            layer.router_weight[e, block] = 1.0
    return view


def test_experts_on_their_own_coordinates_are_coupled():
    result = coupling(coupled())
    row = dict(zip(result.columns, result.rows[0], strict=True))
    assert row["own rows"] == row["own columns"] == 1
    assert row["loss"] == 0
    assert row["p"] == pytest.approx(1 / 201)
    # Rows at right angles: their distance is sqrt(2) of their length, and half of that is meant.
    assert row["spacing"] == pytest.approx(2**0.5 / 2, rel=1e-5)


def test_exchanged_rows_are_not():
    view = coupled()
    with torch.no_grad():
        view[0].router_weight.copy_(view[0].router_weight.roll(1, 0))
    result = coupling(view)
    assert result.summary["own_rows"] == 0
    assert result.summary["loss"] > 0
    assert result.summary["coupled_layers"] == 0


def test_a_random_model_is_not_coupled():
    """Sixty layers in twenty models: 5 % may fire; four standard deviations above that."""
    p = [p for seed in range(20) for p in coupling(tiny_view(seed)).column("p")]
    assert sum(value <= 0.05 for value in p) < 3 + 4 * 1.7


def test_response_and_loss_by_hand():
    layer = tiny_view()[1]
    found = response(layer)
    row = layer.router_weight[3].detach()
    expected = float((layer.get_expert(5).gate @ row).norm())
    assert found[3, 5] == pytest.approx(expected, rel=1e-5)
    matrix = np.array([[2.0, 3.0], [1.0, 4.0]])
    # Own 2 and 4: row 0 exceeds by 1, the column of expert 0 by none, and 3 < 4 on the other side.
    assert coupling_loss(matrix, 1.0) == pytest.approx(1 / 4)
    # Own 1 and 2: excesses 2, 0 (1 = 1) for expert 0, and 0, 1 for expert 1.
    assert coupling_loss(matrix, 0.5) == pytest.approx(3 / 4)


def test_no_router_matrix_of_that_width(monkeypatch):
    view = tiny_view(num_hidden_layers=1)
    view[0]._matrix = None
    with pytest.raises(UserError, match="no layer has a router matrix"):
        coupling(view)
