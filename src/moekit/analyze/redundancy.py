"""Experts that do the same: by weights, by outputs on shared inputs, and by how they are used."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moekit.analyze.linkage import average_linkage
from moekit.analyze.reading import blocks, multi_hot
from moekit.analyze.rerun import rerun
from moekit.analyze.result import Result
from moekit.analyze.similarity import (
    expert_outputs,
    output_cka,
    output_cosine,
    weight_similarity,
)
from moekit.core.collect import Batch
from moekit.core.errors import UserError
from moekit.core.port import SeamCall
from moekit.core.registry import register
from moekit.core.trace import RoutingTrace
from moekit.core.view import MoEView

Array = NDArray[np.float64]
BY = ("weights", "outputs", "cka", "use")


class Inputs:
    """A sink that keeps the experts' inputs of up to `limit` tokens, by position of the layer."""

    def __init__(self, limit: int):
        self.limit = limit

    def start(self, view: MoEView) -> None:
        self.kept: dict[int, list[Tensor]] = {layer.position: [] for layer in view}

    def batch(self, batch: Batch) -> None: ...

    def layer(self, call: SeamCall) -> None:
        kept = self.kept[call.layer.position]
        room = self.limit - sum(map(len, kept))
        hidden = call.hidden if call.mask is None else call.hidden[call.mask.bool()]
        if room > 0:
            kept.append(hidden[:room].detach().clone())

    def end_batch(self) -> None: ...

    def close(self) -> None: ...


@register(
    "measure",
    "redundancy",
    title="Similarity of experts by weights, outputs (cosine, CKA) and co-use; near-duplicates",
    paper="HC-SMoE 2410.08589",
    needs=("trace", "weights"),
    options={
        "duplicate": "weights and outputs at least so similar make two experts near-duplicates",
        "by": "similarity of the dendrogram: weights, outputs, cka or use",
        "max_tokens": "tokens that go through all experts of every layer",
        "sketch": "directions on which weights are compared; exact from 3 times the width on",
        "seed": "seed of those directions",
    },
)
def redundancy(
    trace: RoutingTrace,
    view: MoEView,
    *,
    duplicate: float = 0.9,
    by: str = "weights",
    max_tokens: int = 256,
    sketch: int = 256,
    seed: int = 0,
) -> Result:
    """Compare all pairs of experts of every layer in four ways, largest and mean over pairs.

    `weights` does not depend on the order of neurons; `outputs` is the cosine and `cka` the
    debiased linear CKA of what the experts make of the same tokens; `use` is the correlation of
    being chosen, negative where two experts stand in for each other. `detail` has the matrices and
    an average linkage in SciPy's format. Raises UserError for an unknown `by`, a trace of another
    model or without token ids.
    """
    if by not in BY:
        raise UserError(f"by is {by!r}; it is one of {', '.join(BY)}")
    sink = Inputs(max_tokens)
    rerun(trace, view, [sink], max_tokens)
    rows, detail, pairs = [], {}, []
    for layer in view:
        with torch.inference_mode():
            hidden = torch.cat(sink.kept.pop(layer.position) or [torch.empty(0)])
            outputs = expert_outputs(layer, hidden)
            matrices = {
                "weights": weight_similarity(layer, sketch, seed),
                "outputs": output_cosine(outputs),
                "cka": output_cka(outputs),
                "use": co_use(trace, layer.position)[: layer.num_experts, : layer.num_experts],
            }
        found = _duplicates(matrices, duplicate)
        pairs += [{"layer": layer.index, **pair} for pair in found]
        rows.append(
            (
                layer.index,
                *(value for name in BY for value in _spread(matrices[name])),
                len(found),
            )
        )
        tree = average_linkage(1 - np.nan_to_num(matrices[by]))
        detail[str(layer.index)] = {**matrices, "linkage": tree}
    columns = [name if kind == "mean" else f"{name} max" for name in BY for kind in ("mean", "max")]
    return Result(
        ("layer", *columns, "duplicates"),
        rows,
        {
            "tokens": min(max_tokens, len(trace)),
            "near_duplicates": len(pairs),
            "mean_weights": float(np.mean([row[1] for row in rows])),
            "mean_outputs": float(np.mean([row[3] for row in rows])),
            "largest_weights": float(np.max([row[2] for row in rows])),
        },
        {"pairs": pairs, "by": by, "layers": detail},
    )


def co_use(trace: RoutingTrace, position: int) -> Array:
    """Correlation over tokens of being chosen, [E, E]; 0 for experts never or always chosen."""
    num_experts = trace.layers[position].num_experts
    both = np.zeros((num_experts, num_experts))
    tokens = 0
    for _, ids in blocks(trace, position):
        hot = multi_hot(ids, num_experts)
        both += hot.T @ hot
        tokens += len(ids)
    share = both / max(tokens, 1)
    alone = share.diagonal()
    covariance = share - np.outer(alone, alone)
    scale = np.sqrt(np.outer(alone * (1 - alone), alone * (1 - alone)))
    return np.divide(covariance, scale, out=np.zeros_like(share), where=scale > 1e-12)


def _spread(matrix: Array) -> tuple[float, float]:
    """Mean and largest over pairs of different experts."""
    off = matrix[~np.eye(len(matrix), dtype=bool)]
    if not len(off):
        return float("nan"), float("nan")
    return float(off.mean()), float(off.max())


def _duplicates(matrices: dict[str, Array], threshold: float) -> list[dict[str, Any]]:
    """Pairs alike in weights and in outputs, most alike first.

    Both are asked for: two experts that are rarely used may compute alike by being small.
    """
    alike = np.minimum(matrices["weights"], matrices["outputs"])
    first, second = np.nonzero(np.triu(alike >= threshold, 1))
    order = np.argsort(-alike[first, second], kind="stable")
    return [
        {"experts": [int(i), int(j)], **{name: float(matrices[name][i, j]) for name in BY}}
        for i, j in zip(first[order], second[order], strict=True)
    ]
