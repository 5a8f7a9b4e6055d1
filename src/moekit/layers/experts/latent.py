"""Latent experts: small private matrices behind projections that groups of experts share.

MoLAE, arXiv 2503.23100. With groups of one expert this is a low-rank expert.

Shapes: T tokens, D width, F expert width, E experts, q experts a group, G = E / q groups, M latent
width, N pairs, P different pairs of a token and a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register, register_preset, registry

from ..compute import grouped_linear
from ..routing import Pairs


@register(
    "expert",
    "latent",
    title="Gated experts of private matrices behind projections that a group shares",
    paper="MoLAE, arXiv:2503.23100",
    needs=("training",),
    options={
        "expert_width": "width F between the two products",
        "latent_width": "width M of what a group shares; None: expert_width",
        "group": "experts that share their projections",
        "latent_down": "the down projection is shared in part as well (version 2 of the paper)",
    },
)
class LatentExperts(nn.Module):
    """down(silu(gate (B_gate x)) * up (B_up x)), the B of a group computed once for a token.

    `shared_gate_up` [G, 2M, D] with the gate's B first, `gate` and `up` [E, F, M]. With
    `latent_down` the down projection is `shared_down` [G, D, M] after `down` [E, M, F]; otherwise
    `down` [E, D, F].
    """

    def __init__(
        self,
        width: int,
        count: int,
        *,
        expert_width: int,
        latent_width: int | None = None,
        group: int = 1,
        latent_down: bool = True,
    ) -> None:
        super().__init__()
        latent = expert_width if latent_width is None else latent_width
        if group < 1 or count % group:
            raise UserError(f"group {group} does not divide the {count} experts")
        if latent < 8 or latent % 8:
            raise UserError(f"latent_width {latent} is not a multiple of 8")
        groups = count // group
        self.num_experts, self.group = count, group
        self.cost = 2 * latent * (width + expert_width)
        self.cost += latent * (width + expert_width) if latent_down else width * expert_width
        self.shared_gate_up = nn.Parameter(torch.empty(groups, 2 * latent, width))
        self.gate = nn.Parameter(torch.empty(count, expert_width, latent))
        self.up = nn.Parameter(torch.empty(count, expert_width, latent))
        down_rows = latent if latent_down else width
        self.down = nn.Parameter(torch.empty(count, down_rows, expert_width))
        if latent_down:
            self.shared_down = nn.Parameter(torch.empty(groups, width, latent))
        self.init_weights_with(0.02)

    @property
    def latent_down(self) -> bool:
        return hasattr(self, "shared_down")

    def init_weights_with(self, std: float) -> None:
        # Of two matrices in a row, so that the entries of their product have the deviation `std`.
        factor = (std / self.gate.shape[-1] ** 0.5) ** 0.5
        for weight in (self.shared_gate_up, self.gate, self.up, self.down):
            nn.init.normal_(weight, std=factor)
        if self.latent_down:
            nn.init.normal_(self.shared_down, std=factor)
        else:
            nn.init.normal_(self.down, std=std)

    def forward(self, hidden: Tensor, pairs: Pairs) -> Tensor:
        """Sum over pairs of weight * expert(hidden[token]): [T, D]."""
        order = torch.argsort(pairs.expert, stable=True)
        token, expert, weight = (values[order] for values in pairs)
        ends = _ends(expert, self.num_experts)
        # Pairs are in the order of experts, so their groups are too; tokens within, ascending.
        owner = expert // self.group * hidden.shape[0] + token
        owners, of_pair = owner.unique(return_inverse=True)
        group_ends = _ends(owners // hidden.shape[0], len(self.shared_gate_up))
        owner_token = owners % hidden.shape[0]
        rows = grouped_linear(hidden[owner_token], self.shared_gate_up, group_ends)
        gate_in, up_in = rows[of_pair].chunk(2, -1)
        gate = grouped_linear(gate_in.contiguous(), self.gate, ends)
        up = grouped_linear(up_in.contiguous(), self.up, ends)
        out = grouped_linear(F.silu(gate) * up, self.down, ends)
        out = out * weight.to(out.dtype)[:, None]
        if self.latent_down:
            # Weighted and summed before the shared product, which is linear.
            latent = out.new_zeros(len(owners), out.shape[1]).index_add(0, of_pair, out)
            out, token = grouped_linear(latent, self.shared_down, group_ends), owner_token
        total = torch.zeros_like(hidden, dtype=out.dtype).index_add(0, token, out)
        return total.to(hidden.dtype)

    def run_one(self, expert: int, rows: Tensor) -> Tensor:
        group = expert // self.group
        gate_in, up_in = F.linear(rows, self.shared_gate_up[group]).chunk(2, -1)
        middle = F.silu(F.linear(gate_in, self.gate[expert])) * F.linear(up_in, self.up[expert])
        out = F.linear(middle, self.down[expert])
        return F.linear(out, self.shared_down[group]) if self.latent_down else out


def _ends(sorted_ids: Tensor, count: int) -> Tensor:
    """Exclusive end of every id's entries among `sorted_ids`: int32 [count]."""
    return torch.bincount(sorted_ids, minlength=count).cumsum(0).to(torch.int32)


_OPTIONS = {option.name: option for option in registry.find("latent", kind="expert").options}

register_preset(
    LatentExperts,
    "low-rank",
    kind="expert",
    title="Gated experts of which every matrix is a product of two of a low rank",
    paper="MoLAE, arXiv:2503.23100",
    needs=("training",),
    settings={"group": 1},
    options=(_OPTIONS["expert_width"], _OPTIONS["latent_width"]),
)
