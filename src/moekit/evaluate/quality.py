"""`Quality`: bits per byte by domain, with what makes two such numbers comparable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moekit.core.errors import UserError
from moekit.evaluate.bits_per_byte import bits_per_byte
from moekit.evaluate.text import Sample

QUALITY = "quality"
QUALITY_BEFORE = "quality_before"


@dataclass(frozen=True)
class Quality:
    """Bits per byte of each domain, on the text with the hash `text` read in such windows.

    Two of them compare only where `measured_alike` says so. A record of a run holds them under
    `QUALITY` (of the result) and `QUALITY_BEFORE` (of what it was made from).
    """

    bits_per_byte: dict[str, float]
    text: str
    context: int
    stride: int

    @property
    def mean(self) -> float:
        """Unweighted mean over the domains."""
        return sum(self.bits_per_byte.values()) / len(self.bits_per_byte)

    def measured_alike(self, other: Quality) -> bool:
        """Whether text and windows are the same."""
        return (self.text, self.context, self.stride) == (other.text, other.context, other.stride)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "mean": self.mean}

    @classmethod
    def from_dict(cls, content: Any, source: str = "the record") -> Quality:
        """Parse what `to_dict` wrote; `UserError` naming `source` for anything else."""
        try:
            bits = {str(name): float(value) for name, value in content["bits_per_byte"].items()}
            made = cls(bits, str(content["text"]), int(content["context"]), int(content["stride"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{source} holds no quality that can be read ({error!r}).") from None
        if not bits:
            raise UserError(f"{source} holds a quality without a domain.")
        return made


def measure_quality(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    context: int = 512,
    stride: int | None = None,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """Bits per byte by domain of `samples` under `model`; windows as in `bits_per_byte`.

    `stride` is half a context by default, and a context is at most what the model can read.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or context
    context = min(context, longest)
    stride = max(1, context // 2) if stride is None else stride
    loss = bits_per_byte(
        model,
        tokenizer,
        samples,
        context=context,
        stride=stride,
        batch_size=batch_size,
        progress=progress,
    )
    bits = {name: domain.bpb for name, domain in loss.per_domain.items()}
    return Quality(bits, text_hash(samples), context, stride)


def text_hash(samples: Sequence[Sample]) -> str:
    """Sixteen hexadecimal digits that change with any document or its domain."""
    digest = hashlib.sha256()
    for sample in samples:
        for part in (sample.domain, sample.text):
            raw = part.encode()
            digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()[:16]


def qualities(metrics: Mapping[str, Any], source: str) -> tuple[Quality | None, Quality | None]:
    """(before, after) out of a record's metrics, where it has them."""
    found = [
        Quality.from_dict(metrics[key], source) if metrics.get(key) is not None else None
        for key in (QUALITY_BEFORE, QUALITY)
    ]
    return found[0], found[1]
