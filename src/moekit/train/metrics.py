"""What the log says about the routers."""

import torch
from torch import Tensor


def router_metrics(counts: Tensor) -> dict[str, list[float] | float | int]:
    """Load statistics from `counts` [L, E], the pairs that each expert received.

    `imbalance` is the largest load over the mean, by layer; `dead` the number of experts with no
    token at all; `entropy` the load's entropy over its maximum, log E, by layer.
    """
    share = counts.double() / counts.double().sum(-1, keepdim=True).clamp_min(1)
    entropy = -(share * share.clamp_min(1e-30).log()).sum(-1)
    ceiling = torch.log(torch.tensor(float(counts.shape[-1]), dtype=torch.double))
    return {
        "imbalance": [round(value, 4) for value in (share.amax(-1) * counts.shape[-1]).tolist()],
        "dead": int((counts == 0).sum()),
        "entropy": [round(value, 4) for value in (entropy / ceiling).tolist()],
    }
