"""Choosing the next token from the logits; the draw is keyed by (seed, sequence, position)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from moekit.core.errors import UserError
from moekit.core.seeds import derive_seed

CANDIDATES = (256, 4096)
SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen; the defaults draw from the model's own distribution.

    Applied in this order: logit bias, penalties, temperature, top-k, top-p, min-p. Temperature 0
    takes the likeliest token. The repetition penalty (CTRL, 1909.05858) looks at prompt and
    generated tokens, the frequency and presence penalties at generated ones only. Raises UserError
    for values out of range.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0  # of the likeliest token's probability
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, self.temperature >= 0, "0 or more")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (all) or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1")
        _check(
            "repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0"
        )

    @property
    def changes_logits(self) -> bool:
        """Whether a penalty or bias acts before the temperature."""
        return bool(
            self.logit_bias
            or self.repetition_penalty != 1
            or self.frequency_penalty
            or self.presence_penalty
        )


def _check(name: str, value: float, holds: bool, range_: str) -> None:
    if not holds:
        raise UserError(f"{name} {value:g} must be {range_}")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probability of a chosen token and of the likeliest ones, in the model's distribution.

    Natural logarithms of the softmax of the logits as the model gave them: temperature, penalties
    and cut-offs do not show.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Sampler:
    """Chooses the tokens of one sequence, one after another.

    The draw depends on (seed, `sequence`, position of the token) alone, so neither the batch nor
    the order of requests changes a text, and a sequence continued from its own tokens goes on the
    same way.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], sequence: int = 0) -> None:
        self.sampling = sampling
        self._sequence = sequence
        self._position = len(prompt)
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._generated: Counter[int] = Counter()

    @property
    def is_argmax(self) -> bool:
        """Whether the token is the likeliest one of the logits as they are."""
        return self.sampling.temperature == 0 and not self.sampling.changes_logits

    def choose(self, logits: torch.Tensor) -> int:
        """The next token for logits [V] in float32; counts it as generated."""
        sampling = self.sampling
        if sampling.changes_logits:
            logits = self._penalised(logits)
        if sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            # The peak at zero and a divisor that float32 can hold keep out infinity and 0 / 0.
            temperature = max(sampling.temperature, SMALLEST)
            token = self._draw((logits - logits.max()) / temperature)
        self.accept(token)
        return token

    def accept(self, token: int) -> None:
        """Count a token that was chosen outside, as the next of the sequence."""
        self._position += 1
        if self.sampling.changes_logits:
            self._generated[token] += 1
            self._seen.add(token)

    def _penalised(self, logits: torch.Tensor) -> torch.Tensor:
        sampling = self.sampling
        logits = logits.clone()
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias))
            logits[ids] += torch.tensor(list(sampling.logit_bias.values()))
        if sampling.repetition_penalty != 1 and self._seen:
            ids = torch.tensor(list(self._seen))
            old, penalty = logits[ids], sampling.repetition_penalty
            logits[ids] = torch.where(old > 0, old / penalty, old * penalty)
        if self._generated and (sampling.frequency_penalty or sampling.presence_penalty):
            ids = torch.tensor(list(self._generated))
            counts = torch.tensor(list(self._generated.values()))
            logits[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty
        return logits

    def _draw(self, logits: torch.Tensor) -> int:
        ids, probs = _candidates(logits, self.sampling)
        total = probs.double().cumsum(0)
        point = self._uniform() * total[-1]
        # `right` skips candidates of probability zero; rounding may reach past the last one.
        index = min(int(torch.searchsorted(total, point, right=True)), len(total) - 1)
        return index if ids is None else int(ids[index])

    def _uniform(self) -> float:
        key = derive_seed(self.sampling.seed, f"token {self._sequence} {self._position}")
        return (key >> 10) / 2**53


def choose_all(samplers: Sequence[Sampler], logits: torch.Tensor) -> list[int]:
    """The next token of each of B sequences for logits [B, V] in float32.

    Raises FloatingPointError where logits are NaN or infinite: no token would be right.
    """
    best, tokens = logits.max(dim=-1)
    if not bool(best.isfinite().all()):
        raise FloatingPointError("the model's logits are not finite")
    chosen: list[int] = tokens.tolist()
    for row, sampler in enumerate(samplers):
        if sampler.is_argmax:
            sampler.accept(chosen[row])
        else:
            chosen[row] = sampler.choose(logits[row])
    return chosen


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Log probabilities for logits [T, V] of the token chosen in each row and of the `top` best."""
    logs = logits.float().log_softmax(dim=-1)
    chosen = logs.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1).tolist()
    values, ids = logs.topk(min(top, logs.shape[1]), dim=-1)
    return [
        TokenLogprobs(token, logprob, list(zip(row_ids, row_values, strict=True)))
        for token, logprob, row_ids, row_values in zip(
            tokens, chosen, ids.tolist(), values.tolist(), strict=True
        )
    ]


def _candidates(
    logits: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Token ids (None: all, in order) and probabilities, not normalised, that may be drawn."""
    if sampling.top_k:
        values, ids = logits.topk(min(sampling.top_k, len(logits)))
        probs = values.softmax(0)
        if sampling.top_p < 1:
            probs = _nucleus(probs, sampling.top_p)
    elif sampling.top_p < 1:
        ids, probs = _largest(logits.softmax(0), sampling.top_p)
    else:
        ids, probs = None, logits.softmax(0)
    if sampling.min_p:
        probs = probs.where(probs >= sampling.min_p * probs.max(), 0.0)
    return ids, probs


def _nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """The fewest of the probabilities, sorted downwards, that reach `top_p` (1904.09751)."""
    before = probs.double().cumsum(0) - probs
    return probs[: max(1, int((before < top_p).sum()))]


def _largest(probs: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    # Sorting a whole vocabulary costs milliseconds; nearly always a few hundred tokens suffice.
    for count in (*CANDIDATES, len(probs)):
        values, ids = probs.topk(min(count, len(probs)))
        if float(values.double().sum()) >= top_p:
            break
    kept = _nucleus(values, top_p)
    return ids[: len(kept)], kept
