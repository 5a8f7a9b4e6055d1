"""Golden files of merging: tiny checkpoints merged by mergekit, for `tests/merge/test_golden.py`.

    python benchmarks/merge_golden.py --mergekit VENV/bin/python

mergekit (0.1.5 made the files) lies in an environment of its own. Each file under
`tests/merge/golden` has the models of one family and dtype as `in/MODEL/TENSOR` and what mergekit
made of them as `out/RECIPE/TENSOR`, in mergekit's own names and layout.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

GOLDEN = Path(__file__).parents[1] / "tests" / "merge" / "golden"
DTYPES = ("float32", "bfloat16")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 12},
    "qwen2": {"hidden_size": 8},
    "mixtral": {"hidden_size": 8, "intermediate_size": 8, "num_local_experts": 4},
}
SMALL = {
    "vocab_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
MODELS = ("base", "a", "b", "c")
# Run inside mergekit's environment: one process for all recipes, as importing takes longest.
DRIVER = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
for path in sys.argv[1:]:
    recipe = MergeConfiguration.model_validate(yaml.safe_load(open(path)))
    run_merge(recipe, path.removesuffix(".yaml"), options)
"""


def of(*names: str, **parameters: list[Any]) -> list[dict[str, Any]]:
    """Models of a recipe with a value of each parameter."""
    return [
        {"model": name, "parameters": {key: values[i] for key, values in parameters.items()}}
        for i, name in enumerate(names)
    ]


THREE = ("a", "b", "c")
WEIGHTS = {"weight": [0.5, 0.3, 0.4]}
SHARES = {**WEIGHTS, "density": [0.5, 0.6, 0.7]}
STACKED = [
    {"sources": [{"model": "a", "layer_range": [0, 2]}]},
    {"sources": [{"model": "b", "layer_range": [1, 2]}]},
]
PATH = [
    {
        "sources": [
            {"model": "a", "layer_range": [0, 2]},
            {"model": "b", "layer_range": [0, 2]},
        ],
        "parameters": {"t": [{"filter": "self_attn", "value": [0.2, 0.8]}, {"value": 0.4}]},
    }
]
GRADIENT = [
    {"model": "a", "parameters": {"weight": [0.2, 0.8], "density": 0.5}},
    {
        "model": "b",
        "parameters": {"weight": [{"filter": "mlp", "value": 0.7}, {"value": 0.3}], "density": 0.3},
    },
]

# recipe -> what it says besides the dtype
RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"models": of(*THREE, **WEIGHTS)},
    "task_arithmetic": {"base_model": "base", "models": of(*THREE, **WEIGHTS)},
    "ties": {"base_model": "base", "models": of(*THREE, **SHARES)},
    "ties-rescaled": {
        "base_model": "base",
        "models": of(*THREE, **SHARES),
        "parameters": {"rescale": True, "normalize": False, "lambda": 0.7},
    },
    "ties-one": {"base_model": "base", "models": of("a", weight=[1.0], density=[0.4])},
    "ties-gradient": {
        "base_model": "base",
        "models": GRADIENT,
        "parameters": {"normalize": True, "lambda": 1.0, "int8_mask": True},
    },
    "breadcrumbs": {
        "base_model": "base",
        "models": of(*THREE, **SHARES, gamma=[0.02, 0.05, 0.1]),
    },
    "breadcrumbs_ties": {
        "base_model": "base",
        "models": of(*THREE, **SHARES, gamma=[0.02, 0.05, 0.1]),
    },
    "slerp": {"base_model": "base", "models": of("base", "a"), "parameters": {"t": 0.3}},
    "slerp-slices": {"base_model": "a", "slices": PATH},
    "nuslerp": {"models": of("a", "b", weight=[0.5, 0.3])},
    "nuslerp-rows": {
        "base_model": "base",
        "models": of("a", "b", weight=[0.5, 0.3]),
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "multislerp": {"models": of(*THREE, **WEIGHTS)},
    "multislerp-base": {"base_model": "base", "models": of(*THREE, **WEIGHTS)},
    "karcher": {"models": of(*THREE)},
    "model_stock": {"base_model": "base", "models": of(*THREE)},
    "model_stock-rows": {
        "base_model": "base",
        "models": of(*THREE),
        "parameters": {"filter_wise": True},
    },
    "sce": {"base_model": "base", "models": of(*THREE), "parameters": {"select_topk": 0.5}},
    "nearswap": {"base_model": "base", "models": of("base", "a"), "parameters": {"t": 0.01}},
    "passthrough": {"models": of("a")},
    "passthrough-slices": {"slices": STACKED},
    "ram": {"base_model": "base", "models": of(*THREE)},
    "ramplus_tl": {"base_model": "base", "models": of(*THREE)},
}
# The smallest set that meets every kind of arithmetic, where files would grow without it.
FEW = ("linear", "ties", "ties-one", "breadcrumbs", "slerp", "model_stock", "sce", "ramplus_tl")


def recipe_of(name: str, dtype: str, root: Path) -> dict[str, Any]:
    """A complete recipe whose models are directories of `root`."""
    method = name.partition("-")[0]
    return {"merge_method": method, "dtype": dtype, **placed(RECIPES[name], root)}


def placed(value: Any, root: Path) -> Any:
    """A recipe, or a part of one, with its models as directories of `root`."""
    if isinstance(value, list):
        return [placed(one, root) for one in value]
    if isinstance(value, dict):
        at = {"model", "base_model"}
        return {k: str(root / v) if k in at else placed(v, root) for k, v in value.items()}
    return value


def write_models(family: str, dtype: str, root: Path) -> None:
    """The base and three models that moved away from it, each in a part of its entries."""
    config = CONFIG_MAPPING[family](**{**SMALL, **FAMILIES[family]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number, name in enumerate(MODELS):
        draw = torch.Generator().manual_seed(number)
        for key, tensor in state.items():
            moved = torch.rand(tensor.shape, generator=draw) < 0.7
            change = 0.01 * number * torch.randn(tensor.shape, generator=draw) * moved
            model.state_dict()[key].copy_((tensor.float() + change).to(tensor.dtype))
        model.save_pretrained(root / name)


def recipes_for(family: str, dtype: str) -> list[str]:
    if family == "llama":
        return list(RECIPES)
    if dtype == "bfloat16":
        return list(FEW)
    # Qwen's config lists its layers' types, and mergekit keeps the old list for more layers.
    return [name for name in RECIPES if family != "qwen2" or name != "passthrough-slices"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", type=Path, required=True, help="Python that has mergekit")
    python = parser.parse_args().mergekit
    GOLDEN.mkdir(exist_ok=True)
    for family in FAMILIES:
        for dtype in DTYPES:
            with tempfile.TemporaryDirectory() as scratch:
                root = Path(scratch)
                write_models(family, dtype, root)
                paths = []
                for name in recipes_for(family, dtype):
                    path = root / f"{name}.yaml"
                    path.write_text(yaml.safe_dump(recipe_of(name, dtype, root)))
                    paths.append(path)
                subprocess.run([python, "-c", DRIVER, *paths], check=True)
                found = {
                    f"in/{name}/{key}": tensor
                    for name in MODELS
                    for key, tensor in load_file(root / name / "model.safetensors").items()
                }
                for path in paths:
                    for file in sorted(path.with_suffix("").glob("*.safetensors")):
                        for key, tensor in load_file(file).items():
                            found[f"out/{path.stem}/{key}"] = tensor
                save_file(found, GOLDEN / f"{family}-{dtype}.safetensors")
                config = json.loads((root / "base" / "config.json").read_text())
                (GOLDEN / f"{family}-{dtype}.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    main()
