"""How evenly the experts of a layer are used."""

from __future__ import annotations

import numpy as np

from moekit.analyze.information import entropy
from moekit.analyze.reading import blocks, check_filled
from moekit.analyze.result import Result
from moekit.core.registry import register
from moekit.core.trace import RoutingTrace


@register(
    "measure",
    "load",
    title="Load by expert: imbalance, dead experts, entropy, effective number of experts",
    paper="Switch Transformers 2101.03961",
    needs=("trace",),
)
def load(trace: RoutingTrace) -> Result:
    """Measure the load of every layer's experts.

    Imbalance is the largest load over the mean. Entropy is over its maximum, so 1 is even; the
    effective number of experts is 2 to the entropy in bits. Dead experts were never chosen.
    """
    check_filled(trace)
    rows, counts, gates, notes = [], [], [], []
    for position, layer in enumerate(trace.layers):
        chosen, gate = _sums(trace, position)
        counts.append(chosen)
        gates.append(gate)
        total = chosen.sum()
        if not total:
            notes.append(f"layer {layer.index} was not passed by any token")
            continue
        bits = float(entropy(chosen))
        most = np.log2(layer.num_experts) if layer.num_experts > 1 else 1.0
        rows.append(
            (
                layer.index,
                layer.num_experts,
                float(chosen.max() / chosen.mean()),
                int((chosen == 0).sum()),
                bits / most,
                2**bits,
            )
        )
    dead = sum(row[3] for row in rows)
    if dead:
        notes.append(f"{dead} experts were never chosen in {len(trace)} tokens")
    return Result(
        ("layer", "experts", "imbalance", "dead", "entropy", "effective"),
        rows,
        {
            "tokens": len(trace),
            "mean_imbalance": float(np.mean([row[2] for row in rows])),
            "dead_experts": dead,
            "mean_entropy": float(np.mean([row[4] for row in rows])),
        },
        {"counts": counts, "gate_mass": gates},
        notes,
    )


def _sums(trace: RoutingTrace, position: int) -> tuple[np.ndarray, np.ndarray]:
    """Choices and summed weights of every expert, [E] each."""
    num_experts = trace.layers[position].num_experts
    chosen = np.zeros(num_experts, dtype=np.int64)
    gate = np.zeros(num_experts)
    for tokens, ids in blocks(trace, position):
        start, stop = int(tokens[0]), int(tokens[-1]) + 1
        weights = trace.layer(position, start, stop).topk_weights.float().numpy()
        real = ids >= 0
        chosen += np.bincount(ids[real], minlength=num_experts)
        gate += np.bincount(ids[real], weights=weights[real], minlength=num_experts)
    return chosen, gate
