"""Weights as floating-point numbers: cast, nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.core.registry import register_preset
from moekit.ops.codecs.codec import Codec, Encoded, Part

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class PlainCodec(Codec):
    """Weights cast to `dtype` ("fp32", "bf16" or "fp16"); exact where they have it already."""

    idempotent = True

    def __init__(self, *, dtype: str) -> None:
        self.dtype = _DTYPES[dtype]

    def layout(self, shape: tuple[int, int]) -> tuple[tuple[Part, ...], ...]:
        return ((Part("payload", shape, self.dtype),),)

    def encode_rows(self, rows: Tensor) -> tuple[dict[str, Tensor], ...]:
        payload = rows.to(self.dtype)
        if not bool(torch.isfinite(payload).all()):
            raise UserError(
                f"A weight of {float(rows.abs().max()):.3g} is beyond {self.dtype} (largest "
                f"{torch.finfo(self.dtype).max:.3g}); take bf16 or fp32."
            )
        return ({"payload": payload},)

    def decode(self, encoded: Encoded, dtype: torch.dtype = torch.float32) -> Tensor:
        return encoded.planes[0]["payload"].to(dtype)

    def error_bound(self, weight: Tensor, encoded: Encoded) -> Tensor:
        # Half a unit in the last place: relative, or absolute among the subnormal numbers.
        limits = torch.finfo(self.dtype)
        return weight.float().abs().clamp(min=limits.smallest_normal) * limits.eps / 2


for _name, _title in (("fp32", "32-bit"), ("bf16", "16-bit brain"), ("fp16", "16-bit")):
    register_preset(
        PlainCodec,
        _name,
        kind="codec",
        title=f"{_title} floating-point weights",
        needs=("weights",),
        settings={"dtype": _name},
    )
