"""Published tensors of a checkpoint as the tensors of a GGUF file: names, banks, order of rows.

Shapes: E experts, F expert width, D width, H heads, R latent rank. llama.cpp keeps the experts of
a layer in one bank for each of gate, up and down, [E, F, D] or [E, D, F], without transposition.
Everything stays `Deferred`: a bank is read expert by expert when it is written.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PretrainedConfig

from moekit.core.deferred import Deferred
from moekit.core.errors import UserError
from moekit.export.gguf_families import GgufFamily

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.+)\.(weight|bias)")
_SUFFIXES = (".weight", ".bias")
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def gguf_tensors(
    published: Mapping[str, Deferred], family: GgufFamily, config: PretrainedConfig
) -> dict[str, Deferred]:
    """The tensors of the GGUF file by name, in file order, in the dtypes they have.

    Raises `UserError` for a tensor that llama.cpp has no name for in this family.
    """
    import gguf

    names = gguf.get_tensor_name_map(
        getattr(gguf.MODEL_ARCH, family.arch), config.num_hidden_layers
    )
    made: dict[str, Deferred] = {}
    for name, tensor in _banks(published):
        for part, values in _parts(name, tensor, family, config):
            for pattern, replacement in family.names:
                part = re.sub(pattern, replacement, part)
            target = names.get_name(part, try_suffixes=_SUFFIXES)
            if target is None:
                raise UserError(
                    f"llama.cpp has no place for {part} in its architecture "
                    f"{gguf.MODEL_ARCH_NAMES[getattr(gguf.MODEL_ARCH, family.arch)]!r}; "
                    f"this variant of {config.model_type} cannot be written as GGUF."
                )
            made[target] = values
    if family.own_head:
        made.setdefault(HEAD, made[EMBEDDING])
    return made


def _banks(published: Mapping[str, Deferred]) -> Iterator[tuple[str, Deferred]]:
    """The tensors, those of single experts stacked under the name without a number."""
    experts: dict[str, dict[int, Any]] = defaultdict(dict)
    for name, tensor in published.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            yield name, tensor
        else:
            stem, number, projection, suffix = match.groups()
            experts[f"{stem}.{projection}.{suffix}"][int(number)] = tensor
    for name, bank in experts.items():
        stacked: Any = torch.stack([bank[number] for number in sorted(bank)])
        yield name, stacked


def _parts(
    name: str, tensor: Any, family: GgufFamily, config: PretrainedConfig
) -> Iterator[tuple[str, Any]]:
    """A published tensor as the one or several that llama.cpp keeps."""
    projection = name.rsplit(".", 2)[-2] if name.count(".") > 1 else ""
    if family.latent and projection == "kv_b_proj":
        # Attention in the latent space multiplies queries by the key half, hence its transpose.
        halves = tensor.reshape(config.num_attention_heads, -1, tensor.shape[-1])
        key, value = halves.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        yield name.replace("kv_b_proj", "k_b_proj"), key.transpose(1, 2)
        yield name.replace("kv_b_proj", "v_b_proj"), value
    elif projection in family.pairs:
        heads = config.num_attention_heads if projection == "q_proj" else config.num_key_value_heads
        yield name, tensor.index_select(0, _paired_rows(len(tensor), heads))
    elif family.interleaved and ".experts." in name:
        yield from _interleaved(name, tensor)
    elif projection == "input_linear":
        # Gate and up in one, beside each other along the rows.
        for half, values in zip(("gate", "up"), tensor.chunk(2, dim=-2), strict=True):
            yield name.replace("input_linear", f"{half}_linear"), values
    else:
        yield name, tensor


def _interleaved(name: str, tensor: Any) -> Iterator[tuple[str, Any]]:
    """Banks stored [E, D, 2F] with gate and up in turns, or as biases [E, 2F]."""
    bank = tensor.transpose(1, 2) if tensor.ndim == 3 else tensor
    if "gate_up_proj" not in name:
        yield name, bank
        return
    # Not by strides of two: those would read the whole bank for every expert.
    turns = bank.reshape(bank.shape[0], -1, 2, *bank.shape[2:])
    for index, half in enumerate(("gate_proj", "up_proj")):
        yield name.replace("gate_up_proj", half), turns.select(2, index)


def _paired_rows(rows: int, heads: int) -> torch.Tensor:
    """Row order that puts row i of a head's first half beside row i of its second half."""
    order = torch.arange(rows).reshape(heads, 2, -1)
    return order.transpose(1, 2).reshape(-1)
