"""Choosing a codec for a model and a memory."""

from __future__ import annotations

from dataclasses import dataclass

from moekit.core.errors import UserError
from moekit.core.layer_spec import LayerSpec
from moekit.core.memory import PARTS, format_bytes, model_bytes
from moekit.core.spec import MoESpec
from moekit.ops.codecs import make_codec

# Of a memory, what experts may take beside the resident part: the rest is for the program, the KV
# cache and scratch.
SHARE = 0.85
GROUP_SIZE = 32
_AS_STORED = {"float32": "fp32", "float16": "fp16"}


@dataclass(frozen=True)
class CodecChosen:
    """A codec, its group size, and why it was chosen."""

    codec: str
    group_size: int
    reason: str


def choose_codec(spec: MoESpec, memory: int) -> CodecChosen:
    """The widest of the stored format, int8 and int4 whose experts fit into `memory` bytes whole,
    and int4 where none does: bytes from disk cost far more than bits of precision.

    int8 and int4 are left out where they cannot hold the experts' widths.
    """
    stored = _AS_STORED.get(spec.dtype or "", "bf16")
    parts = {name: spec.params.parts.get(name, 0) for name in PARTS if name != "routed"}
    room = memory * SHARE - model_bytes(parts, 32 if stored == "fp32" else 16)
    usable = [(name, size) for name in (stored, "int8", "int4") if (size := experts(spec, name))]
    for name, size in usable:
        if size <= room:
            loss = "as stored" if name == stored else "lossy"
            reason = f"all experts fit with it, {format_bytes(size)} of {format_bytes(room)} left"
            return CodecChosen(name, GROUP_SIZE, f"codec {name} ({loss}): {reason}")
    name, size = usable[-1]
    return CodecChosen(
        name,
        GROUP_SIZE,
        f"codec {name} ({'as stored' if name == stored else 'lossy'}): no wider one fits either, "
        f"{format_bytes(size)} of experts for {format_bytes(max(0, room))}",
    )


def experts(spec: MoESpec, codec: str) -> int:
    """Bytes of all routed experts in a codec, 0 where it cannot hold their widths."""
    try:
        return sum(layer.num_experts * _expert(layer, codec) for layer in spec.per_layer)
    except UserError:
        return 0


def _expert(layer: LayerSpec, codec: str) -> int:
    made = make_codec(codec, GROUP_SIZE)
    inputs = 2 if layer.has_gate else 1
    width, inner = layer.hidden_size, layer.expert_width
    return inputs * made.nbytes((inner, width)) + made.nbytes((width, inner))
