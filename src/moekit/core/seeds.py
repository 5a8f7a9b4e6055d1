"""Randomness keyed by (seed, purpose, layer): results depend on neither order nor threads."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, purpose: str, layer: int | None = None) -> int:
    """A 63-bit seed that is a fixed function of its arguments, in every process."""
    key = f"{seed}\0{purpose}\0{'' if layer is None else layer}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1


def generator(
    seed: int, purpose: str, layer: int | None = None, device: str = "cpu"
) -> torch.Generator:
    """A torch generator seeded by `derive_seed`."""
    import torch

    return torch.Generator(device=device).manual_seed(derive_seed(seed, purpose, layer))
