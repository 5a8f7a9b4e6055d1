"""A packed model as a model of transformers: every code decoded, nothing of the kernels used."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moekit.core.architecture import read_config
from moekit.ops.codecs import make_codec
from moekit.runtime.store import ExpertStore

# What the native runner encodes besides the experts, in a qwen3_moe.
_ENCODED = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "lm_head.weight")


def decoded_model(
    path: Path, resident_codec: str | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The qwen3_moe packed at `path`, with its resident matrices through `resident_codec` too."""
    config = read_config(path)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    state = model.state_dict()
    codec = None if resident_codec is None else make_codec(resident_codec)
    with torch.no_grad(), ExpertStore.open(path) as store:
        for name, tensor in store.resident():
            if codec is not None and name.endswith(_ENCODED):
                tensor = codec.decode(codec.encode(tensor))
            state[name].copy_(tensor)
        for position, layer in enumerate(store.layers):
            bank = f"{layer.path}.experts."
            for expert in range(layer.num_experts):
                parts = store.read(position, expert)
                found = {name: parts.codec.decode(m) for name, m in parts.matrices.items()}
                both = torch.cat([found["gate"], found["up"]])
                state[f"{bank}gate_up_proj"][expert].copy_(both)
                state[f"{bank}down_proj"][expert].copy_(found["down"])
    return model
