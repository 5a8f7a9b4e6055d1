"""Number formats of a GGUF file: which tensor gets which, and encoding one piece of a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from moekit.core.errors import UserError
from moekit.export.gguf_tensors import EMBEDDING, HEAD

# Chosen format -> its name in gguf.LlamaFileType.
FILE_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q5_1": "MOSTLY_Q5_1",
    "q5_0": "MOSTLY_Q5_0",
    "q4_1": "MOSTLY_Q4_1",
    "q4_0": "MOSTLY_Q4_0",
    "mxfp4": "MOSTLY_MXFP4_MOE",
}
# Below eight bits embeddings and head keep eight, as llama.cpp's own tools leave them above the
# rest; "mxfp4" is for experts only, as in the models published in it.
_SMALL = {"q5_1", "q5_0", "q4_1", "q4_0", "mxfp4"}
_EIGHT_BITS = "q8_0"
_VOCABULARY = {EMBEDDING, HEAD}
_ROUTERS = (".ffn_gate_inp.weight", ".ffn_gate_inp_shexp.weight")
_EXPERTS = "_exps.weight"


@dataclass(frozen=True)
class Encoding:
    """One format: rows of `block` numbers become `bytes` bytes. `name` as in `FILE_TYPES`."""

    name: str
    block: int
    bytes: int

    def row_bytes(self, width: int) -> int:
        return width // self.block * self.bytes

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape[:-1]) * self.row_bytes(shape[-1])


def encoding(name: str) -> Encoding:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    return Encoding(name, block, size)


def check_type(name: str) -> None:
    """Raise `UserError` for a format that cannot be written."""
    if name not in FILE_TYPES:
        raise UserError(f"--gguf-type {name!r} is unknown; there are {', '.join(FILE_TYPES)}.")


def encoding_of(tensor: str, shape: tuple[int, ...], chosen: str) -> Encoding:
    """The format of one tensor of a file in format `chosen`; rows that do not fit get f16.

    Norms, biases and routers stay in f32: they are small, llama.cpp wants them so, and a rounded
    router would choose other experts.
    """
    if len(shape) < 2 or not tensor.endswith(".weight") or tensor.endswith(_ROUTERS):
        return encoding("f32")
    if chosen in _SMALL and tensor in _VOCABULARY:
        chosen = _EIGHT_BITS
    if chosen == "mxfp4" and not tensor.endswith(_EXPERTS):
        chosen = _EIGHT_BITS
    wanted = encoding(chosen)
    return wanted if shape[-1] % wanted.block == 0 else encoding("f16")


def encode(name: str, piece: torch.Tensor, to: Encoding) -> Any:
    """Rows of a tensor as a numpy array of bytes; `UserError` for numbers that f16 cannot hold."""
    import gguf

    values = piece.detach().float().contiguous()
    if to.name == "f16":
        half = values.to(torch.float16)
        if bool((half.isinf() & values.isfinite()).any()):
            raise UserError(
                f"{name} holds {values.abs().max():.3g}, beyond the range of f16 (65504); "
                "take --gguf-type bf16 or f32."
            )
        return half.numpy()
    return gguf.quantize(values.numpy(), gguf.GGMLQuantizationType[to.name.upper()])
