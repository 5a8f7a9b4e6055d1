"""D2MoE's second router: how many bit planes of an expert each token gets.

D2MoE, arXiv 2504.15299. Experts are stored as nested planes, of which any first few are a valid
expert; a linear map for each expert chooses among them. It is trained with everything else frozen,
on the model's own distribution and a price for each bit. Shapes: T tokens, D width, V vocabulary,
E experts, B options (planes), n tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moekit.compress.quantize.layer_experts import middle_of, output_of
from moekit.core.errors import UserError
from moekit.core.expert_weights import ExpertWeights
from moekit.core.layer import MoELayer
from moekit.core.new_experts import decode_expert
from moekit.core.rewrite import EncodedExpert
from moekit.core.seam import replace_backend
from moekit.core.seeds import generator
from moekit.core.view import MoEView


class BitRouter(nn.Module):
    """Logits of the options of each expert of a layer, from the experts' input."""

    def __init__(self, num_experts: int, width: int, options: int) -> None:
        super().__init__()
        # Zeros: no option is preferred at first.
        self.weight = nn.Parameter(torch.zeros(num_experts, options, width))

    def forward(self, hidden: Tensor, expert: int) -> Tensor:
        """Probabilities [n, B] for hidden [n, D]."""
        return functional.linear(hidden.float(), self.weight[expert]).softmax(-1)


@dataclass
class Spent:
    """What one forward used: the mean price in bits, differentiable, and the bits in fact."""

    expected: Tensor
    bits: float


class NestedExperts:
    """The experts of a model at each number of planes, and a bit router for each layer.

    `encoded` maps (position of the layer, expert) to a nested encoding; `bits` [B] are those of its
    first, first two, ... planes. Holds every option decoded.
    """

    def __init__(
        self, view: MoEView, encoded: Mapping[tuple[int, int], EncodedExpert], bits: Sequence[int]
    ) -> None:
        self.view, self.bits = view, torch.tensor(bits, dtype=torch.float32)
        self._options = {
            key: [_decoded(view[key[0]], key[1], made, planes + 1) for planes in range(len(bits))]
            for key, made in encoded.items()
        }
        self.routers = nn.ModuleList(
            BitRouter(layer.num_experts, layer.get_expert(0).down.shape[0], len(bits))
            for layer in view
        )

    @contextmanager
    def active(
        self, capacities: Sequence[float] | None = None, seed: int = 0
    ) -> Iterator[list[Spent]]:
        """Let the experts run at the bits that the routers choose, one `Spent` for each layer call.

        With `capacities` [B], shares of an expert's tokens, an option takes no more than its own,
        and tokens beyond that, drawn by `seed`, are dropped from the expert: for training.
        """
        spent: list[Spent] = []
        with ExitStack() as stack:
            for layer in self.view:

                def run(
                    experts: Any, hidden: Tensor, ids: Tensor, weights: Tensor, layer=layer
                ) -> Tensor:
                    return self._run(layer, hidden, ids, weights, capacities, seed, spent)

                stack.enter_context(replace_backend(self.view, run, layers=[layer.position]))
            yield spent

    def _run(
        self,
        layer: MoELayer,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        capacities: Sequence[float] | None,
        seed: int,
        spent: list[Spent],
    ) -> Tensor:
        total = torch.zeros_like(hidden)
        prices, used = [], []
        for e in range(layer.num_experts):
            tokens, choices = (ids == e).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            probabilities = self.routers[layer.position](hidden[tokens], e)
            prices.append(probabilities @ self.bits)
            option = probabilities.argmax(-1)
            kept = _within(option, capacities, seed + layer.position * layer.num_experts + e)
            used.append(self.bits[option])
            for at, expert in enumerate(self._options[layer.position, e]):
                mine = ((option == at) & kept).nonzero().flatten()
                if not len(mine):
                    continue
                rows = tokens[mine]
                out = output_of(layer, expert, middle_of(layer, expert, hidden[rows]))
                chosen = probabilities[mine, at, None]
                # One, with the gradient of the probability that chose.
                gate = weights[rows, choices[mine], None] * (chosen / chosen.detach())
                total = total.index_add(0, rows, (out * gate).to(total.dtype))
        spent.append(Spent(torch.cat(prices).mean(), float(torch.cat(used).mean())))
        return total


def train_bit_routers(
    experts: NestedExperts,
    batches: Iterable[Tensor],
    *,
    price: float,
    capacities: Sequence[float] | None = None,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> list[float]:
    """Train the routers on token ids [B, S], one step a batch; returns the loss of each.

    Loss = cross-entropy to the full model's distribution + `price` * mean expected bits of a layer.
    Only the routers change.
    """
    model: Any = experts.view.model
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam(experts.routers.parameters(), lr=learning_rate)
    losses = []
    for step, ids in enumerate(batches):
        with torch.no_grad():
            wanted = model(input_ids=ids, use_cache=False).logits.float().softmax(-1)
        draw = int(torch.randint(2**31, (1,), generator=generator(seed, "bit-router", step)))
        with experts.active(capacities, draw) as spent:
            found = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        bits = torch.stack([each.expected for each in spent]).mean()
        loss = -(wanted * found).sum(-1).mean() + price * bits
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _within(option: Tensor, capacities: Sequence[float] | None, seed: int) -> Tensor:
    """Which of n tokens their options [n] have room for."""
    kept = torch.ones(len(option), dtype=torch.bool)
    if capacities is None:
        return kept
    order = torch.randperm(len(option), generator=torch.Generator().manual_seed(seed))
    for at, share in enumerate(capacities):
        room = max(1, round(share * len(option)))
        mine = order[option[order] == at]
        kept[mine[room:]] = False
    return kept


def _decoded(layer: MoELayer, expert: int, made: EncodedExpert, planes: int) -> ExpertWeights:
    if made.codec.num_planes < planes:
        raise UserError(
            f"{layer.name}, expert {expert} has {made.codec.num_planes} planes, not {planes}; "
            "quantize with a nested codec."
        )
    first = {name: matrix.prefix(planes) for name, matrix in made.matrices.items()}
    prefix = EncodedExpert(made.codec, first, made.vectors)
    return decode_expert(prefix, layer.get_expert(expert).down.dtype)
