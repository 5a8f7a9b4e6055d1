"""Packed models of the shapes that speed is measured on, with random weights, in constant memory.

    python benchmarks/reference_shapes.py r1 OUT --codec int4

The experts of a model are rows of a few random experts in other orders, so no encoding is needed
for each of them; what is read, and how it is computed, is that of any model of the shape.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from transformers import PretrainedConfig, Qwen3MoeConfig

from moekit.core.architecture import meta_model
from moekit.core.checkpoint import TensorInfo
from moekit.core.find import find_moe
from moekit.core.layer_spec import describe_layer
from moekit.core.load import PACKED_FILE
from moekit.core.packed import PAGE, CodecChoice, ExpertParts, PackedLayer, write_record
from moekit.core.packed_header import EncodedResident, PackedHeader
from moekit.core.packed_resident import encode_matrix, matrix_arrays
from moekit.core.seeds import generator
from moekit.core.shards import Shard, plan_shards
from moekit.ops.codecs import Encoded, Part

# R1 is small enough to be measured often; R2 is the shape of Qwen3-30B-A3B.
SHAPES: dict[str, dict[str, Any]] = {
    "r1": {
        "vocab_size": 32_000,
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
    "r2": {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
}
# What `moekit convert --resident-codec` encodes of the family of these shapes.
ENCODED = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "lm_head.weight")
TEMPLATES = 4
SHARD_BYTES = 4 * 2**30


def config_of(shape: str) -> PretrainedConfig:
    """The config of one of `SHAPES`, in bfloat16."""
    return Qwen3MoeConfig(
        **SHAPES[shape],
        architectures=["Qwen3MoeForCausalLM"],
        norm_topk_prob=True,
        max_position_embeddings=32_768,
        dtype="bfloat16",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def write_packed(
    shape: str | PretrainedConfig,
    out: str | Path,
    codec: str = "int4",
    *,
    group_size: int = 32,
    resident_codec: str | None = None,
    seed: int = 0,
) -> Path:
    """Write a packed model of `shape` with random weights to the new directory `out`.

    Weights have the variance 1 / inputs, so hidden states keep their size and routing is spread
    over all experts. `resident_codec` is that of `moekit convert`.
    """
    config = config_of(shape) if isinstance(shape, str) else shape
    target = Path(out)
    target.mkdir(parents=True)
    model = meta_model(config)
    choice = CodecChoice(codec, group_size)
    layers = tuple(_layer(site, config, choice) for site in find_moe(model))
    banks = tuple(f"{layer.path}.experts." for layer in layers)
    resident = {
        name: TensorInfo(tuple(t.shape), torch.bfloat16)
        for name, t in model.state_dict().items()
        if not name.startswith(banks)
    }
    encoded = None
    if resident_codec is not None:
        kept = CodecChoice(resident_codec, group_size)
        parts = {
            name: Part(name, info.shape, info.dtype)
            for name, info in resident.items()
            if name.endswith(ENCODED)
        }
        encoded = EncodedResident(kept, parts)
        for name, part in parts.items():
            _, size = matrix_arrays(kept, (part.shape[0], part.shape[1]))
            resident[name] = TensorInfo((1, size), torch.uint8)
    options = [config.to_json_string(), codec, group_size, seed]
    identity = json.dumps(options if encoded is None else [*options, resident_codec]).encode()
    name = hashlib.sha256(identity).hexdigest()[:32]
    header = PackedHeader(name, layers, {}, (), (), encoded)
    records = {
        layer.tensor_name(e, plane): (position, e, plane)
        for position, layer in enumerate(layers)
        for e in range(layer.num_experts)
        for plane in range(layer.num_planes(e))
    }
    infos = {
        name: TensorInfo((1, layers[at].record(e, plane).size), torch.uint8)
        for name, (at, e, plane) in records.items()
    }
    kept = plan_shards(resident, SHARD_BYTES, "resident")
    routed = plan_shards(infos, SHARD_BYTES, "experts", PAGE)
    header = dataclasses.replace(
        header,
        resident_files=tuple(shard.file for shard in kept),
        expert_files=tuple(shard.file for shard in routed),
    )
    sums: dict[str, int] = {}
    for shard in kept:
        _write(target, shard, _resident(shard, resident, encoded, seed, sums))
    templates = _templates(layers[0], choice, generator(seed, "experts"))
    for shard in routed:
        _write(target, shard, _records(shard, records, header, templates))
    config.save_pretrained(target)
    (target / PACKED_FILE).write_text(header.with_resident(sums).to_json())
    return target


def _layer(site: Any, config: PretrainedConfig, choice: CodecChoice) -> PackedLayer:
    spec = describe_layer(site, config)
    wide, deep = (spec.expert_width, spec.hidden_size), (spec.hidden_size, spec.expert_width)
    matrices = tuple(
        Part(name, size, torch.bfloat16)
        for name, size in (("gate", wide), ("up", wide), ("down", deep))
    )
    return PackedLayer(spec.path, spec.layer_index, matrices, (), (choice,) * spec.num_experts)


def _random(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=random) / shape[-1] ** 0.5


def _resident(
    shard: Shard,
    resident: Mapping[str, TensorInfo],
    encoded: EncodedResident | None,
    seed: int,
    sums: dict[str, int],
) -> Iterator[Tensor]:
    for name in shard.offsets:
        part = None if encoded is None else encoded.matrices.get(name)
        shape = resident[name].shape if part is None else part.shape
        values = torch.ones(shape) if len(shape) == 1 else _random(shape, generator(seed, name))
        if "embed_tokens" in name:
            values *= shape[-1] ** 0.5
        tensor = values.bfloat16()
        if part is not None and encoded is not None:
            tensor = encode_matrix(tensor, encoded.codec)
        sums[name] = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)
        yield tensor


def _templates(
    layer: PackedLayer, choice: CodecChoice, random: torch.Generator
) -> list[dict[str, Encoded]]:
    codec = choice.make()
    return [
        {
            part.name: codec.encode(_random((part.shape[0], part.shape[1]), random))
            for part in layer.matrices
        }
        for _ in range(TEMPLATES)
    ]


def _records(
    shard: Shard,
    records: Mapping[str, tuple[int, int, int]],
    header: PackedHeader,
    templates: list[dict[str, Encoded]],
) -> Iterator[Tensor]:
    for name in shard.offsets:
        position, expert, plane = records[name]
        number = position * header.layers[position].num_experts + expert
        matrices = {
            part: _turned(encoded, number)
            for part, encoded in templates[number % TEMPLATES].items()
        }
        codec = header.layers[position].codecs[expert].make()
        yield write_record(header, position, expert, plane, ExpertParts(codec, matrices, {}))


def _turned(encoded: Encoded, number: int) -> Encoded:
    """The same rows in another order."""
    by = 7 * number % encoded.shape[0]
    planes = tuple({k: a.roll(by, 0) for k, a in plane.items()} for plane in encoded.planes)
    return Encoded(encoded.shape, planes)


def _write(target: Path, shard: Shard, tensors: Iterator[Tensor]) -> None:
    file: BinaryIO
    with (target / shard.file).open("wb") as file:
        file.write(shard.header)
        for offset, tensor in zip(shard.offsets.values(), tensors, strict=True):
            assert file.tell() == offset
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--codec", default="int4")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--resident-codec")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write_packed(
        given.shape,
        given.out,
        given.codec,
        group_size=given.group_size,
        resident_codec=given.resident_codec,
        seed=given.seed,
    )


if __name__ == "__main__":
    main()
