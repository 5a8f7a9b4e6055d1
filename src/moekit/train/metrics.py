"""What the log says about the routers."""

import math

from torch import Tensor


def router_metrics(counts: list[Tensor]) -> dict[str, list[float] | float | int]:
    """Load statistics from `counts` [E] by layer, the pairs that each expert received.

    `imbalance` is the largest load over the mean, by layer; `dead` the number of experts with no
    token at all; `entropy` the load's entropy over its maximum, log E, by layer.
    """
    imbalance, entropy = [], []
    for count in counts:
        share = count.double() / count.double().sum().clamp_min(1)
        bits = -(share * share.clamp_min(1e-30).log()).sum()
        imbalance.append(round(float(share.max()) * len(count), 4))
        entropy.append(round(float(bits) / max(math.log(len(count)), 1e-30), 4))
    dead = sum(int((count == 0).sum()) for count in counts)
    return {"imbalance": imbalance, "dead": dead, "entropy": entropy}
