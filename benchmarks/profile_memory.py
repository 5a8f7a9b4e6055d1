"""Peak memory of profiling a checkpoint eight times larger than the limit, streamed from disk.

    OMP_NUM_THREADS=1 python benchmarks/profile_memory.py --work /tmp

writes a random qwen3_moe checkpoint of eight times `--limit` to WORK, profiles text through
`moekit profile --stream --memory LIMIT` in a process of its own, and samples that process's
anonymous memory (RssAnon), torch and all, from outside. The result goes to
`benchmarks/results/profile_memory.json`; nothing is written when the limit was passed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moekit.core.architecture import meta_model
from moekit.core.checkpoint import TensorInfo
from moekit.core.memory import bytes_of, format_bytes, rss_anon
from moekit.core.record import start_record
from moekit.core.stats import ExpertStats
from moekit.core.writer import CheckpointWriter

RESULT = Path(__file__).parent / "results" / "profile_memory.json"
TIMES = 8


def write_checkpoint(out: Path, nbytes: int, by_expert: bool) -> int:
    """Write random bf16 weights of about `nbytes`; returns the exact number of bytes.

    With `by_expert` in two layers, so large that only single experts fit into the limit, else in
    48 layers.
    """
    # Wide experts, not thousands of them: statistics of E x E would outgrow the weights.
    layers, width, inner = (2, 2048, 1024) if by_expert else (48, 512, 256)
    experts = nbytes // (layers * 3 * width * inner * 2)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=width,
        moe_intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=8,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        architectures=[Qwen3MoeForCausalLM.__name__],
        dtype="bfloat16",
    )
    tensors = {
        name: TensorInfo(tuple(t.shape), torch.bfloat16)
        for name, t in meta_model(config).state_dict().items()
    }
    generator = torch.Generator().manual_seed(0)
    with CheckpointWriter(out, tensors, identity={}) as writer:
        for name, first in writer.pending():
            shape = tensors[name].shape
            for row in range(first, shape[0]):
                if len(shape) == 1:
                    piece = torch.ones(1)
                # One expert stands for all of its kind: only the routers must differ by row.
                elif row == first or len(shape) == 2:
                    piece = torch.randn(1, *shape[1:], generator=generator) / shape[-1] ** 0.5
                writer.write_rows(name, row, piece.bfloat16())
        writer.write_file("config.json", config.to_json_string())
        writer.commit()
    byte_level = Tokenizer(
        models.BPE(
            vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))},
            merges=[],
        )
    )
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=byte_level).save_pretrained(out)
    return sum(info.nbytes for info in tensors.values())


def peak_of(command: list[str]) -> int:
    """Run a command to its end; the largest RssAnon of it, sampled every 10 ms."""
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    peak = 0
    while process.poll() is None:
        try:
            peak = max(peak, rss_anon(process.pid))
        except (ProcessLookupError, ValueError):
            break
        time.sleep(0.01)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed")
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--limit", default="600MB")
    arguments = parser.parse_args()
    limit = bytes_of(arguments.limit)
    record = start_record("benchmark profile_memory", {"limit": limit}, seed=0)
    text = arguments.work / "profile_memory.txt"
    text.write_text("the router chooses eight experts for every token. " * 500)
    rows = {}
    for name, by_expert in (("48 layers", False), ("2 large layers", True)):
        model, out = arguments.work / "profile_memory", arguments.work / "profile_memory_stats"
        for path in (model, out):
            shutil.rmtree(path, ignore_errors=True)
        size = write_checkpoint(model, TIMES * limit, by_expert)
        start = time.perf_counter()
        peak = peak_of(
            [
                *(sys.executable, "-m", "moekit", "profile", str(model), str(text)),
                *("--out", str(out), "--stream", "--memory", arguments.limit, "--seq-len", "256"),
            ]
        )
        rows[name] = {
            "checkpoint_bytes": size,
            "peak_bytes": peak,
            "seconds": time.perf_counter() - start,
            "tokens": ExpertStats.open(out).num_tokens(0),
        }
        print(f"{name}: {format_bytes(size)} checkpoint, peak {format_bytes(peak)}")
        shutil.rmtree(model)
        shutil.rmtree(out)
        if peak > limit or size < (TIMES - 0.1) * limit:
            raise SystemExit(f"{name}: {format_bytes(peak)} against {arguments.limit}")
    text.unlink()
    record.finish({"rows": rows, "load_average": os.getloadavg()[0]})
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(record.to_json())


if __name__ == "__main__":
    main()
