"""Bits per byte and perplexity of a causal language model, per domain, by sliding window.

What is scored: a document is `[prefix] + tokens`, where the prefix is the tokenizer's BOS token,
or its EOS token when there is no BOS. The prefix is only read, never scored; every other token is
scored exactly once, so every byte of the text is paid for. Window k reads `context` tokens from
position `k * stride` on and scores the targets that no earlier window has scored: the first
window all of its `context` targets, each later one its last `stride` (fewer at the end of the
document). A token scored by a later window therefore sees at least `context - stride` tokens
before it. Windows never cross documents. A tokenizer with neither BOS nor EOS cannot predict the
first token; it is charged ln(vocabulary) nats, the price of a uniform guess.

Bits per byte is the sum of nats over ln 2 and over the UTF-8 bytes of the text; unlike perplexity
it compares models with different tokenizers. Shape letters: B windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from moekit.core.errors import UserError
from moekit.core.registry import register
from moekit.evaluate.padded_experts import padded_experts
from moekit.evaluate.text import Sample, limit_bytes_per_domain

# Logits are by far the largest activation; a batch is cut so that they stay under this in fp32.
MAX_LOGITS_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class DomainLoss:
    """Summed loss over the texts of one domain; `unknown_tokens` > 0 means bytes were lost."""

    nats: float
    bytes: int
    tokens: int
    unknown_tokens: int = 0

    @property
    def bpb(self) -> float:
        """Bits per UTF-8 byte of text."""
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        """exp(nats per scored token); comparable only between models with one tokenizer."""
        return math.exp(min(self.nats / max(self.tokens, 1), 700.0))

    def to_dict(self) -> dict[str, float | int]:
        return {**asdict(self), "bpb": self.bpb, "perplexity": self.perplexity}


def _pool(losses: Iterable[DomainLoss]) -> DomainLoss:
    losses = list(losses)
    return DomainLoss(
        nats=math.fsum(loss.nats for loss in losses),
        bytes=sum(loss.bytes for loss in losses),
        tokens=sum(loss.tokens for loss in losses),
        unknown_tokens=sum(loss.unknown_tokens for loss in losses),
    )


@dataclass(frozen=True, slots=True)
class BitsPerByte:
    """Result of `bits_per_byte`: losses by domain in order of first appearance."""

    per_domain: dict[str, DomainLoss]

    @property
    def mean(self) -> float:
        """Unweighted mean of bits per byte over domains."""
        return sum(loss.bpb for loss in self.per_domain.values()) / len(self.per_domain)

    @property
    def total(self) -> DomainLoss:
        """All domains pooled, so each counts by its bytes."""
        return _pool(self.per_domain.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "per_domain": {name: loss.to_dict() for name, loss in self.per_domain.items()},
            "mean_bpb": self.mean,
            "total": self.total.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class _Window:
    document: int
    begin: int
    length: int  # tokens read
    scored: int  # how many of the last targets count


@register(
    "measure",
    "bits-per-byte",
    title="Bits per byte and perplexity by domain, by sliding window",
    needs=("weights", "data"),
    limits="Text is cut into windows of `context` tokens, which never cross documents.",
    options={
        "context": "tokens a window reads",
        "stride": "tokens between the starts of two windows",
        "batch_size": "windows in one forward pass",
        "max_bytes_per_domain": "score only the leading bytes of each domain",
    },
)
def bits_per_byte(
    model: nn.Module,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    context: int = 512,
    stride: int = 256,
    batch_size: int = 16,
    max_bytes_per_domain: int | None = None,
    autocast: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BitsPerByte:
    """Score every token of `samples` once under `model` (see the module text for the windows).

    `progress(done, total)` counts windows. The model is put in eval mode and restored. Windows are
    batched longest first with right padding, which a causal model cannot see, so the result
    depends on `batch_size` only through floating-point rounding.
    Raises UserError for an impossible context or stride, or when there is no text.
    """
    _check_window(model, context, stride, batch_size)
    if max_bytes_per_domain is not None:
        samples = limit_bytes_per_domain(samples, max_bytes_per_domain)
    if not samples:
        raise UserError("no text to score (0 documents)")
    prefix = _prefix_id(tokenizer)
    documents = [_encode(tokenizer, sample.text, prefix) for sample in samples]
    windows = [
        window
        for index, ids in enumerate(documents)
        for window in _windows(index, len(ids) - 1, context, stride)
    ]
    nats = [0.0 if prefix is not None else math.log(_vocab_size(model))] * len(documents)
    was_training = model.training
    model.eval()
    try:
        with padded_experts(model):
            done = 0
            for batch in _batches(windows, batch_size, _vocab_size(model)):
                losses = _score(model, documents, batch, autocast)
                for window, loss in zip(batch, losses, strict=True):
                    nats[window.document] += loss
                done += len(batch)
                if progress is not None:
                    progress(done, len(windows))
    finally:
        model.train(was_training)
    return _by_domain(samples, documents, nats, prefix, getattr(tokenizer, "unk_token_id", None))


def _check_window(model: nn.Module, context: int, stride: int, batch_size: int) -> None:
    if not 1 <= stride <= context:
        raise UserError(f"stride {stride} must be between 1 and the context, {context}")
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} must be at least 1")
    if not getattr(model, "causal", True):
        raise UserError(
            "this model routes a token by later ones too, so its loss on a text says nothing; make "
            "it with pool=prefix to measure it"
        )
    config = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and context > limit:
        raise UserError(
            f"context {context} is longer than the model's {limit} positions: "
            f"use a context of at most {limit}"
        )


def _prefix_id(tokenizer: Any) -> int | None:
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos if bos is not None else getattr(tokenizer, "eos_token_id", None)


def _vocab_size(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().vocab_size)


def _encode(tokenizer: Any, text: str, prefix: int | None) -> list[int]:
    # verbose=False: documents longer than model_max_length are fine, windows cut them.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return list(ids) if prefix is None else [prefix, *ids]


def _windows(document: int, num_targets: int, context: int, stride: int) -> Iterator[_Window]:
    scored_to = 0
    begin = 0
    while scored_to < num_targets:
        end = min(begin + context, num_targets)
        yield _Window(document, begin, end - begin, end - scored_to)
        scored_to = end
        begin += stride


def _batches(windows: list[_Window], batch_size: int, vocab: int) -> Iterator[list[_Window]]:
    order = sorted(windows, key=lambda w: (-w.length, -w.scored))
    start = 0
    while start < len(order):
        room = MAX_LOGITS_BYTES // (order[start].length * vocab * 4)
        size = max(1, min(batch_size, room))
        yield order[start : start + size]
        start += size


def _score(
    model: nn.Module, documents: list[list[int]], batch: list[_Window], dtype: torch.dtype | None
) -> list[float]:
    """Summed nats of each window's scored targets."""
    device = next(model.parameters()).device
    longest = max(window.length for window in batch)
    ids_BT = torch.zeros(len(batch), longest, dtype=torch.long)
    targets_BT = torch.full((len(batch), longest), -100)
    mask_BT = torch.zeros(len(batch), longest, dtype=torch.long)
    for row, window in enumerate(batch):
        read = documents[window.document][window.begin : window.begin + window.length + 1]
        ids_BT[row, : window.length] = torch.tensor(read[:-1])
        first = window.length - window.scored
        targets_BT[row, first : window.length] = torch.tensor(read[1 + first :])
        mask_BT[row, : window.length] = 1
    keep = longest - min(window.length - window.scored for window in batch)
    wanted = {"use_cache": False, "logits_to_keep": keep}
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {name: wanted[name] for name in wanted if name in accepted}
    if bool((mask_BT == 0).any()):
        options["attention_mask"] = mask_BT.to(device)
    # Not inference_mode: tensors a model caches under it would break later training steps.
    with torch.no_grad(), _autocast(device, dtype):
        logits_BTV = model(input_ids=ids_BT.to(device), **options).logits[:, -keep:]
    nats_BT = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(),
        targets_BT[:, -keep:].flatten().to(device),
        ignore_index=-100,
        reduction="none",
    ).view(len(batch), keep)
    return nats_BT.double().sum(dim=1).tolist()


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _by_domain(
    samples: Sequence[Sample],
    documents: list[list[int]],
    nats: list[float],
    prefix: int | None,
    unknown: int | None,
) -> BitsPerByte:
    rows: dict[str, list[DomainLoss]] = {}
    for sample, ids, loss in zip(samples, documents, nats, strict=True):
        text_ids = ids if prefix is None else ids[1:]
        lost = 0 if unknown is None else text_ids.count(unknown)
        rows.setdefault(sample.domain, []).append(
            DomainLoss(loss, len(sample.text.encode()), len(text_ids), lost)
        )
    return BitsPerByte({domain: _pool(losses) for domain, losses in rows.items()})
