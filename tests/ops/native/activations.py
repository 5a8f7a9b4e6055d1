"""What the kernels make of activations before they multiply.

T tokens, I columns.
"""

import torch

from moekit.ops.codecs.plain import PlainCodec


def seen(library, codec, x):
    """x [T, I] as the kernels of the library that `library` (or a pool) calls round it."""
    if isinstance(codec, PlainCodec):
        return x.bfloat16().float() if codec.dtype == torch.bfloat16 else x
    if library.c.native_isa() == b"avx2":
        return as_integers(x, codec.group_size)
    return x.bfloat16().float()


def as_integers(x, group):
    """Rounded to multiples of the power of two that gives the largest of a group 15 bits."""
    grouped = x.unflatten(-1, (-1, group))
    _, exponent = torch.frexp(grouped.abs().amax(-1, keepdim=True) * (1 + 2**-16))
    unit = torch.ldexp(torch.ones(exponent.shape), exponent - 15)
    return (torch.round(grouped / unit) * unit).flatten(-2)
