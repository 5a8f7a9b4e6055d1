"""GGUF files of the reference shapes with random weights, for llama.cpp, in constant memory.

    python benchmarks/reference_gguf.py r2 OUT.gguf --type q4_0

Counterpart of `reference_shapes.py`: rows of a few random matrices are repeated, so nothing but
those is encoded. All matrices are in one number format, embedding and output head included; norms
and routers are in f32.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from reference_shapes import SHAPES, config_of
from transformers import PretrainedConfig

from moekit.core.spec import spec_from_config
from moekit.export.gguf_families import FAMILIES
from moekit.export.gguf_keys import add_keys

TEMPLATE_ROWS = 4096


def tensors(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """llama.cpp's names and the shapes of a qwen3_moe, in the order they are used."""
    d, f, head = config.hidden_size, config.moe_intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (config.vocab_size, d)}
    for layer in range(config.num_hidden_layers):
        own = {
            "attn_norm": (d,),
            "attn_q": (queries, d),
            "attn_k": (keys, d),
            "attn_v": (keys, d),
            "attn_q_norm": (head,),
            "attn_k_norm": (head,),
            "attn_output": (d, queries),
            "ffn_norm": (d,),
            "ffn_gate_inp": (config.num_experts, d),
            "ffn_gate_exps": (config.num_experts, f, d),
            "ffn_up_exps": (config.num_experts, f, d),
            "ffn_down_exps": (config.num_experts, d, f),
        }
        found |= {f"blk.{layer}.{name}.weight": shape for name, shape in own.items()}
    return found | {"output_norm.weight": (d,), "output.weight": (config.vocab_size, d)}


def write_gguf(shape: str, out: Path, kind: str, *, seed: int = 0) -> Path:
    """Write the shape with random weights in number format `kind` (f16, q8_0, q4_0) to `out`."""
    config = config_of(shape)
    wanted = gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(None, "qwen3moe")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(shape)
    add_keys(writer, FAMILIES["qwen3_moe"], config, spec_from_config(config))
    writer.add_tokenizer_model("none")
    sizes = {}
    for name, size in tensors(config).items():
        exact = len(size) == 1 or ".ffn_gate_inp." in name
        to = gguf.GGMLQuantizationType.F32 if exact else wanted
        block, block_bytes = gguf.GGML_QUANT_SIZES[to]
        row = size[-1] // block * block_bytes
        sizes[name] = (size, to, row)
        nbytes = int(np.prod(size[:-1], dtype=np.int64)) * row
        writer.add_tensor_info(name, (*size[:-1], row), np.dtype(np.uint8), nbytes, to)
    writer.write_header_to_file(out)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    random = np.random.default_rng(seed)
    templates: dict[tuple[int, int], np.ndarray] = {}
    for size, to, _ in sizes.values():
        key = (size[-1], int(to))
        if len(size) > 1 and key not in templates:
            rows = random.standard_normal((TEMPLATE_ROWS, size[-1]), np.float32)
            templates[key] = gguf.quantize(rows / np.sqrt(np.float32(size[-1])), to)
        written = 0
        for piece in _pieces(size, templates.get(key), random):
            file.write(np.ascontiguousarray(piece).data)
            written += piece.nbytes
        writer.write_padding(file, written)
    writer.close()
    return out


def _pieces(
    size: tuple[int, ...], template: np.ndarray | None, random: np.random.Generator
) -> Iterator[np.ndarray]:
    """The rows of one tensor: ones for a norm, else those of the template from a random one on."""
    if template is None or len(size) == 1:
        yield np.ones(size, np.float32)
        return
    left = int(np.prod(size[:-1], dtype=np.int64))
    while left:
        first = int(random.integers(len(template)))
        piece = template[first : first + left]
        left -= len(piece)
        yield piece


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="q4_0", choices=("f16", "q8_0", "q4_0"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write_gguf(given.shape, given.out, given.type, seed=given.seed)


if __name__ == "__main__":
    main()
