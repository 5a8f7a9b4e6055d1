"""A tiny random model of every MoE family of the installed transformers.

`TINY` maps a family (the name of its folder in `transformers.models`) to a function that returns
a tiny config; `SKIP` holds the families that have none, each with its reason.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .rows import COMMON, ENCODER, ROWS, SKIP, VOCAB

__all__ = ["SKIP", "TINY", "build_tiny", "model_class", "supports_generate", "tiny_inputs"]

CORRECTION_BIASES = {"e_score_correction_bias", "expert_bias", "balancing_biases"}
EXPERT_SCALES = {"per_expert_scale"}
KEPT = {"A_log", "dt_bias"}


def _tiny(
    config_class: type[PretrainedConfig], common: dict[str, Any], fields: dict[str, Any]
) -> PretrainedConfig:
    declared = {f.name for f in dataclasses.fields(config_class)}
    values = {name: value for name, value in common.items() if name in declared}
    fields = copy.deepcopy(fields)  # configs keep and change the dicts they are given
    for name, part_class in config_class.sub_configs.items():
        part_fields = dict(fields.pop(name, {}))
        if "model_type" in part_fields:
            part_class = CONFIG_MAPPING[part_fields.pop("model_type")]
        base = COMMON if name == "text_config" else COMMON | ENCODER
        values[name] = _tiny(part_class, base, part_fields)
    return config_class(**(values | fields))


def _config(family: str) -> PretrainedConfig:
    row = ROWS[family]
    return _tiny(CONFIG_MAPPING[row.config], COMMON, row.fields)


TINY: dict[str, Callable[[], PretrainedConfig]] = {
    family: functools.partial(_config, family) for family in ROWS
}


def model_class(family: str) -> type[PreTrainedModel]:
    row = ROWS[family]
    if row.model is not None:
        return getattr(transformers, row.model)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(TINY[family]())]


def build_tiny(
    model_type: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    config: PretrainedConfig | None = None,
) -> PreTrainedModel:
    """Build the tiny model of a family with random weights, in evaluation mode.

    `config` defaults to the family's own; give one that was changed to build a variant.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = TINY[model_type]() if config is None else config
        model = model_class(model_type)._from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if any(part in name for part in model._keep_in_fp32_modules_strict):
                tensor.data = tensor.data.float()  # as from_pretrained does; some routers need it
            _randomize(name, tensor, generator)
    return model.eval()


def _randomize(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    # The default std of 0.02 makes the router indifferent and the logits flat; with unit-variance
    # projections every expert is chosen. Correction biases start at zero and expert scales at one,
    # which would hide a rule that forgets them. Norms and decay rates keep their own values.
    leaf = name.rsplit(".", 1)[-1]
    trained = isinstance(tensor, torch.nn.Parameter)
    if leaf in CORRECTION_BIASES:
        values = torch.rand(tensor.shape, generator=generator) * 0.2
    elif leaf in EXPERT_SCALES:
        values = torch.rand(tensor.shape, generator=generator) + 0.5
    elif leaf == "tid2eid":
        values = torch.rand(len(tensor), COMMON["num_experts"], generator=generator)
        values = values.topk(tensor.shape[-1]).indices
    elif leaf in KEPT or not trained:
        return
    elif tensor.ndim >= 2:
        values = torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5
    elif leaf.endswith("bias"):
        values = torch.randn(tensor.shape, generator=generator) * 0.1
    else:
        return
    tensor.copy_(values)


def tiny_inputs(
    model_type: str, model: PreTrainedModel, batch: int = 2, length: int = 9
) -> dict[str, torch.Tensor]:
    """Random forward arguments, `input_ids` [batch, length] and what else the family needs."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (batch, length), generator=generator)
    return inputs


def supports_generate(model_type: str) -> bool:
    """Whether `model.generate(input_ids)` works for the family."""
    return ROWS[model_type].generate
