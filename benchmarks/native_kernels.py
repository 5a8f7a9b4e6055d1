"""How fast the native kernels run the experts of the reference shapes, codec by codec.

    python benchmarks/native_kernels.py --threads 2

Decode is one token through 8 experts, prefill 128 tokens through the experts of a layer; weights
are taken in turn from more memory than the last-level cache holds. Beside each decode stands the
speed at which the same memory was merely read, just before, and beside the codecs torch in bf16.
Every vector instruction set that the machine has is measured on the same weights.
A codec whose products differ from decoding and multiplying stops the run before anything is timed.
Writes `benchmarks/results/native_kernels.json`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moekit.core.record import start_record
from moekit.ops import native
from moekit.ops.codecs import Codec, make_codec
from moekit.ops.native.build import cached_library
from moekit.ops.native.formats import expert_format, in_memory
from moekit.ops.native.structures import Format

RESULT = Path(__file__).parent / "results" / "native_kernels.json"
# (D, F, K, experts a layer): R1 has 1.3 billion parameters, R2 is the shape of Qwen3-30B-A3B.
SHAPES = {"R1": (1024, 512, 8, 64), "R2": (2048, 768, 8, 128)}
CODECS = ("int4", "int4:128", "int8", "int3", "int2", "ternary", "ternary:128", "nested4")
FLOATS = ("bf16", "fp16")
ISAS = ("avx512", "avx2")
PREFILL = 128
CLOCK = time.perf_counter
# Several times the last-level cache of any machine this is likely to run on.
ROTATED_BYTES = 2**28


def check(pool: native.Pool, codec: str, shape: tuple[int, int]) -> None:
    """Stop unless the products of a few tokens are those of the decoded matrix."""
    made = codec_of(codec)
    encoded = made.encode(torch.randn(shape) * 0.05)
    found = in_memory(made, encoded)
    if found is None:
        raise SystemExit(f"{codec} has no kernels")
    weight = made.decode(encoded).double()
    for tokens in (1, 5, 30):
        x = torch.randn(tokens, shape[1])
        out = pool.matmul(found[0], found[1].data_ptr(), x)
        seen, rounding = rounded(pool, made, x)
        bound = (seen.abs() * shape[1] * 2**-24 + rounding) @ weight.abs().T
        if not bool(((out - seen @ weight.T).abs() <= bound).all()):
            raise SystemExit(f"{codec} with {tokens} tokens: wrong products; nothing was timed")


def rounded(pool: native.Pool, codec: Codec, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernels make of activations [T, D], and how far from it they may be."""
    group = getattr(codec, "group_size", None)
    if group is None and codec.dtype != torch.bfloat16:
        return x.double(), torch.zeros(())
    if group is None or pool.c.native_isa() != b"avx2":
        return x.bfloat16().double(), torch.zeros(())
    largest = x.double().abs().unflatten(1, (-1, group)).amax(-1)
    return x.double(), largest.repeat_interleave(group, 1) * 2**-15


def codec_of(name: str) -> Any:
    codec, _, group_size = name.partition(":")
    return make_codec(codec, int(group_size or 32))


class Experts:
    """Enough experts of one codec, all alike, each in memory of its own."""

    def __init__(self, codec: str, width: int, inner: int) -> None:
        made = codec_of(codec)
        shapes = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
        formats: dict[str, Format] = {}
        pieces: list[Tensor] = []
        for name, shape in shapes.items():
            found = in_memory(made, made.encode(torch.randn(shape) * 0.05))
            assert found is not None
            formats[name], memory = found
            start = sum(len(piece) for piece in pieces)
            for field in formats[name].fields[: formats[name].num_fields]:
                field.codes, field.scale = field.codes + start, field.scale + start
                field.zero = field.zero + start if field.zero >= 0 else -1
            formats[name].data += start
            pieces.append(memory)
        self.nbytes = sum(made.nbytes(shape) for shape in shapes.values())
        self.format = expert_format(formats, "silu")
        whole = torch.cat(pieces)
        count = -(-ROTATED_BYTES // len(whole))
        self.memory = whole.repeat(count, 1)

    def jobs(self, experts: list[int], count: int) -> Any:
        """`count` pairs for each of these experts."""
        return (native.FfnJob * len(experts))(
            *[
                native.FfnJob(
                    ctypes.pointer(self.format),
                    self.memory[expert % len(self.memory)].data_ptr(),
                    i * count,
                    count,
                )
                for i, expert in enumerate(experts)
            ]
        )


def seconds_of(work: Callable[[int], None], rounds: int) -> float:
    """The median of the seconds that work(0), work(1), ... take, by CLOCK."""
    work(0)
    taken = []
    for i in range(1, rounds + 1):
        start = CLOCK()
        work(i)
        taken.append(CLOCK() - start)
    return statistics.median(taken)


def measure(
    pool: native.Pool, experts: Experts, shape: tuple[int, int, int, int]
) -> dict[str, float]:
    width, inner, top_k, num_experts = shape
    flops = 2 * 3 * width * inner

    def ffn(jobs: Any, pairs: int, hidden: Tensor) -> None:
        tokens = torch.arange(pairs, dtype=torch.int32) % len(hidden)
        out = torch.empty(pairs, width)
        pool.c.ffn(
            pool.handle,
            jobs,
            len(jobs),
            tokens.data_ptr(),
            hidden.data_ptr(),
            width,
            out.data_ptr(),
        )

    layers = [
        experts.jobs(list(range(start, start + top_k)), 1)
        for start in range(0, max(top_k, len(experts.memory) - top_k), top_k)
    ]
    one = torch.randn(1, width)
    read = seconds_of(lambda _: pool.read_memory(experts.memory) and None, 3)
    read_speed = experts.memory.nbytes / read * 1e-9
    decode = seconds_of(lambda i: ffn(layers[i % len(layers)], top_k, one), 3 * len(layers))
    speed = top_k * experts.nbytes / decode * 1e-9
    pairs = PREFILL * top_k
    whole = experts.jobs(list(range(num_experts)), pairs // num_experts)
    many = torch.randn(PREFILL, width)
    prefill = seconds_of(lambda _: ffn(whole, pairs, many), 5)
    return {
        "decode_us": decode * 1e6,
        "decode_gb_per_s": speed,
        "read_gb_per_s": read_speed,
        "share_of_read": speed / read_speed,
        "prefill_ms": prefill * 1e3,
        "prefill_gflop_per_s": pairs * flops / prefill * 1e-9,
    }


def measure_torch(shape: tuple[int, int, int, int]) -> dict[str, float]:
    """The same by torch's products in bf16, expert after expert."""
    width, inner, top_k, num_experts = shape
    nbytes = 2 * 3 * width * inner
    count = max(num_experts, ROTATED_BYTES // nbytes)
    gate_up = torch.randn(count, 2 * inner, width, dtype=torch.bfloat16)
    down = torch.randn(count, width, inner, dtype=torch.bfloat16)

    def ffn(first: int, experts: int, hidden: Tensor) -> None:
        for e in range(first, first + experts):
            gate, up = F.linear(hidden, gate_up[e % count]).chunk(2, -1)
            F.linear(F.silu(gate) * up, down[e % count])

    one = torch.randn(1, width, dtype=torch.bfloat16)
    decode = seconds_of(lambda i: ffn(i * top_k, top_k, one), 3 * count // top_k)
    pairs = PREFILL * top_k
    many = torch.randn(pairs // num_experts, width, dtype=torch.bfloat16)
    prefill = seconds_of(lambda _: ffn(0, num_experts, many), 5)
    return {
        "decode_us": decode * 1e6,
        "decode_gb_per_s": top_k * nbytes / decode * 1e-9,
        "prefill_ms": prefill * 1e3,
        "prefill_gflop_per_s": pairs * 6 * width * inner / prefill * 1e-9,
    }


def libraries() -> dict[str, native.Library]:
    """The kernels of each instruction set: a library of another name chooses anew."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for isa in ISAS:
            copy = shutil.copy(cached_library(), Path(folder) / f"{isa}.so")
            os.environ["MOEKIT_ISA"] = isa
            library = native.Library(str(copy))
            if library.isa == isa:
                found[isa] = library
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--codecs", nargs="+", default=[*CODECS, *FLOATS])
    parser.add_argument(
        "--busy", action="store_true", help="one thread and its processor time: others run as well"
    )
    arguments = parser.parse_args()
    if arguments.busy:
        global CLOCK
        arguments.threads, CLOCK = 1, time.thread_time
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    record = start_record("benchmark native_kernels", vars(arguments), seed=0)
    pools = {isa: native.Pool(library, arguments.threads) for isa, library in libraries().items()}
    for pool in pools.values():
        for codec in arguments.codecs:
            check(pool, codec, (768, 2048))
    rows = {}
    for name, shape in SHAPES.items():
        for codec in arguments.codecs:
            experts = Experts(codec, *shape[:2])
            for isa, pool in pools.items():
                row = rows[f"{name}, {codec}, {isa}"] = measure(pool, experts, shape)
                print(
                    f"{name} {codec:11} {isa:6} decode {row['decode_us']:7.0f} us, "
                    f"{row['decode_gb_per_s']:5.1f} of {row['read_gb_per_s']:4.1f} GB/s "
                    f"({row['share_of_read']:.0%}); prefill {row['prefill_ms']:6.1f} ms, "
                    f"{row['prefill_gflop_per_s']:4.0f} GFLOP/s",
                    flush=True,
                )
        row = rows[f"{name}, torch bf16"] = measure_torch(shape)
        print(
            f"{name} torch bf16 decode {row['decode_us']:7.0f} us, {row['decode_gb_per_s']:5.1f} "
            f"GB/s; prefill {row['prefill_ms']:6.1f} ms, {row['prefill_gflop_per_s']:4.0f} GFLOP/s"
        )
    record.finish({"isas": list(pools), "load_average": os.getloadavg()[0], "rows": rows})
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(json.loads(record.to_json()), indent=2) + "\n")


if __name__ == "__main__":
    main()
