"""A tiny trained-looking model on disk: random qwen3_moe weights and a real byte-level BPE."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

CONTEXT = 64
TEXT = "the router chooses two experts for every token. der Router wählt zwei Experten. 日本語。\n"


def tiny_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 320 entries: every byte, so characters may span several tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_config(**changes: object) -> Qwen3MoeConfig:
    fields = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.4,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return Qwen3MoeConfig(**{**fields, **changes})


def write_tiny_model(path: Path, chat_template: str | None = None) -> Path:
    """Write the tiny model and its tokenizer to `path`; no EOS, so generation never stops early."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(tiny_config()).save_pretrained(path)
    tiny_tokenizer(chat_template).save_pretrained(path)
    return path
