"""The published ways to turn one dense model into a MoE, as settings of one kernel."""

from __future__ import annotations

from moekit.upcycle.converter import preset
from moekit.upcycle.from_dense import dense_to_moe

WHOLE = {"slices": 1, "shared": 0.0, "shared_copies": 0, "partition": "contiguous"}
COPIES = {"reinit": 0.0, "shared": 0.0, "shared_copies": 0, "partition": "contiguous"}

preset(
    dense_to_moe,
    "sparse",
    title="Every expert a copy of the dense network",
    paper="Sparse Upcycling 2212.05055",
    needs=("weights",),
    settings={**WHOLE, "reinit": 0.0},
)
preset(
    dense_to_moe,
    "drop",
    title="Copies of which every expert has a share of its neurons drawn anew",
    paper="Drop-Upcycling 2502.19261",
    needs=("weights",),
    settings=WHOLE,
    defaults={"reinit": 0.5},
)
preset(
    dense_to_moe,
    "virtual-groups",
    title="Slices of copies; those of a copy share a router row and are chosen together",
    paper="Upcycling LLMs into MoE 2410.07524",
    needs=("weights",),
    settings=COPIES,
    defaults={"experts": 64, "top_k": 8, "slices": 8},
)
preset(
    dense_to_moe,
    "dynamic-dino",
    title="Copies cut in two, one copy for a token",
    paper="Dynamic-DINO 2507.17436",
    needs=("weights",),
    settings=COPIES,
    defaults={"experts": 32, "top_k": 2, "slices": 2},
)
preset(
    dense_to_moe,
    "deepseek-moe",
    title="Fine experts beside a shared expert that holds a part of the neurons",
    paper="DeepSeekMoE 2401.06066",
    needs=("weights",),
    settings={"shared_copies": 0},
    defaults={"experts": 12, "top_k": 3, "slices": 3, "shared": 0.25, "partition": "snake"},
)
preset(
    dense_to_moe,
    "shared-copy",
    title="Copies beside one whole copy as a shared expert, scaled to the same output",
    paper="SpikingBrain 2509.05276",
    needs=("weights",),
    settings={"slices": 1, "shared": 0.0, "partition": "contiguous"},
    defaults={"experts": 16, "top_k": 1, "shared_copies": 1},
)
preset(
    dense_to_moe,
    "split",
    title="The neurons of one network dealt to experts, of which a token is given some",
    paper="LLaMA-MoE 2406.16554",
    needs=("weights",),
    settings={"shared_copies": 0},
    defaults={"experts": 8, "top_k": 4, "slices": 8, "partition": "snake"},
)
preset(
    dense_to_moe,
    "moe-tuning",
    title="Copies in every second layer, of which only experts and routers are trained",
    paper="MoE-LLaVA 2401.15947",
    needs=("weights",),
    settings={**WHOLE, "reinit": 0.0},
    defaults={"experts": 4, "layers": "every-second"},
)
