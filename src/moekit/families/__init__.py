"""Adapters for the MoE families whose experts are not called at the seam."""

from __future__ import annotations

from .dbrx import DbrxAdapter
from .doge import DogeAdapter
from .jetmoe import JetMoeAdapter
from .llama4 import Llama4Adapter
from .longcat_flash import LongcatFlashAdapter
from .nllb_moe import NllbMoeAdapter
from .switch_transformers import SwitchTransformersAdapter
from .vitpose_backbone import VitPoseBackboneAdapter

ADAPTERS = (
    DbrxAdapter,
    DogeAdapter,
    JetMoeAdapter,
    Llama4Adapter,
    LongcatFlashAdapter,
    NllbMoeAdapter,
    SwitchTransformersAdapter,
    VitPoseBackboneAdapter,
)
