"""Which families of the installed transformers are MoE, found in its source text."""

from __future__ import annotations

from pathlib import Path

import transformers

# MoE without the decorator, so no scan can find them.
UNDECORATED = {
    "dbrx",
    "doge",
    "jetmoe",
    "llama4",
    "longcat_flash",
    "nllb_moe",
    "step3p7",
    "switch_transformers",
    "vitpose_backbone",
}


def decorated_families() -> set[str]:
    models = Path(transformers.__file__).parent / "models"
    return {
        file.parent.name
        for file in models.glob("*/modeling_*.py")
        if "@use_experts_implementation" in file.read_text(encoding="utf-8")
    }
