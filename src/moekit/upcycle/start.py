"""`Start`: what a converted model computes before any training, said by its converter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SOURCE = "the source"
# Logits in float32, as a share of the largest: sums are taken in another order, nothing else.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Start:
    """Step 0 of a converted model.

    `equal_to` names the model whose logits it has, None where there is none; `tolerance` is the
    largest difference of a logit in float32, as a share of the largest logit; `why` is a sentence.
    `source_changes` are the values of the source's config under which the source is that model.
    """

    equal_to: str | None
    why: str
    tolerance: float | None = None
    source_changes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def equal(
        cls,
        why: str,
        tolerance: float = ROUNDING,
        to: str = SOURCE,
        source_changes: Mapping[str, Any] | None = None,
    ) -> Start:
        return cls(to, why, tolerance, dict(source_changes or {}))

    @classmethod
    def not_equal(cls, why: str) -> Start:
        return cls(None, why)

    @property
    def text(self) -> str:
        """The statement as one line."""
        if self.equal_to is None:
            return f"At step 0 it is not equal to its source: {self.why}"
        return f"At step 0 equal to {self.equal_to} (logits within {self.tolerance:g}): {self.why}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
