"""Layers of the MoE families whose experts are not called at the seam.

Each is a `MoELayer` that translates its family's calls to hidden, ids and weights.
"""

from __future__ import annotations

from .dbrx import DbrxLayer
from .doge import DogeLayer
from .jetmoe import JetMoeLayer
from .llama4 import Llama4Layer
from .longcat_flash import LongcatFlashLayer
from .moekit_layers import MoekitLayer
from .nllb_moe import NllbMoeLayer
from .switch_transformers import SwitchTransformersLayer
from .vitpose_backbone import VitPoseBackboneLayer

ADAPTERS = (
    DbrxLayer,
    DogeLayer,
    JetMoeLayer,
    Llama4Layer,
    LongcatFlashLayer,
    MoekitLayer,
    NllbMoeLayer,
    SwitchTransformersLayer,
    VitPoseBackboneLayer,
)
