"""Peak anonymous memory of `convert` on a large random checkpoint, with its tensors checked.

    python benchmarks/convert_memory.py --size 10GB --work /tmp

makes a random checkpoint of about that size in the per-expert layout, converts it to the fused
layout, back, and copies it, each in a process of its own whose RssAnon is sampled, and compares
every tensor. The result goes to `benchmarks/results/convert_memory.json`; it is only written if all
tensors are equal. Needs about three times the size on disk, which is freed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from moekit.core.checkpoint import Checkpoint, TensorInfo
from moekit.core.memory import bytes_of, format_bytes, rss_anon
from moekit.core.record import start_record
from moekit.core.seeds import generator
from moekit.core.writer import CheckpointWriter

LIMIT = 1.5e9
RESULT = Path(__file__).parent / "results" / "convert_memory.json"

# The widths of a 30-billion-parameter qwen3_moe; the number of layers makes the size.
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}

CHILD = """
import sys
from moekit.core.convert import convert
print("imported", flush=True)
sys.stdin.readline()
convert(sys.argv[1], sys.argv[2], sys.argv[3])
print("converted", flush=True)
sys.stdin.readline()
"""


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint, written down by hand: nothing of convert is used."""
    d, f, head = CONFIG["hidden_size"], CONFIG["moe_intermediate_size"], CONFIG["head_dim"]
    queries, keys = CONFIG["num_attention_heads"] * head, CONFIG["num_key_value_heads"] * head
    found = {"model.embed_tokens.weight": (CONFIG["vocab_size"], d)}
    for layer in range(layers):
        base = f"model.layers.{layer}."
        found |= {
            base + "input_layernorm.weight": (d,),
            base + "post_attention_layernorm.weight": (d,),
            base + "self_attn.q_proj.weight": (queries, d),
            base + "self_attn.k_proj.weight": (keys, d),
            base + "self_attn.v_proj.weight": (keys, d),
            base + "self_attn.o_proj.weight": (d, queries),
            base + "self_attn.q_norm.weight": (head,),
            base + "self_attn.k_norm.weight": (head,),
            base + "mlp.gate.weight": (CONFIG["num_experts"], d),
        }
        for expert in range(CONFIG["num_experts"]):
            own = f"{base}mlp.experts.{expert}."
            found |= {
                own + "gate_proj.weight": (f, d),
                own + "up_proj.weight": (f, d),
                own + "down_proj.weight": (d, f),
            }
    return found | {"model.norm.weight": (d,), "lm_head.weight": (CONFIG["vocab_size"], d)}


def layers_for(size: int) -> int:
    one, two = (2 * sum(torch.Size(s).numel() for s in shapes(n).values()) for n in (1, 2))
    return max(1, round((size - one) / (two - one)) + 1)


def make(path: Path, layers: int) -> None:
    infos = {name: TensorInfo(shape, torch.bfloat16) for name, shape in shapes(layers).items()}
    source = generator(0, "convert_memory")
    with CheckpointWriter(path, infos) as writer:
        for name, _ in writer.pending():
            bits = torch.empty(infos[name].shape, dtype=torch.int16).random_(generator=source)
            writer.write(name, bits.view(torch.bfloat16))
        writer.write_file("config.json", json.dumps(CONFIG | {"num_hidden_layers": layers}))
        writer.commit()


def measure(
    source: Path, out: Path, to: str, code: str = CHILD, python: str = sys.executable
) -> dict[str, float]:
    """Run one conversion in a process of its own and sample its anonymous memory every 5 ms.

    `code` is what the process runs with the other arguments; it says when it begins and ends.
    """
    child = subprocess.Popen(
        [python, "-c", code, str(source), str(out), to],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    if child.stdout.readline() != "imported\n":
        raise SystemExit(f"the child process failed: {child.wait()}")
    before = peak = rss_anon(child.pid)
    started = time.monotonic()
    child.stdin.write("\n")
    child.stdin.flush()
    os.set_blocking(child.stdout.fileno(), False)
    while child.poll() is None and not child.stdout.readline():
        peak = max(peak, rss_anon(child.pid))
        time.sleep(0.005)
    seconds = time.monotonic() - started
    child.communicate("\n")
    if child.returncode:
        raise SystemExit(f"the conversion to {to} failed with exit code {child.returncode}")
    return {
        "rss_anon_after_import": before,
        "rss_anon_peak": peak,
        "above_import": peak - before,
        "seconds": round(seconds, 1),
    }


def equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Bit for bit, infinities and NaNs included."""
    return torch.equal(one.view(torch.int16), two.contiguous().view(torch.int16))


def compare_fused(plain: Checkpoint, fused: Checkpoint) -> int:
    """Compare every tensor of both layouts, the banks expert by expert; returns their number."""
    width = CONFIG["moe_intermediate_size"]
    seen = 0
    for name in plain.names():
        stem, _, rest = name.partition(".experts.")
        if not rest:
            same = equal(plain.get(name), fused.get(name))
        else:
            expert, projection, _ = rest.split(".")
            bank = "down_proj" if projection == "down_proj" else "gate_up_proj"
            row = fused.get_slice(f"{stem}.experts.{bank}")[int(expert)]
            start = {"gate_proj": 0, "up_proj": width, "down_proj": 0}[projection]
            stop = start + width if projection != "down_proj" else None
            same = equal(plain.get(name), row[start:stop])
        if not same:
            raise SystemExit(f"{name} differs; no result is written")
        seen += 1
    if sum(fused.info(name).nbytes for name in fused.names()) != plain.nbytes:
        raise SystemExit("the fused checkpoint has other tensors too; no result is written")
    return seen


def compare_same(one: Checkpoint, two: Checkpoint) -> int:
    if set(one.names()) != set(two.names()):
        raise SystemExit("the tensors have other names; no result is written")
    for name in one.names():
        if not equal(one.get(name), two.get(name)):
            raise SystemExit(f"{name} differs; no result is written")
    return len(one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="10GB", help="size of the checkpoint, such as 1GB")
    parser.add_argument("--work", type=Path, default=Path("/tmp"), help="a directory on a disk")
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    work = arguments.work / f"moekit-convert-memory-{os.getpid()}"
    record = start_record("benchmarks/convert_memory.py", {"size": arguments.size}, seed=0)
    runs = {}
    try:
        layers = layers_for(bytes_of(arguments.size))
        make(work / "source", layers)
        runs["per-expert to fused"] = measure(work / "source", work / "fused", "fused")
        with Checkpoint(work / "source") as source, Checkpoint(work / "fused") as fused:
            size = source.nbytes
            tensors = compare_fused(source, fused)
        runs["fused to per-expert"] = measure(work / "fused", work / "back", "per-expert")
        shutil.rmtree(work / "fused")
        with Checkpoint(work / "source") as source, Checkpoint(work / "back") as back:
            compare_same(source, back)
        shutil.rmtree(work / "back")
        runs["copy"] = measure(work / "source", work / "copy", "per-expert")
        with Checkpoint(work / "source") as source, Checkpoint(work / "copy") as copied:
            compare_same(source, copied)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    metrics = {
        "checkpoint_bytes": size,
        "layers": layers,
        "tensors_compared": tensors,
        "all_equal": True,
        "limit_above_import": LIMIT,
        "load_average_at_end": os.getloadavg()[0],
        "runs": runs,
    }
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(record.finish(metrics).to_json())
    for name, run in runs.items():
        print(f"{name}: {format_bytes(run['above_import'])} above import, {run['seconds']} s")
    if any(run["above_import"] > LIMIT for run in runs.values()):
        raise SystemExit(f"more than {format_bytes(LIMIT)}")


if __name__ == "__main__":
    main()
