"""The default, cheap set: who is chosen, with which weight, norm, logit and company.

Shapes: T tokens, K choices, C choices of a layer, G domains, M moments, H residual width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moekit.core.stats_table import DEFAULT_MOMENTS, RATIO_BINS, Moment
from moekit.profile.collector import ProfiledCall, Sums
from moekit.profile.experts_run import ExpertRows

# Matrices of C x C beyond this would be larger than everything else together.
MAX_SQUARE = 2048
# Tokens whose logits are widened to float64 at once.
LOGIT_ROWS = 8192


@dataclass
class _Previous:
    """The choices of the same tokens in the MoE layer before."""

    position: int
    forward_id: int
    ids: Tensor
    num_choices: int


class RoutingSums:
    """Collects every statistic of the default set.

    `kept_share` is the share of its token's top-k softmax that a logit needs to count in
    `kept_logit_sum` (PreMoe, 2505.17639).
    """

    def __init__(self, moments: Sequence[Moment] = DEFAULT_MOMENTS, kept_share: float = 0.0):
        self.moments = [Moment(*m) for m in moments]
        self.kept_share = kept_share
        self._previous: _Previous | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What two parts must share to be added."""
        return {"moments": [list(m) for m in self.moments], "kept_share": self.kept_share}

    def begin(self, call: ProfiledCall) -> None:
        pairs, device = call.seam.ids.numel(), call.seam.ids.device
        self._norms = torch.zeros(pairs, device=device)
        self._peaks = torch.zeros(pairs, device=device)
        self._middle_max: Tensor | None = None

    def rows(self, call: ProfiledCall, rows: ExpertRows, sums: Sums) -> None:
        self._norms[rows.pairs] = torch.linalg.vector_norm(rows.output, dim=-1, dtype=torch.float32)
        low, high = torch.aminmax(rows.output, dim=-1)
        self._peaks[rows.pairs] = torch.maximum(-low, high).float()
        if rows.middle is not None:
            middle = rows.middle if call.kept is None else rows.middle[call.kept[rows.tokens]]
            if self._middle_max is None:
                self._middle_max = rows.middle.new_zeros(call.layer.num_experts)
            if middle.numel():
                low, high = torch.aminmax(middle)
                largest = torch.maximum(-low, high)
                self._middle_max[rows.expert] = torch.maximum(
                    self._middle_max[rows.expert], largest
                )

    def end(self, call: ProfiledCall, update: Tensor, sums: Sums) -> None:
        seam, position = call.seam, call.position
        groups = call.num_domains
        tokens = torch.bincount(call.domain, minlength=groups + 1)[:groups]
        sums.add(position, "tokens", tokens)
        self._add_choices(call, update, sums)
        self._add_company(call, sums)
        if seam.logits is not None:
            for start in range(0, len(seam.logits), LOGIT_ROWS):
                piece = slice(start, start + LOGIT_ROWS)
                ids, domain = seam.ids[piece], call.domain[piece]
                self._add_logits(call, seam.logits[piece], ids, domain, sums)
        absolute = call.unpadded(seam.hidden).float().abs()
        if len(absolute):
            sums.add(position, "input_max", absolute.amax(0))
            sums.add(position, "input_abs_sum", absolute.sum(0))
            if call.residual is not None:
                squares = call.unpadded(call.residual).float().square()
                sums.add(position, "residual_max", squares.amax(0).sqrt())
                sums.add(position, "residual_sq_sum", squares.sum(0))
        if self._middle_max is not None:
            sums.add(position, "middle_max", self._middle_max)

    def _add_choices(self, call: ProfiledCall, update: Tensor, sums: Sums) -> None:
        position, choices, groups = call.position, call.layer.num_choices, call.num_domains
        ids = call.seam.ids
        # Padding and unused choices fall into rows beyond the last domain, which are cut off.
        rows = (groups + 1) * choices
        keys = call.domain.unsqueeze(-1) * choices + ids
        keys = keys.where(ids >= 0, rows - 1).flatten()
        count = torch.bincount(keys, minlength=rows)[: groups * choices]
        sums.add(position, "count", count.view(groups, choices))
        gates = call.seam.weights.flatten().double()
        factors = (gates, self._norms.double(), self._pair_contributions(call, update))
        values = torch.stack([_power(factors, moment) for moment in self.moments], dim=-1)
        total = values.new_zeros(rows, len(self.moments)).index_add_(0, keys, values)
        total = total[: groups * choices].view(groups, choices, -1)
        sums.add(position, "moments", total)
        peaks = self._peaks.new_zeros(rows).scatter_reduce_(0, keys, self._peaks, "amax")
        peaks = peaks[: groups * choices].view(groups, choices).amax(0)
        sums.add(position, "output_max", peaks)

    def _pair_contributions(self, call: ProfiledCall, update: Tensor) -> Tensor:
        top_k = call.seam.ids.shape[1]
        if call.residual is None or call.residual.shape != update.shape:
            # Unknown, which must not pass for zero.
            return update.new_full((call.seam.ids.numel(),), float("nan"), dtype=torch.float64)
        change = token_contributions(call.residual.float(), update.float() * call.scale)
        return change.double().repeat_interleave(top_k)

    def _add_company(self, call: ProfiledCall, sums: Sums) -> None:
        position, choices = call.position, call.layer.num_choices
        ids = call.unpadded(call.seam.ids)
        weights = call.unpadded(call.seam.weights).float()
        if weights.shape[1] > 1:
            first, second = weights.topk(2, dim=-1).values.unbind(-1)
            ratio = second / first
            ratio = ratio[(first > 0) & (second >= 0)]
            bins = (ratio * RATIO_BINS).long().clamp(max=RATIO_BINS - 1)
            sums.add(position, "weight_ratio", torch.bincount(bins, minlength=RATIO_BINS))
        previous = self._previous
        forward_id = call.seam.tokens.forward_id
        self._previous = _Previous(position, forward_id, call.seam.ids, choices)
        if choices > MAX_SQUARE:
            return
        sums.add(position, "coactivation", pair_counts(ids, ids, choices, choices))
        if (
            previous is not None
            and previous.position == position - 1
            and previous.forward_id == forward_id
            and len(previous.ids) == len(call.seam.ids)
            and previous.num_choices <= MAX_SQUARE
        ):
            before = call.unpadded(previous.ids)
            flow = pair_counts(before, ids, previous.num_choices, choices)
            sums.add(position, "transitions", flow)

    def _add_logits(
        self, call: ProfiledCall, logits: Tensor, chosen: Tensor, domain: Tensor, sums: Sums
    ) -> None:
        position, groups, choices = call.position, call.num_domains, logits.shape[1]
        logits = logits.float()
        wide = logits.double()

        def by_domain(values: Tensor) -> Tensor:
            total = values.new_zeros(groups + 1, choices)
            return total.index_add_(0, domain, values)[:groups]

        sums.add(position, "logit_sum", by_domain(wide))
        probability = logits.softmax(-1).double()
        sums.add(position, "softmax_sum", by_domain(probability))
        picked = torch.zeros_like(probability).scatter_(1, chosen.clamp(min=0), 1.0)
        # An unused choice, -1, must not count as one of expert 0.
        picked[:, 0] = (chosen == 0).any(-1).double()
        sums.add(position, "chosen_softmax_sum", by_domain(probability * picked))
        unpadded = wide if call.kept is None else wide[domain < groups]
        if choices <= MAX_SQUARE:
            sums.add(position, "logit_gram", unpadded.T @ unpadded)
        largest, winner = logits.max(-1)
        keys = domain * choices + winner
        rows = (groups + 1) * choices
        count = torch.bincount(keys, minlength=rows)[: groups * choices]
        sums.add(position, "top_logit_count", count.view(groups, choices))
        total = wide.new_zeros(rows).index_add_(0, keys, largest.double())
        sums.add(position, "top_logit_sum", total[: groups * choices].view(groups, choices))
        top, ids = logits.topk(min(call.layer.top_k, choices), dim=-1)
        kept = top.where(top.softmax(-1) >= self.kept_share, 0).double()
        keys = (domain.unsqueeze(-1) * choices + ids).flatten()
        total = wide.new_zeros(rows).index_add_(0, keys, kept.flatten())
        sums.add(position, "kept_logit_sum", total[: groups * choices].view(groups, choices))


def token_contributions(residual: Tensor, update: Tensor) -> Tensor:
    """max(0, 1 - cos(h, h + r)) for every token: residual h and update r, both [T, H]; [T].

    EASY-EP, 2504.06792. By the part of r that is across h, since the plain formula loses all digits
    where r is small beside h.
    """
    length = residual.norm(dim=-1, keepdim=True)
    along = residual / length.clamp(min=torch.finfo(residual.dtype).tiny)
    shift = (update * along).sum(-1, keepdim=True)
    across = update - shift * along
    side, front = across.norm(dim=-1), (length + shift).squeeze(-1)
    after = torch.hypot(side, front)
    cosine = front / after.clamp(min=torch.finfo(residual.dtype).tiny)
    stable = side.square() / (after.square() * (1 + cosine)).clamp(min=1e-30)
    change = torch.where(cosine > 0, stable, 1 - cosine)
    return change.where((length.squeeze(-1) > 0) & (after > 0), 0)


def pair_counts(first: Tensor, second: Tensor, rows: int, columns: int) -> Tensor:
    """Count pairs of choices of one token: ids [T, J] and [T, K], -1 for none; [rows, columns]."""
    keys = first.unsqueeze(-1) * columns + second.unsqueeze(-2)
    used = (first >= 0).unsqueeze(-1) & (second >= 0).unsqueeze(-2)
    keys = keys.where(used, rows * columns).flatten()
    return torch.bincount(keys, minlength=rows * columns + 1)[:-1].view(rows, columns)


def _power(factors: tuple[Tensor, Tensor, Tensor], moment: Moment) -> Tensor:
    value = torch.ones_like(factors[0])
    for factor, exponent in zip(factors, moment, strict=True):
        for _ in range(exponent):
            value = value * factor
    return value
