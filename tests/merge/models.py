"""Tiny dense and MoE models that moved away from one base, with a tokenizer and a little text."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models import CONTEXT, TEXT, tiny_tokenizer, write_tiny_model

DENSE = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def write_family(root: Path, *, moe: bool = False, count: int = 2, moved: float = 0.05) -> Path:
    """`base` and `a`, `b`, ... in `root`, and a text for each as `a.txt`."""
    for number, name in enumerate(("base", "a", "b", "c")[: count + 1]):
        if moe:
            write_tiny_model(root / name)
        else:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                LlamaForCausalLM(LlamaConfig(**DENSE)).save_pretrained(root / name)
            tiny_tokenizer().save_pretrained(root / name)
        if number:
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(root / name)
            draw = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += moved * torch.randn(parameter.shape, generator=draw)
            model.save_pretrained(root / name)
            (root / f"{name}.txt").write_text(TEXT * number)
    return root
