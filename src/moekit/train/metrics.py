"""What the log says about the routers."""

import math

from torch import Tensor


def router_metrics(
    counts: list[Tensor], lost: list[Tensor] | None = None, tokens: int | None = None
) -> dict[str, list[float] | float | int]:
    """Load statistics from `counts` [E] by layer, the pairs that each expert received.

    `imbalance` is the largest load over the mean, by layer; `dead` the number of experts with no
    token at all; `entropy` the load's entropy over its maximum, log E, by layer. With `lost`, the
    pairs that a capacity lost by layer, `dropped` is their share of all, and with `tokens`
    `experts_per_token` the pairs computed for each, where either is not the same for all layers.
    """
    imbalance, entropy = [], []
    for count in counts:
        share = count.double() / count.double().sum().clamp_min(1)
        bits = -(share * share.clamp_min(1e-30).log()).sum()
        imbalance.append(round(float(share.max()) * len(count), 4))
        entropy.append(round(float(bits) / max(math.log(len(count)), 1e-30), 4))
    dead = sum(int((count == 0).sum()) for count in counts)
    found: dict[str, list[float] | float | int] = {
        "imbalance": imbalance,
        "dead": dead,
        "entropy": entropy,
    }
    sums = [float(count.sum()) for count in counts]
    missing = [float(part) for part in lost or ()]
    if any(missing):
        shares = zip(missing, sums, strict=True)
        found["dropped"] = [round(part / max(1.0, part + kept), 5) for part, kept in shares]
    if tokens:
        found["experts_per_token"] = [round(part / tokens, 4) for part in sums]
    return found
