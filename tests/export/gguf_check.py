"""Models and logits to compare a GGUF file with what it was made from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from moekit.export.gguf_vocab import PRE_TOKENIZERS
from tests.families.tiny import TINY, build_tiny
from tests.models import TEXT

VOCAB = 320
# Rows of 32 numbers or more, so that every tensor can be quantised in blocks.
WIDTHS = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64,
    "head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
# What the tiny configs of some families ask for and llama.cpp does not compute, and variants that
# it does and the tiny configs do not ask for.
QWEN3 = {"mlp_only_layers": [], "norm_topk_prob": True}
QWEN2 = {"mlp_only_layers": [], "norm_topk_prob": False}
GREEDY = {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
LITE = {"q_lora_rank": None, "num_hidden_layers": 27}
V2_YARN = {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}
V3_YARN = {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
GRANITE = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
}
GLM = {"attention_bias": True, "n_shared_experts": 2, "routed_scaling_factor": 2.5}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", QWEN3),
    "qwen3_moe linear": ("qwen3_moe", {**QWEN3, "rope_parameters": LINEAR}),
    "qwen3_moe yarn": ("qwen3_moe", {**QWEN3, "rope_parameters": YARN}),
    "qwen3_moe yarn factor": (
        "qwen3_moe",
        {**QWEN3, "rope_parameters": {**YARN, "attention_factor": 1.5}},
    ),
    "qwen3_moe tied": ("qwen3_moe", {**QWEN3, "tie_word_embeddings": True}),
    "qwen2_moe": ("qwen2_moe", QWEN2),
    "qwen2_moe tied": ("qwen2_moe", {**QWEN2, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", {"sliding_window": None}),
    "olmoe": ("olmoe", {"num_key_value_heads": 4, "norm_topk_prob": False}),
    "granitemoe": ("granitemoe", {**GRANITE, "tie_word_embeddings": True}),
    "granitemoeshared": ("granitemoeshared", GRANITE),
    "gpt_oss": ("gpt_oss", {"rope_parameters": YARN}),
    "deepseek_v2": ("deepseek_v2", GREEDY),
    "deepseek_v2 lite yarn": ("deepseek_v2", {**GREEDY, **LITE, **V2_YARN}),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3 yarn": ("deepseek_v3", V3_YARN),
    "glm4_moe": ("glm4_moe", {"use_qk_norm": True}),
    "glm4_moe biases": ("glm4_moe", GLM),
    "dots1": ("dots1", {"num_key_value_heads": 4, "norm_topk_prob": True}),
    "minimax_m2": ("minimax_m2", {}),
}


def build(variant: str) -> PreTrainedModel:
    """The random model of a variant, in fp32."""
    family, fields = VARIANTS[variant]
    config = copy.deepcopy(TINY[family]().to_dict())
    known = {name: value for name, value in WIDTHS.items() if config.get(name) is not None}
    config.pop("layer_types", None)
    return build_tiny(family, config=type(TINY[family]()).from_dict(config | known | fields))


def tokenizer(pre: str = "qwen2") -> PreTrainedTokenizerFast:
    """Byte-level BPE with `VOCAB` entries and one of llama.cpp's split rules."""
    (rule,), merged = next(key for key, name in PRE_TOKENIZERS.items() if name == pre)
    bpe = Tokenizer(models.BPE(ignore_merges=merged))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule == "gpt2")
    steps = [] if rule == "gpt2" else [pre_tokenizers.Split(Regex(rule), behavior="isolated")]
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


def save(variant: str, path: Path) -> PreTrainedModel:
    """Write a variant and a tokenizer to `path`."""
    model = build(variant)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return model


def own_logits(model: PreTrainedModel, ids: list[int]) -> np.ndarray:
    """[T, V] of transformers in fp32."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float().numpy()


def llama_logits(path: Path, ids: list[int], threads: int = 1) -> np.ndarray:
    """[T, V] of llama.cpp, its key-value cache in f32 so that only the weights are rounded."""
    from llama_cpp import GGML_TYPE_F32, Llama

    llama = Llama(
        str(path),
        n_ctx=len(ids) + 8,
        n_batch=len(ids),
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    llama.eval(ids)
    logits = np.array(llama.scores[: len(ids)])
    llama.close()
    return logits


def mean_loss(logits: np.ndarray, ids: list[int]) -> float:
    """Mean of -ln p of the token that follows, in nats."""
    logits = logits[:-1].astype(np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    chosen = shifted[np.arange(len(ids) - 1), ids[1:]]
    return float((np.log(np.exp(shifted).sum(1)) - chosen).mean())
