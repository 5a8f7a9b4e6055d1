"""Compile the kernels for GPUs that are not there; `python -m tests.ops.triton.compile_ahead`.

Prints as JSON, for each codec named and each kernel, what its PTX loads and multiplies with.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections import Counter

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moekit.ops.codecs import make_codec
from moekit.ops.triton import kernels, training_kernels
from moekit.ops.triton.formats import ACTIVATIONS, ExpertFormat, matrix_format
from moekit.ops.triton.launch import VECTOR, blocks_for, settings_of
from moekit.ops.triton.training import TILE, WIDE, stages

POINTERS = {
    "memory": "*u8",
    "places": "*i64",
    "experts": "*i64",
    "pair_of_row": "*i64",
    "expert_of_block": "*i64",
    "parts": "*fp32",
    "weights": "*fp32",
    "shares": "*fp32",
    **dict.fromkeys(["source", "begin_of_block", "ends", "begins", "place_of_token_pair"], "*i64"),
}
FLOATING = ("x", "out", "left", "right", "weight", "rows", "grad", "down", "before", "scale")
FLOATING += ("grad_before", "scaled")
ACTIVE = {"ACTIVATION": "silu", "GATED": True, **TILE}
TRAINING = {
    "rows gathered": ("rows_kernel", {**ACTIVE, "GATHER": True, "ACTIVATION": None}),
    "rows activated": ("rows_kernel", {**ACTIVE, "GATHER": False}),
    "inner backward": ("inner_backward_kernel", ACTIVE),
    "bank gradient": ("bank_gradient_kernel", {"GATHER_LEFT": True, "GATHER_RIGHT": False, **TILE}),
    "sum": ("sum_kernel", {"WEIGHTED": True, "BLOCK": WIDE}),
}


def expert(codec_name: str) -> ExpertFormat:
    codec, end = make_codec(codec_name), 0

    def matrix(rows: int, cols: int):
        nonlocal end
        offsets = []
        for plane in codec.layout((rows, cols)):
            offsets.append({part.name: end + 64 * i for i, part in enumerate(plane)})
            end += 64 * len(plane) * 1024
        made = matrix_format(codec, (rows, cols), offsets)
        assert made is not None
        return made

    return ExpertFormat(matrix(512, 1024), matrix(512, 1024), matrix(1024, 512), "silu")


def compiled(kernel, constants, floating, capability, **options) -> dict[str, int]:
    """Counts of the interesting instructions of a kernel."""
    names = kernel.arg_names
    types = {**POINTERS, **dict.fromkeys(FLOATING, floating)}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in types}
    made = triton.compile(
        ASTSource(kernel, signature, {n: constants[n] for n in names if n in constants}, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"enable_fp_fusion": True, **options},
    )
    found = re.findall(r"\b(?:ld|st)\.(?:global|local)[\w.]*|\b\w*mma[\w.]*", made.asm["ptx"])
    return {**Counter(found), "shared": made.metadata.shared}


def main() -> None:
    found = {}
    for codec in sys.argv[1:]:
        made = expert(codec)
        assert made.gate is not None
        constants = settings_of(made.up, made.gate, made, False)
        for capability in (80, 90):
            for floating in ("*bf16", "*fp32"):
                at = f"{codec} {capability} {floating}"
                found[f"vector {at}"] = compiled(
                    kernels.vector_kernel,
                    {**constants, "BLOCK": VECTOR.rows, "GROUPS": 256 // made.up.group},
                    floating,
                    capability,
                )
                for mean in (16, 64):
                    blocks = blocks_for(mean, 1)
                    found[f"block{blocks.pairs} {at}"] = compiled(
                        kernels.block_kernel,
                        {**constants, "BLOCK": blocks.rows, "PAIRS": blocks.pairs},
                        floating,
                        capability,
                        num_stages=blocks.stages,
                        num_warps=blocks.warps,
                    )
        for name in ACTIVATIONS if codec == "int4" else ():
            other = dataclasses.replace(made, activation=name, up_bias=64, gate_bias=128)
            found[f"vector {codec} {name}"] = compiled(
                kernels.vector_kernel,
                {
                    **settings_of(other.up, other.gate, other, False),
                    "BLOCK": VECTOR.rows,
                    "GROUPS": 256 // made.up.group,
                    # What a launch makes of numbers that are 1.
                    "share": 1,
                    "num_experts": 1,
                },
                "*bf16",
                90,
            )
        down = settings_of(made.down, None, dataclasses.replace(made, down_bias=64), True)
        for pairs in (16, 64):
            found[f"down{pairs} {codec}"] = compiled(
                kernels.block_kernel,
                {**down, "BLOCK": 64, "PAIRS": pairs, "share": 1},
                "*bf16",
                90,
                num_warps=8,
            )
    for title, (name, settings) in TRAINING.items():
        for capability in (80, 90):
            for floating, dtype in (("*bf16", torch.bfloat16), ("*fp32", torch.float32)):
                kernel, number = getattr(training_kernels, name), stages(dtype)
                at = f"training {title} {capability} {floating}"
                found[at] = compiled(kernel, settings, floating, capability, num_stages=number)
    found["combine"] = compiled(kernels.combine_kernel, {"BLOCK": 256}, "*bf16", 90)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
