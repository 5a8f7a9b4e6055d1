"""From a config to the model it describes, without weights: read, pick the class, build on meta."""

from __future__ import annotations

import copy
import difflib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto as auto

from moekit.core.errors import UserError
from moekit.core.uneven import LAYERS, graft_layers

# In order of preference where a config does not name its architecture.
_MAPPINGS = (
    auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    auto.MODEL_MAPPING,
    auto.MODEL_FOR_BACKBONE_MAPPING,
)


# Models that moekit itself computes: by model type, the module that registers their classes.
OWN_TYPES = {
    "moekit": "moekit.layers",
    "moekit_ensemble": "moekit.upcycle.ensemble",
    "moekit_upcycled": "moekit.upcycle.model",
}


def read_config(source: PretrainedConfig | Mapping[str, Any] | str | Path) -> PretrainedConfig:
    """Read a config object, a dict, a `config.json` or a directory that holds one.

    Only classes that transformers or moekit ship are used; code beside a checkpoint is never run.
    Raises `UserError` for a missing or broken file, an unknown `model_type` and invalid values.
    """
    if isinstance(source, PretrainedConfig):
        return source
    if isinstance(source, Mapping):
        values, where = dict(source), "the config"
    else:
        values, where = _read_json(Path(source))
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"{where} has no model_type, so the model family is unknown.")
    if model_type in OWN_TYPES:
        importlib.import_module(OWN_TYPES[model_type])
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING), n=3, cutoff=0.5)
        hint = f"nearest are {', '.join(near)}" if near else "no known name is similar"
        raise UserError(
            f"{where} has model_type {model_type!r}, which transformers "
            f"{transformers.__version__} does not know; {hint}. A newer transformers may know it."
        )
    try:
        # Infinity has a spelling of its own in the JSON that transformers writes.
        return CONFIG_MAPPING[model_type].from_dict(PretrainedConfig._decode_special_floats(values))
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where} is not a valid {model_type} config: {reason}") from error


def _read_json(path: Path) -> tuple[dict[str, Any], str]:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        held = "the directory has no config.json" if path.is_dir() else "no such file or directory"
        raise UserError(f"{path} is not a model: {held}.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds a JSON {type(values).__name__}, not a config object.")
    return values, str(file)


def architecture_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The model class that `config` names in `architectures`, else the one that generates text.

    Raises `UserError` where transformers has no model class for the config.
    """
    for name in config.architectures or ():
        named = getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, PreTrainedModel):
            return named
    # The whole model of a config with a text part is the one that also holds its other parts.
    whole = (
        (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,) if "text_config" in config.sub_configs else ()
    )
    for mapping in (*whole, *_MAPPINGS):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise UserError(
        f"transformers {transformers.__version__} has no model class for model_type "
        f"{config.model_type!r} (architectures: {config.architectures})."
    )


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build the model of `config` on the meta device: every shape and tie, no memory, no values.

    Layers that the config describes otherwise (`core.uneven`) are. Raises `UserError` where the
    values of the config do not fit together.
    """
    model = _meta_model(config)
    if hasattr(config, LAYERS):
        graft_layers(model, config, _meta_model)
    return model


def _meta_model(config: PretrainedConfig) -> PreTrainedModel:
    build = architecture_of(config)
    try:
        with torch.device("meta"), no_init_weights():
            model = build(copy.deepcopy(_part_for(build, config)))
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"the config of model_type {config.model_type!r} builds no {build.__name__}: {reason}"
        ) from error
    model.tie_weights()
    return model


def _part_for(build: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig:
    # A checkpoint of the text part alone may keep the config of the whole.
    if build.config_class is None or isinstance(config, build.config_class):
        return config
    text = config.get_text_config(decoder=True)
    return text if isinstance(text, build.config_class) else config
