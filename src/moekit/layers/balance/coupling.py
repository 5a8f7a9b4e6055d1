"""Expert-router coupling: each row of the router excites its own expert most.

Shapes: E experts, D width, F expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register

from ..routing import Routing

# Experts whose responses to all proxies are computed at once.
_CHUNK = 32


def coupling_loss(
    router: Tensor, gate: Tensor, *, alpha: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """ERC loss (arXiv 2512.23447) of `router` rows [E, D] and gate projections `gate` [E, F, D].

    A proxy is a router row times uniform noise within half its distance to the nearest other row.
    With M[i, j] the norm of expert j's gate pre-activations for proxy i, the loss is the sum over
    i != j of relu(M[i, j] - alpha M[i, i]) + relu(M[j, i] - alpha M[i, i]), over E^2. Gradients
    reach both; its cost does not depend on the number of tokens. Scaling the router or all gates
    scales the loss, so a smaller one is not by itself a closer coupling.
    """
    proxies = router * _noise(router, generator)
    norms = [torch.einsum("id,jfd->ijf", proxies, part).norm(dim=-1) for part in gate.split(_CHUNK)]
    response = torch.cat(norms, 1)
    own = alpha * response.diagonal().unsqueeze(1)
    excess = (response - own).relu() + (response.t() - own).relu()
    others = 1 - torch.eye(len(router), device=router.device, dtype=router.dtype)
    return (excess * others).sum() / len(router) ** 2


@torch.no_grad()
def _noise(router: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform around 1 by half the relative distance to the nearest other row: [E, D]."""
    distance = torch.cdist(router, router)
    nearest = distance.fill_diagonal_(float("inf")).amin(1)
    reach = nearest / (2 * router.norm(dim=1)).clamp_min(1e-20)
    draw = torch.rand(router.shape, generator=generator, device=router.device, dtype=router.dtype)
    return 1 + (2 * draw - 1) * reach.unsqueeze(1)


@register(
    "balance",
    "coupling",
    title="Each router row excites its own expert most, and each expert responds most to its row",
    paper="ERC, arXiv:2512.23447",
    needs=("weights", "training"),
    limits="Linear router over one bank of SwiGLU experts.",
    options={"alpha": "how much of its own response another expert may show"},
)
def coupling_of_layer(
    routing: Routing, *, layer: nn.Module | None, generator: torch.Generator, alpha: float = 1.0
) -> Tensor:
    """`coupling_loss` of the layer that made `routing`; UserError for one of another kind."""
    score = getattr(getattr(layer, "router", None), "score", None)
    banks = getattr(getattr(layer, "pool", None), "banks", [])
    router = getattr(score, "weight", None)
    if not isinstance(router, Tensor) or len(banks) != 1:
        raise UserError("the coupling loss needs a linear router over one bank of experts")
    bank = banks[0]
    if not hasattr(bank, "gate_up_proj"):
        raise UserError("the coupling loss needs gated experts (swiglu)")
    gate = bank.gate_up_proj.chunk(2, 1)[0]
    return coupling_loss(router.float(), gate.float(), alpha=alpha, generator=generator)
