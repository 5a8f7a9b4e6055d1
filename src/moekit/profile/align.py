"""Putting weights where every kernel treats them alike."""

from __future__ import annotations

import torch
from torch import nn

# What torch's allocator gives to every tensor of its own.
ALIGNMENT = 64


@torch.no_grad()
def align_weights(model: nn.Module) -> None:
    """Copy parameters and buffers that do not start at a multiple of 64 bytes to where they do.

    A checkpoint that is mapped into memory has its tensors anywhere, and matrix kernels sum in
    another order there, so that results would differ in the last bit from those of the same model
    loaded another way.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
