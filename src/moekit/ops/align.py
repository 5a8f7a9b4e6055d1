"""Permutations that bring the neurons of one expert into the order of another's.

Shapes: F neurons of an expert, P numbers describing a neuron, T tokens. An `order` [F] says which
neuron comes to each place: place j gets neuron `order[j]`.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def match(similarity: Tensor) -> Tensor:
    """The order [F] that maximises the sum of similarity[j, order[j]] over places j, [F, F].

    Linear sum assignment (Hungarian method), exact; its time grows with F cubed. Raises ValueError
    for a matrix that is not square or has entries that are no numbers.
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"similarity must be square, not {list(similarity.shape)}")
    _, columns = linear_sum_assignment(similarity.numpy(force=True), maximize=True)
    return torch.from_numpy(columns)


def match_weights(reference: Tensor, other: Tensor) -> Tensor:
    """The order that brings the neurons `other` [F, P] nearest to `reference` [F, P].

    Nearest in the sum of squared differences, which is the largest sum of inner products. A
    permuted copy is recovered exactly (M-SMoE 2310.01334, step 1).
    """
    return match(reference.double() @ other.double().T)


def match_activations(reference: Tensor, other: Tensor) -> Tensor:
    """The order that brings activations `other` [T, F] nearest to `reference` [T, F].

    Nearest by the correlation of neurons over the same tokens, so their scale does not matter
    (the activation matching of PLeaS 2407.02447, with the correlations of ZipIt 2305.03053).
    """
    return match(correlation(reference, other))


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Correlations [F, G] over tokens of the columns of [T, F] with those of [T, G].

    0 where a column never varies.
    """
    return _standard(first).T @ _standard(second)


def inverse(order: Tensor) -> Tensor:
    """The order that undoes `order`."""
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), dtype=order.dtype, device=order.device)
    return back


def _standard(values: Tensor) -> Tensor:
    centred = values.double() - values.double().mean(0)
    norms = centred.norm(dim=0)
    # Rounding of a constant column must not count as variation.
    still = norms <= 1e-9 * values.double().norm(dim=0)
    return centred.div(norms.masked_fill(still, 1)).masked_fill(still, 0)
