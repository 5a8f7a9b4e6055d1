"""Codecs: weight matrices as packed bytes."""

from __future__ import annotations

from moekit.core.errors import UserError
from moekit.core.registry import registry
from moekit.ops.codecs.codec import Codec, Encoded, Part

__all__ = ["Codec", "Encoded", "Part", "make_codec"]


def make_codec(name: str, group_size: int = 32) -> Codec:
    """The codec registered under `name`; `group_size` counts only where it has groups.

    Raises `UserError` for a name that no codec has and for a group size other than 32, 64 and 128.
    """
    method = registry.find(name, kind="codec")
    takes_groups = any(option.name == "group_size" for option in method.options)
    made = method.load()(**({"group_size": group_size} if takes_groups else {}))
    if not isinstance(made, Codec):
        raise UserError(f"{method.target}, registered as codec {name!r}, makes no Codec.")
    return made
