"""`convert_compressed_tensors`: experts as packed integers in the layout of compressed-tensors.

transformers reads it (with the package compressed-tensors), and vLLM, whose format it is. One
symmetric integer scheme holds for all experts; everything else stays in the model's number format.
Shapes: O output rows, I input columns, N scales a row.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.core.architecture import read_config
from moekit.core.checkpoint import Checkpoint
from moekit.core.convert import check_fit, check_request, plan_hash, prepare, rewrite_options
from moekit.core.deferred import Deferred, Region
from moekit.core.errors import UserError
from moekit.core.layout import PER_EXPERT, layer_of
from moekit.core.packed import CodecChoice
from moekit.core.plan import ExpertPlan
from moekit.core.registry import register
from moekit.core.rewrite import EncodedExpert, Rewrite
from moekit.core.spec import spec_from_config
from moekit.core.write_model import Converted, Work, write_model
from moekit.core.writer import DEFAULT_SHARD_BYTES
from moekit.ops.codecs import Encoded
from moekit.ops.codecs.bit_fields import unpack_bits
from moekit.ops.codecs.groups import GroupCodec

COMPRESSED_TENSORS = "compressed-tensors"
BITS = (4, 8)
# What the projections of an expert are called on disk.
PROJECTIONS = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
}
# transformers 5.23 fails on compressed experts of these families while it joins them.
UNREADABLE = ("bailing_hybrid", "glm5_next", "kimi_linear", "unlimited_ocr")
_EXPERT = re.compile(r".*\.experts\.(\d+)\.(\w+)\.weight")
_TARGET = r"re:.*\.experts\.\d+\..*"


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Symmetric integers of `bits` with one scale for `group_size` columns, None for a row."""

    bits: int
    group_size: int | None

    def to_config(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
            "dynamic": False,
        }
        group = {"targets": [_TARGET], "weights": weights, "format": "pack-quantized"}
        return {
            "quant_method": COMPRESSED_TENSORS,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }

    def encode(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Codes uint8 [O, I] and scales [O, N] of a matrix, rounded to nearest.

        Readers hold scales in the model's number format, so the codes are chosen for those.
        """
        codec = GroupCodec(bits=self.bits)
        rows, columns = matrix.shape
        grouped = matrix.float().view(rows, -1, self.group_size or columns)
        scale = codec.fit(grouped)["scale"].to(matrix.dtype)
        codes = codec.nearest(grouped, {"scale": scale[..., None]})
        return codes.to(torch.uint8).flatten(1), scale

    def codes_of(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Codes and scales of a matrix that a codec of these groups encoded."""
        assert self.group_size is not None
        plane = encoded.planes[0]
        codes = unpack_bits(plane["payload"], self.bits, self.group_size)
        return codes.to(torch.uint8).flatten(1), plane["scale"]


@register(
    "converter",
    COMPRESSED_TENSORS,
    title="Experts as packed integers, in the layout of compressed-tensors",
    needs=("weights",),
    limits="int4 and int8, symmetric, one width for all experts; families with a per-expert layout",
    options={
        "codec": "int4 or int8",
        "group_size": "columns that share a scale: 32, 64, 128, or 0 for a whole row",
    },
)
def convert_compressed_tensors(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    plan: ExpertPlan | str | os.PathLike[str] | None = None,
    *,
    rewrite: Rewrite | None = None,
    codec: str = "int4",
    group_size: int = 32,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    restart: bool = False,
    copy_code: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Converted:
    """Write the checkpoint in directory `model` to `out` with the experts as packed integers.

    `codec` is "int4" or "int8", `group_size` 0 one scale a row. `plan` changes the experts; its
    bits, where it has any, must be those of the codec for every expert. `rewrite` computes values,
    encoded by the same codec or dense. The rest is as for `convert`.

    Raises `UserError` as `convert` does, and for what the format or its readers do not hold: zero
    points, different widths, families whose experts have no tensors of their own on disk.
    """
    source, target = Path(model), Path(out)
    scheme = _scheme(codec, group_size)
    plan = check_request(source, target, plan, dtype, overwrite)
    check_fit(plan, rewrite)
    fitted = getattr(rewrite, "codec", None)
    choice = CodecChoice(codec, group_size or 32)
    if fitted is not None and fitted != choice:
        raise UserError(
            f"The values are fitted to {fitted.name} in groups of {fitted.group_size}; "
            f"--to {COMPRESSED_TENSORS} was asked for {codec} in groups of {group_size}."
        )
    options = {
        "to": COMPRESSED_TENSORS,
        **rewrite_options(plan, rewrite, choice),
        "codec": codec,
        "group_size": group_size,
        "dtype": dtype,
        "plan": plan_hash(plan),
        "copy_code": copy_code,
    }
    with Checkpoint(source) as checkpoint:
        _check_bits(plan, source, scheme)
        dense = _without_bits(plan)
        work = prepare(checkpoint, PER_EXPERT, dense, dtype, target, rewrite=rewrite, codec=choice)
        _pack_experts(work, scheme)
        work.config["quantization_config"] = scheme.to_config()
        result = work.result
        result.layout, result.tensors = COMPRESSED_TENSORS, len(work.tensors)
        result.bytes = sum(tensor.nbytes for tensor in work.tensors.values())
        return write_model(
            work,
            checkpoint,
            options,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            restart=restart,
            dry_run=dry_run,
            progress=progress,
            note=note,
            plan=plan,
        )


def _scheme(codec: str, group_size: int) -> Scheme:
    match = re.fullmatch(r"int(\d)", codec)
    if match is None or int(match[1]) not in BITS:
        why = " (readers fail on zero points)" if codec.endswith("-zp") else ""
        raise UserError(
            f"--to {COMPRESSED_TENSORS} holds the codecs int4 and int8, not {codec}{why}."
        )
    if group_size not in (0, 32, 64, 128):
        raise UserError(f"--group-size {group_size} is not one of 0 (a row), 32, 64 and 128.")
    return Scheme(int(match[1]), group_size or None)


def _check_bits(plan: ExpertPlan | None, source: Path, scheme: Scheme) -> None:
    if plan is None or "bits" not in plan.uses():
        return
    for layer in spec_from_config(source).per_layer:
        for expert in plan.survivors(layer.layer_index, layer.num_experts):
            bits = plan.action(layer.layer_index, expert).bits
            if bits != scheme.bits:
                asked = "none" if bits is None else f"{bits:g}"
                raise UserError(
                    f"The plan gives expert {expert} of layer {layer.layer_index} bits {asked}; "
                    f"--to {COMPRESSED_TENSORS} holds one width for all experts, here "
                    f"{scheme.bits} (readers misread mixed widths). --to packed holds them."
                )


def _without_bits(plan: ExpertPlan | None) -> ExpertPlan | None:
    """The plan without the rounding, which is done here."""
    if plan is None:
        return None
    layers = {
        layer: {e: dataclasses.replace(action, bits=None) for e, action in actions.items()}
        for layer, actions in plan.layers.items()
    }
    return dataclasses.replace(plan, layers=layers)


def _pack_experts(work: Work, scheme: Scheme) -> None:
    """Replace the matrices of the experts among the prepared tensors."""
    config = read_config(work.config)
    spec = spec_from_config(config)
    if spec.model_type in UNREADABLE:
        raise UserError(
            f"transformers 5.23 cannot load compressed experts of {spec.model_type}; take --to "
            "packed or per-expert."
        )
    if work.result.layout != PER_EXPERT:
        raise UserError(
            f"{spec.model_type} is published with fused banks of experts; --to "
            f"{COMPRESSED_TENSORS} needs a tensor for each expert, which its readers do not "
            "look for in this family. Take --to packed or gguf."
        )
    paths = {layer.path: layer.layer_index for layer in spec.per_layer}
    made: dict[str, Deferred] = {}
    encode = _Matrices(work, scheme)
    packed = 0
    for name, tensor in work.tensors.items():
        match = _EXPERT.fullmatch(name)
        if match is None or name in work.unused:
            made[name] = tensor
            continue
        if match[2] not in PROJECTIONS or tensor.ndim != 2:
            raise UserError(
                f"{name} is no projection that {COMPRESSED_TENSORS} readers know "
                f"({', '.join(PROJECTIONS)}); experts of {spec.model_type} cannot be written so."
            )
        _check_columns(name, tensor, scheme)
        place = (layer_of(name, paths), int(match[1]), PROJECTIONS[match[2]])
        made |= _packed_matrix(name, tensor, scheme, place, encode)
        packed += 1
    expected = sum(layer.num_experts * (3 if layer.has_gate else 2) for layer in spec.per_layer)
    if packed != expected:
        raise UserError(
            f"{spec.model_type} stores {packed} matrices under the names of experts, of which "
            f"{expected} are of its routed ones; --to {COMPRESSED_TENSORS} needs just those."
        )
    work.tensors = made


def _check_columns(name: str, tensor: Deferred, scheme: Scheme) -> None:
    if scheme.group_size is not None and tensor.shape[1] % scheme.group_size:
        raise UserError(
            f"{name} has {tensor.shape[1]} columns, which do not split into groups of "
            f"{scheme.group_size}; take a smaller --group-size, or 0 for one scale a row."
        )


_Place = tuple[int | None, int, str]


class _Matrices:
    """Encodes matrices and keeps the last one, because its tensors are asked for one by one."""

    def __init__(self, work: Work, scheme: Scheme) -> None:
        self._computed = work.computed
        self._scheme = scheme
        self._expert: tuple[tuple[int, int], EncodedExpert] | None = None
        self._kept: tuple[str, tuple[Tensor, Tensor]] | None = None

    def __call__(self, name: str, tensor: Deferred, place: _Place) -> tuple[Tensor, Tensor]:
        if self._kept is None or self._kept[0] != name:
            self._kept = None
            self._kept = name, self._encode(tensor, place)
        return self._kept[1]

    def _encode(self, tensor: Deferred, place: _Place) -> tuple[Tensor, Tensor]:
        layer, slot, part = place
        if layer in self._computed and self._scheme.group_size is not None:
            made = self._result(layer, slot)
            if made is not None:
                return self._scheme.codes_of(made.matrices[part])
        return self._scheme.encode(tensor.read())

    def _result(self, layer: int, slot: int) -> EncodedExpert | None:
        """The expert as the rewrite encoded it; None where it gave a dense one."""
        if self._expert is not None and self._expert[0] == (layer, slot):
            return self._expert[1]
        original = self._computed[layer].slots[slot]
        made = None if original is None else self._computed[layer].make(original)
        if not isinstance(made, EncodedExpert):
            return None
        self._expert = (layer, slot), made
        return made


def _packed_matrix(
    name: str, tensor: Deferred, scheme: Scheme, place: _Place, encode: _Matrices
) -> Mapping[str, Deferred]:
    rows, columns = tensor.shape
    scales = columns // (scheme.group_size or columns)
    words = -(-columns * scheme.bits // 32)

    def part(
        suffix: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]
    ) -> dict[str, Deferred]:
        def read(region: Region) -> Tensor:
            return make()[tuple(slice(a, b) for a, b in region)]

        return {f"{name}_{suffix}": Deferred(shape, dtype, read)}

    return {
        **part(
            "packed",
            (rows, words),
            torch.int32,
            lambda: pack_words(encode(name, tensor, place)[0], scheme.bits),
        ),
        **part(
            "scale",
            (rows, scales),
            tensor.dtype,
            lambda: encode(name, tensor, place)[1].to(tensor.dtype),
        ),
        **part("shape", (2,), torch.int64, lambda: torch.tensor([rows, columns])),
    }


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes [O, I] of `bits` bits, which divide 32, as int32 [O, W], the first in the lowest bits.

    A row whose codes do not fill its last word ends with zeros.
    """
    share = 32 // bits
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes.long(), (0, -columns % share))
    words = (padded.view(rows, -1, share) << (torch.arange(share) * bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
