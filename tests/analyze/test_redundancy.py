"""Near-duplicate experts: found where planted, neurons in any order; none in a random layer."""

import numpy as np
import pytest
import torch

from moekit.analyze.linkage import average_linkage
from moekit.analyze.redundancy import co_use, redundancy
from moekit.analyze.similarity import (
    expert_outputs,
    output_cka,
    output_cosine,
    weight_similarity,
)
from moekit.core.errors import UserError
from moekit.core.expert_weights import ExpertWeights

from .models import tiny_view, traced
from .traces import make_trace, random_ids


@pytest.fixture(scope="module")
def view():
    return tiny_view()


def plant(view, noise=0.0, permute=True):
    """Expert 9 of the last layer becomes expert 2 with its neurons in another order."""
    source = view[2].get_expert(2)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    order = order if permute else torch.arange(16)
    parts = [source.gate[order], source.up[order], source.down[:, order]]
    generator = torch.Generator().manual_seed(1)
    parts = [p + noise * p.std() * torch.randn(p.shape, generator=generator) for p in parts]
    view[2].set_expert(9, ExpertWeights(*parts))
    return view


@pytest.mark.parametrize("permute", [True, False])
def test_planted_duplicates_are_found(permute):
    planted = plant(tiny_view(), permute=permute)
    result = redundancy(traced(planted), planted)
    assert [(p["layer"], p["experts"]) for p in result.detail["pairs"]] == [(2, [2, 9])]
    pair = result.detail["pairs"][0]
    # The same numbers, summed in another order.
    assert min(pair["weights"], pair["outputs"], pair["cka"]) > 1 - 1e-5
    assert result.column("duplicates") == [0, 0, 1]
    first_merge = result.detail["layers"]["2"]["linkage"][0]
    assert first_merge[:2].tolist() == [2, 9]
    assert first_merge[2] == pytest.approx(0, abs=1e-5)


def test_a_noisy_copy_is_near(view):
    planted = plant(tiny_view(), noise=0.1)
    result = redundancy(traced(planted), planted, duplicate=0.9)
    assert [p["experts"] for p in result.detail["pairs"]] == [[2, 9]]
    # One part in a hundred of the energy is noise in each of three products.
    assert 0.95 < result.detail["pairs"][0]["outputs"] < 0.999


@pytest.mark.parametrize("seed", range(3))
def test_a_random_model_has_no_duplicates(seed):
    random = tiny_view(seed)
    result = redundancy(traced(random), random)
    assert result.summary["near_duplicates"] == 0
    # Independent experts: 0 up to the spread of 120 pairs of 96-wide Gram matrices.
    assert abs(result.summary["mean_weights"]) < 0.03
    assert result.summary["largest_weights"] < 0.3


def test_only_copied_weights_do_not_make_a_pair(view):
    """The negative of the down projection: the same Gram matrix but for signs, other outputs."""
    other = tiny_view()
    source = other[0].get_expert(3)
    other[0].set_expert(4, ExpertWeights(source.gate, source.up, -source.down))
    result = redundancy(traced(other), other)
    assert result.summary["near_duplicates"] == 0
    assert result.detail["layers"]["0"]["outputs"][3, 4] == pytest.approx(-1, abs=1e-5)
    assert result.detail["layers"]["0"]["cka"][3, 4] == pytest.approx(1, abs=1e-5)


def test_weight_similarity_by_hand(view):
    found = weight_similarity(view[0], 96, 0)
    centred = []
    for e in (0, 1):
        w = view[0].get_expert(e)
        rows = torch.cat([m / m.square().mean().sqrt() for m in (w.gate, w.up, w.down.T)], 1)
        gram = rows.T @ rows
        centred.append((gram - gram.trace() / 96 * torch.eye(96)).flatten())
    expected = torch.nn.functional.cosine_similarity(*centred, dim=0)
    assert found[0, 1] == pytest.approx(float(expected), abs=1e-5)


def test_a_sketch_finds_the_same_pair():
    planted = plant(tiny_view())
    exact, sketched = weight_similarity(planted[2], 96, 0), weight_similarity(planted[2], 32, 0)
    assert sketched[2, 9] == pytest.approx(1, abs=1e-5)
    # A third of the directions: an estimate, whose error is far below the gap to 1.
    assert np.abs(exact - sketched).max() < 0.35


def test_cka_ignores_rotations_and_cosine_does_not():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(1, 60, 8, generator=generator)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    independent = torch.randn(1, 60, 8, generator=generator)
    three = torch.cat([outputs, outputs @ rotation, independent])
    cka, cosine = output_cka(three), output_cosine(three)
    assert cka[0, 1] == pytest.approx(1, abs=1e-6)
    # Debiased, so independent outputs are at 0 within a few standard errors of 60 tokens.
    assert abs(cka[0, 2]) < 0.1
    assert abs(cosine[0, 1]) < 0.5
    assert np.isnan(output_cka(three[:, :3])).all()


def test_expert_outputs_are_those_of_the_experts(view):
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        outputs = expert_outputs(view[1], hidden)
        torch.testing.assert_close(outputs[7], view[1].run_expert(7, hidden))


def test_co_use_of_known_traces():
    """Experts 0 and 1 always together, 2 and 3 always together, never across."""
    ids = np.array([[0, 1], [2, 3]] * 10)
    found = co_use(make_trace(ids, 5), 0)
    assert found[0, 1] == pytest.approx(1)
    assert found[0, 2] == pytest.approx(-1)
    assert (found[4] == 0).all()
    # Independent choices without replacement: slightly negative, never far from it.
    null = co_use(make_trace(random_ids(4000, 8, 2), 8), 0)
    off = null[~np.eye(8, dtype=bool)]
    assert off.mean() == pytest.approx(-1 / 7, abs=0.01)
    assert np.ptp(off) < 0.12


def test_linkage_of_a_known_tree():
    distance = np.array([[0, 1, 8, 8], [1, 0, 6, 10], [8, 6, 0, 2], [8, 10, 2, 0]], dtype=float)
    assert average_linkage(distance).tolist() == [[0, 1, 1, 2], [2, 3, 2, 2], [4, 5, 8, 4]]


def test_linkage_equals_scipy():
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    points = np.random.default_rng(0).normal(size=(40, 3))
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    expected = hierarchy.linkage(distance[np.triu_indices(40, 1)], "average")
    np.testing.assert_allclose(average_linkage(distance), expected, rtol=1e-12)


def test_unknown_similarity_is_refused(view):
    with pytest.raises(UserError, match="by is 'router'; it is one of weights"):
        redundancy(traced(view), view, by="router")
