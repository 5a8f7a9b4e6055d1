"""Which codec holds an expert at the bits that a plan gives it."""

from __future__ import annotations

import dataclasses
import re

from moekit.core.errors import UserError
from moekit.core.packed import CodecChoice
from moekit.ops.codecs import make_codec

DEFAULT_CODEC = CodecChoice("int4", 32)


def codec_at(bits: float, default: CodecChoice) -> CodecChoice:
    """The codec of `bits` bits of the same kind as `default`: int4-zp at 3 is int3-zp.

    Raises `UserError` for bits that the kind does not have.
    """
    if bits == 16:
        return dataclasses.replace(default, name="bf16")
    kind = re.fullmatch(r"(int|nested)\d(-zp)?", default.name)
    prefix, suffix = (kind[1], kind[2] or "") if kind else ("int", "")
    if prefix == "nested" and bits == 2:
        prefix, suffix = "int", "-zp"
    name = f"{prefix}{bits:g}{suffix}"
    try:
        make_codec(name, default.group_size)
    except UserError:
        raise UserError(
            f"The plan asks for {bits:g} bits, and there is no codec {name!r}; with --codec "
            f"{default.name} a plan may use the bits of its kind, and 16."
        ) from None
    return dataclasses.replace(default, name=name)
