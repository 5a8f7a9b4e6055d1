"""Natively quantised checkpoints as plain tensors, decoded while they are read.

Block FP8 (deepseek_v3 and others): `name` in float8 beside `name_scale_inv`, one scale per block of
rows and columns. MXFP4 (gpt_oss): `name_blocks` with two 4-bit numbers a byte beside `name_scales`,
one power of two per 32 numbers; the bank comes out transposed, as the model stores it.
compressed-tensors, symmetric packed integers only: `name_packed` with the codes in 32-bit words
beside `name_scale`, one for each group of columns or row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moekit.core.deferred import Deferred, Reader, Region, full_region
from moekit.core.errors import UserError

FP8 = "fp8"
MXFP4 = "mxfp4"
PACKED_INTEGERS = "compressed-tensors"
METHODS = (FP8, MXFP4, PACKED_INTEGERS)

SCALE_SUFFIX = "_scale_inv"
ACTIVATION_SCALES = (".activation_scale", ".input_scale")
BLOCKS, SCALES = "_blocks", "_scales"
_PACKED, _BESIDE_PACKED = "_packed", ("weight_scale", "weight_shape", "weight_g_idx")
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
DEFAULT_BLOCK = (128, 128)

# The 16 values of a 4-bit float: sign, two exponent bits, one mantissa bit.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
EXPONENT_BIAS = 127


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `quantization_config` of a `config.json`, at the top or in its text part."""
    for part in (config, config.get("text_config")):
        found = part.get("quantization_config") if isinstance(part, Mapping) else None
        if isinstance(found, dict):
            return found
    return None


def dequantize(
    tensors: Mapping[str, Deferred], quantization: Mapping[str, Any]
) -> dict[str, Deferred]:
    """The same tensors with every quantised one replaced by its float32 values, scales left out.

    Raises `UserError` for a method other than `METHODS` and for scales that do not fit.
    """
    method = quantization.get("quant_method")
    if method == FP8:
        return _from_fp8(tensors, quantization)
    if method == MXFP4:
        return _from_mxfp4(tensors)
    if method == PACKED_INTEGERS:
        return _from_packed_integers(tensors, quantization)
    raise UserError(
        f"The checkpoint is quantised with {method!r}; only {', '.join(METHODS)} can be "
        "dequantised. Convert the original checkpoint instead."
    )


def _from_fp8(
    tensors: Mapping[str, Deferred], quantization: Mapping[str, Any]
) -> dict[str, Deferred]:
    block = tuple(quantization.get("weight_block_size") or DEFAULT_BLOCK)
    made = {}
    for name, tensor in tensors.items():
        scale = tensors.get(name + SCALE_SUFFIX)
        if name.endswith((SCALE_SUFFIX, *ACTIVATION_SCALES)):
            continue
        made[name] = tensor if scale is None else _fp8(name, tensor, scale, block)
    return made


def _fp8(name: str, weight: Deferred, scale: Deferred, block: tuple[int, ...]) -> Deferred:
    if weight.dtype not in FP8_DTYPES:
        raise UserError(f"{name} has a scale but dtype {weight.dtype}; only float8 is supported.")
    if scale.numel() == 1:
        block = tuple(weight.shape[-2:])
        scale = Deferred((1,) * weight.ndim, scale.dtype, _all_of(scale, weight.ndim))
    grid = tuple(-(-size // step) for size, step in zip(weight.shape[-2:], block, strict=True))
    if tuple(scale.shape) != (*weight.shape[:-2], *grid):
        raise UserError(
            f"{name} has shape {list(weight.shape)} and blocks of {list(block)}, so its scales "
            f"should be {list(grid)}; they are {list(scale.shape)}."
        )

    def read(region: Region) -> torch.Tensor:
        values = weight.read(region).float()
        # Only the scales whose blocks the region touches.
        spans = [
            (start // step, max(start // step, -(-stop // step)))
            for (start, stop), step in zip(region[-2:], block, strict=True)
        ]
        factors = scale.read((*region[:-2], *spans)).float()
        for axis, (start, stop), step in zip((-2, -1), region[-2:], block, strict=True):
            offset = start - start // step * step
            factors = factors.repeat_interleave(step, axis).narrow(axis, offset, stop - start)
        return values * factors

    return Deferred(weight.shape, torch.float32, read)


def _all_of(scale: Deferred, ndim: int) -> Reader:
    return lambda region: scale.read().reshape([1] * ndim)


def _from_mxfp4(tensors: Mapping[str, Deferred]) -> dict[str, Deferred]:
    made = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(BLOCKS)
        scales = tensors.get(stem + SCALES)
        if stem != name and scales is not None:
            made[stem] = _mxfp4(stem, tensor, scales)
        elif not (name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in tensors):
            made[name] = tensor
    return made


def _mxfp4(name: str, blocks: Deferred, scales: Deferred) -> Deferred:
    """[E, O, G, B] bytes and [E, O, G] exponents to [E, G * 2 * B, O]."""
    if blocks.ndim != 4 or blocks.shape[:-1] != scales.shape or blocks.dtype != torch.uint8:
        raise UserError(
            f"{name}: blocks {list(blocks.shape)} and scales {list(scales.shape)} do not fit; "
            "MXFP4 needs bytes [E, O, G, B] and [E, O, G]."
        )
    experts, rows, groups, size = blocks.shape
    table = torch.tensor(E2M1)

    def read(region: Region) -> torch.Tensor:
        outer = (region[0], region[2])
        packed = blocks.read((*outer, *full_region((groups, size)))).int()
        exponents = scales.read((*outer, (0, groups))).int() - EXPONENT_BIAS
        values = torch.stack([table[packed & 15], table[packed >> 4]], dim=-1).flatten(-2)
        values = torch.ldexp(values, exponents[..., None]).flatten(-2)
        return values.transpose(1, 2)[:, slice(*region[1])]

    return Deferred((experts, groups * size * 2, rows), torch.float32, read)


def _from_packed_integers(
    tensors: Mapping[str, Deferred], quantization: Mapping[str, Any]
) -> dict[str, Deferred]:
    schemes = {
        (
            group["weights"]["num_bits"],
            group["weights"].get("type", "int"),
            bool(group["weights"].get("symmetric", True)),
            group.get("format") or quantization.get("format"),
        )
        for group in quantization.get("config_groups", {}).values()
    }
    held = sorted(map(str, schemes))
    scheme = schemes.pop() if len(schemes) == 1 else None
    bits = scheme[0] if scheme is not None else 0
    if scheme is None or 32 % bits or scheme[1:] != ("int", True, "pack-quantized"):
        raise UserError(
            f"Of {PACKED_INTEGERS} moekit reads one symmetric scheme of packed integers for all; "
            f"the checkpoint has {', '.join(held) or 'none'}. Convert the original checkpoint."
        )
    made = {}
    for name, tensor in tensors.items():
        if name.endswith(_PACKED):
            base = name.removesuffix(_PACKED)
            rows, columns = tensors[f"{base}_shape"].read().tolist()
            shape = (int(rows), int(columns))
            scale = tensors[f"{base}_scale"]
            made[base] = Deferred(shape, torch.float32, _packed_reader(tensor, scale, bits, shape))
        elif not name.endswith(_BESIDE_PACKED):
            made[name] = tensor
    return made


def _packed_reader(words: Deferred, scale: Deferred, bits: int, shape: tuple[int, int]) -> Reader:
    share = 32 // bits

    def read(region: Region) -> torch.Tensor:
        (start, stop), (first, last) = region
        held = words.rows(start, stop)
        fields = (held[..., None] >> (torch.arange(share) * bits)) & (2**bits - 1)
        codes = fields.flatten(1)[:, : shape[1]].float() - 2 ** (bits - 1)
        scales = scale.rows(start, stop).float()
        group = shape[1] // scales.shape[1]
        return (codes * scales.repeat_interleave(group, dim=1))[:, first:last]

    return read
