"""A layer of encoded experts in one memory, and what its matrices decode to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moekit.ops.codecs import make_codec
from moekit.ops.codecs.tiles import tile
from moekit.ops.experts_naive import naive_combine
from moekit.ops.triton.formats import ExpertFormat, MatrixFormat, matrix_format

ALIGN = 64
FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Writer:
    """Puts arrays one after the other, each at a multiple of 64 bytes; gaps hold NaN in every
    number format."""

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.size = 0

    def add(self, array: Tensor) -> int:
        raw = array.contiguous().reshape(-1).view(torch.uint8)
        begin = self.size
        padded = torch.full((-(-len(raw) // ALIGN) * ALIGN + ALIGN,), 0xFF, dtype=torch.uint8)
        padded[: len(raw)] = raw
        self.pieces.append(padded)
        self.size += len(padded)
        return begin

    def matrix(self, codec, weight: Tensor) -> tuple[MatrixFormat, Tensor]:
        """Write a matrix; its format, offsets counted from the first byte, and its values."""
        encoded = codec.encode(weight)
        offsets = [
            {name: self.add(tile(a) if codec.tiled else a) for name, a in plane.items()}
            for plane in encoded.planes
        ]
        made = matrix_format(codec, encoded.shape, offsets)
        assert made is not None
        return made, codec.decode(encoded)

    def memory(self) -> Tensor:
        return torch.cat(self.pieces)


@dataclass
class Bank:
    """`formats` [E], `offsets` of the records in `memory`, and `run(e, x)` on decoded weights."""

    formats: list[ExpertFormat]
    offsets: dict[int, int]
    memory: Tensor
    dense: list[dict[str, Tensor]]

    def run(self, e: int, x: Tensor) -> Tensor:
        made, dense = self.formats[e], self.dense[e]
        x = x.float()
        up = F.linear(x, dense["up"], dense.get("up_bias"))
        if made.gate is None:
            middle = FUNCTIONS[made.activation](up)
        else:
            gate = F.linear(x, dense["gate"], dense.get("gate_bias"))
            if made.activation == "clamped_swiglu":
                gate = gate.clamp(max=made.limit)
                up = up.clamp(-made.limit, made.limit) + 1
                middle = up * gate * torch.sigmoid(made.alpha * gate)
            else:
                middle = FUNCTIONS[made.activation](gate) * up
        return F.linear(middle, dense["down"], dense.get("down_bias"))

    def naive(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The double loop over tokens and choices, in float32."""
        known = ids.where(ids < len(self.formats), -1)
        return naive_combine(
            lambda e, row, weight: self.run(e, row) * weight, hidden.float(), known, weights.float()
        )


def bank(
    codecs: list[str],
    width: int,
    inner: int,
    *,
    group: int = 32,
    activation: str = "silu",
    gated: bool = True,
    biases: bool = False,
    seed: int = 0,
) -> Bank:
    """One expert for each of `codecs`, of random weights."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"up": (inner, width), "down": (width, inner)}
    shapes |= {"gate": (inner, width)} if gated else {}
    formats, offsets, dense, whole = [], {}, [], Writer()
    for e, name in enumerate(codecs):
        codec, record = make_codec(name, group), Writer()
        record.add(torch.zeros(ALIGN, dtype=torch.uint8))
        matrices, values, places = {}, {}, {}
        for part, shape in shapes.items():
            weight = torch.randn(shape, generator=draw) / shape[1] ** 0.5
            matrices[part], values[part] = record.matrix(codec, weight)
        for part in shapes if biases else ():
            values[f"{part}_bias"] = torch.randn(shapes[part][0], generator=draw)
            places[f"{part}_bias"] = record.add(values[f"{part}_bias"])
        made = ExpertFormat(
            matrices.get("gate"),
            matrices["up"],
            matrices["down"],
            activation,
            alpha=1.702 if activation == "clamped_swiglu" else 0.0,
            limit=0.5 if activation == "clamped_swiglu" else 0.0,
            **places,
        )
        formats.append(made)
        dense.append(values)
        offsets[e] = whole.add(record.memory())
    return Bank(formats, offsets, whole.memory(), dense)
