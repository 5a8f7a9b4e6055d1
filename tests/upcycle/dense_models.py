"""Tiny dense models on disk: a base and fine-tunes of it, with a tokenizer and text by domain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from tests.models import tiny_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
TEXTS = {
    "code": "def route(x): return [e for e in experts if e > x]\n" * 60,
    "prose": "the router chooses two experts for every token, and so on. " * 60,
}


def dense_config(family: str = "qwen3", **changes: Any) -> PretrainedConfig:
    return {"qwen3": Qwen3Config, "llama": LlamaConfig}[family](**{**SHAPE, **changes})


def write_dense(
    path: Path,
    config: PretrainedConfig | None = None,
    *,
    seed: int = 0,
    like: Path | None = None,
    moves: Callable[[str], bool] = lambda name: True,
) -> Path:
    """A random model, or one whose parameters `moves` names differ from those of `like`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if like is None:
            model = AutoModelForCausalLM.from_config(config or dense_config())
        else:
            model = AutoModelForCausalLM.from_pretrained(like)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not moves(name):
                    continue
                if like is not None:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif parameter.ndim > 1:
                    parameter.normal_(std=0.25)
                else:
                    # Ones would hide a norm that is left out.
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def write_texts(path: Path) -> Path:
    path.mkdir()
    for domain, text in TEXTS.items():
        (path / f"{domain}.txt").write_text(text)
    return path


def is_ffn(name: str) -> bool:
    return ".mlp." in name


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 320, (batch, length), generator=generator)


def read(path: Path) -> Any:
    """The model in `path`, as moekit loads it."""
    from moekit.core.load import load_language_model

    return load_language_model(path, "float32").model
