"""Linear layers whose matrix stays encoded on a device.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekit.core.errors import UserError
from moekit.core.find import find_moe
from moekit.ops.codecs import Codec
from moekit.ops.codecs.memory import lay_out
from moekit.ops.triton.experts import matmul
from moekit.ops.triton.formats import matrix_format

# Matrices of fewer outputs decide rather than transform (a gate of shared experts), and are small.
LEAST_OUTPUTS = 64


class EncodedLinear(nn.Module):
    """x times an encoded matrix [O, I], plus a bias; nothing is decoded but in registers."""

    def __init__(self, linear: nn.Linear, codec: Codec, device: torch.device) -> None:
        super().__init__()
        encoded = codec.encode(linear.weight)
        offsets, memory = lay_out(codec, encoded)
        made = matrix_format(codec, encoded.shape, offsets)
        if made is None:
            raise UserError(
                "resident_codec: the GPU kernels cannot read this codec; take int8 or int4"
            )
        self._format = made
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("memory", memory.to(device), persistent=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        memory = self.get_buffer("memory")
        out = matmul(x.reshape(-1, x.shape[-1]), self._format, memory)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


def encode_linears(model: PreTrainedModel, codec: Codec, device: torch.device) -> int:
    """Replace the linear layers of a model in the processor's memory by encoded ones on `device`;
    how many.

    Routers are left as they are, as are embeddings, small matrices, and widths that `codec` has no
    groups for.
    """
    routers = tuple(f"{site.router_path}." for site in find_moe(model) if site.router_path)
    count = 0
    for name, module in list(model.named_modules()):
        if f"{name}.".startswith(routers) or type(module) is not nn.Linear:
            continue
        if module.weight.is_meta or module.out_features < LEAST_OUTPUTS or not _fits(module, codec):
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, EncodedLinear(module, codec, device))
        count += 1
    return count


def _fits(linear: nn.Linear, codec: Codec) -> bool:
    try:
        codec.layout((linear.out_features, linear.in_features))
    except UserError:
        return False
    return True
