"""The rows of the table of routers: recipes of equal active compute, and what papers say of them.

Every recipe sends a token through FFN experts of 96 neurons a layer, as the dense twin does,
unless its name says otherwise. Routers that read what text does not have (noise levels, modalities,
classes) are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

EXPERTS, TOP_K, EXPERT_WIDTH = 16, 2, 48
# Steps of a run of a million tokens; schedules of routers are given as parts of it.
STEPS = 245


@dataclass(frozen=True)
class Case:
    """A model's `moe` section (None: dense) and the losses beside it. `causal` is False where a
    token's route reads later tokens: such a loss is no likelihood and is only shown."""

    name: str
    moe: dict[str, Any] | None
    balance: dict[str, Any] = field(default_factory=lambda: {"rule": "none"})
    causal: bool = True


def bank(kind: str = "swiglu", count: int = EXPERTS, **options: Any) -> dict[str, Any]:
    if kind not in ("zero", "copy", "constant", "linear"):
        options = {"expert_width": EXPERT_WIDTH, **options}
    return {"type": kind, "count": count, **options}


def moe(router: str, top_k: int = TOP_K, experts: Any = None, **more: Any) -> dict[str, Any]:
    """A `moe` section; options of the router are those of `more` that `layer_recipe` has not."""
    sections = {k: more.pop(k) for k in ("shared", "layers", "share_pool", "rounds") if k in more}
    return {
        "router": {"name": router, **more},
        "top_k": top_k,
        "experts": experts or bank(),
        **sections,
    }


def losses(*listed: dict[str, Any]) -> dict[str, Any]:
    return {"rule": "none", "losses": list(listed)}


def switch_loss(weight: float = 0.01, **more: Any) -> dict[str, Any]:
    return {"name": "balance-loss", "weight": weight, **more}


AUX = losses(switch_loss())
# As many experts as three layers have of their own.
POOL = bank(count=3 * EXPERTS)
GROWING = {"start": STEPS // 10, "end": STEPS // 3}
BASE = moe("softmax-renormalised")

CASES = [
    Case("dense", None),
    # Plain top-k, and the controls.
    Case("top-k, no balance", BASE),
    Case("top-k", BASE, AUX),
    Case("top-k, raw weights", moe("softmax-raw"), AUX),
    Case("random routes", moe("random")),
    Case("hash", moe("hash")),
    # Balance rules on the same router.
    *(
        Case(f"top-k, loss over {scope}", BASE, losses(switch_loss(scope=scope)))
        for scope in ("sequence", "global")
    ),
    Case("top-k, loss x 0.1", BASE, losses(switch_loss(0.001))),
    Case("top-k, loss x 10", BASE, losses(switch_loss(0.1))),
    Case("top-k, z-loss too", BASE, losses(switch_loss(), {"name": "z-loss", "weight": 0.001})),
    Case("top-k, first choices", BASE, losses({"name": "first-choice-loss", "weight": 0.01})),
    Case("top-k, importance", BASE, losses({"name": "importance-loss", "weight": 0.01})),
    Case("top-k, top-1 loss", BASE, losses({"name": "top1-loss", "weight": 0.01})),
    Case("top-k, coupling too", BASE, losses(switch_loss(), {"name": "coupling", "weight": 1.0})),
    Case("top-k, mutual information", BASE, losses({"name": "mutual-information", "weight": 0.01})),
    Case("loss-free", moe("loss-free")),
    Case("loss-free, proportional", moe("loss-free", bias_rule="proportional")),
    Case("sigmoid, loss", moe("loss-free", bias_rate=0.0), AUX),
    # Selection.
    Case("switch, top-1 of 16 x 96", moe("switch", 1, bank(expert_width=96)), AUX),
    Case("top-1 of 16 x 96", moe("softmax-raw", 1, bank(expert_width=96)), AUX),
    Case("gshard", moe("gshard"), AUX),
    Case("expert choice", moe("expert-choice"), causal=False),
    Case("deepseek-v2, 2 of 4 groups", moe("deepseek-v2", groups=4, keep_groups=2), AUX),
    Case("deepseek-v3, 2 of 4 groups", moe("deepseek-v3", groups=4, keep_groups=2, scale=1.0)),
    Case("moge, 2 groups", moe("moge", groups=2), AUX),
    Case("top-p 0.3", moe("top-p", 6, threshold=0.3), AUX),
    Case(
        "top-p 0.3, entropy",
        moe("top-p", 6, threshold=0.3),
        losses(switch_loss(), {"name": "entropy-loss", "weight": 1e-4}),
    ),
    Case("token rounding, tiles of 128", moe("token-rounding", tile=128), AUX, causal=False),
    Case(
        "moduleformer", moe("moduleformer"), losses({"name": "mutual-information", "weight": 0.01})
    ),
    # Experts that cost little or nothing.
    Case(
        "adamoe, 3 of 16 + 8",
        moe("adamoe", 3, [bank(), bank("zero", 8)], null=8),
        losses({"name": "null-mean-loss", "weight": 0.01}),
    ),
    Case(
        "moe++, 2 of 16 + 4",
        moe("moe++", 2, [bank(), bank("zero", 1), bank("copy", 1), bank("constant", 2)], null=0),
        losses({"name": "heterogeneous-loss", "weight": 0.01}),
    ),
    Case(
        "moe++, no residual",
        moe(
            "moe++",
            2,
            [bank(), bank("zero", 1), bank("copy", 1), bank("constant", 2)],
            residual="none",
        ),
        losses({"name": "heterogeneous-loss", "weight": 0.01}),
    ),
    # Across depth and tokens.
    Case("rmoe", moe("rmoe"), AUX),
    Case("graph of tokens", moe("graph-of-tokens"), AUX),
    Case("ssr", moe("ssr")),
    Case("thor", moe("thor")),
    Case("chain of 2 x 1", moe("softmax-raw", 1, rounds=2), AUX),
    Case("one pool of 48 for 3 layers", moe("softmax-raw", experts=POOL, share_pool=3), AUX),
    Case(
        "rexmoe, 16 to 48 of one pool",
        moe("rexmoe", experts=POOL, share_pool=3, candidates=16, **GROWING),
        AUX,
    ),
    # What the growing number of candidates does without a pool: the paper has no such control.
    Case("own experts, 8 to 16 of them", moe("rexmoe", candidates=8, **GROWING), AUX),
    Case("sigma, until 90 %", moe("progressive-sparsity", until=9 * STEPS // 10, early=[4]), AUX),
    Case("elastic", moe("elastic"), AUX),
    Case("emo", moe("emo", smallest_pool=8, largest_pool=16), AUX),
    Case("segments of 4", moe("segment"), AUX, causal=False),
    Case("segments of 4, delayed", moe("segment", delay=1), AUX),
    Case("chunks of 4, delayed", moe("chunk", delay=1), AUX),
    Case("uoe by sequence", moe("uoe-sequence"), causal=False),
    # Trees and product keys compute more than the others while they are soft.
    Case("comet", moe("comet"), losses({"name": "leaf-entropy", "weight": 0.01})),
    Case(
        "monet, 16 x 16 halves",
        moe("monet", 4, bank("monet-vertical", count=256, expert_width=16)),
        losses(
            {"name": "half-expert-uniformity", "weight": 1e-3},
            {"name": "half-expert-ambiguity", "weight": 1e-3},
        ),
    ),
    Case("local search", moe("local-search", steps=STEPS // 2), AUX),
    # Experts.
    Case("plain FFN of 72", moe("softmax-renormalised", experts=bank("ffn", expert_width=72)), AUX),
    Case("6 of 48 x 16", moe("softmax-renormalised", 6, bank(count=48, expert_width=16)), AUX),
    Case(
        "1 shared, 1 of 15",
        moe("softmax-raw", 1, bank(count=15), shared={"type": "swiglu", "expert_width": 48}),
        AUX,
    ),
    Case(
        "1 shared, 3 of 31 x 24",
        moe(
            "softmax-raw",
            3,
            bank(count=31, expert_width=24),
            shared={"type": "swiglu", "expert_width": 24},
        ),
        AUX,
    ),
    Case(
        "low-rank",
        moe("softmax-renormalised", experts=bank("low-rank", expert_width=96, latent_width=24)),
        AUX,
    ),
    Case(
        "latent", moe("softmax-renormalised", experts=bank("latent", group=4, latent_width=32)), AUX
    ),
    Case("ternary", moe("softmax-renormalised", experts=bank("ternary")), AUX),
    Case(
        "MoE in every second layer",
        moe("softmax-renormalised", layers={"first": 1, "every": 2}),
        AUX,
    ),
]

# What is said, by whom, and the (worse, better) rows that show it.
CLAIMS = [
    ("Sparse experts beat a dense model of equal compute", "Switch 2101.03961", "dense", "top-k"),
    ("Learned routes beat random ones", "THOR 2110.04260 says equal", "random routes", "top-k"),
    ("A balance loss beats none", "Switch 2101.03961", "top-k, no balance", "top-k"),
    ("Loss-free balancing beats the loss", "2408.15664", "sigmoid, loss", "loss-free"),
    (
        "Balancing over the global batch beats over a sequence",
        "Demons in the Detail 2501.11873",
        "top-k, loss over sequence",
        "top-k, loss over global",
    ),
    ("z-loss does no harm", "ST-MoE 2202.08906", "top-k", "top-k, z-loss too"),
    ("Coupling experts and routers helps", "ERC 2512.23447", "top-k", "top-k, coupling too"),
    (
        "Top-2 beats top-1 at equal compute",
        "GShard 2006.16668",
        "top-1 of 16 x 96",
        "top-k, raw weights",
    ),
    ("Expert choice beats token choice", "2202.09368", "top-k", "expert choice"),
    ("Hash routing beats learned top-1", "2106.04426", "top-1 of 16 x 96", "hash"),
    (
        "Groups of equal quota cost nothing",
        "MoGE 2505.21411",
        "top-k, raw weights",
        "moge, 2 groups",
    ),
    ("A threshold beats a fixed number", "2403.07652", "top-k, raw weights", "top-p 0.3, entropy"),
    ("Null experts beat plain top-k", "AdaMoE 2406.13233", "top-k", "adamoe, 3 of 16 + 8"),
    (
        "Zero-computation experts beat plain top-k",
        "MoE++ 2410.07348",
        "top-k, raw weights",
        "moe++, 2 of 16 + 4",
    ),
    ("Gating residuals help", "MoE++ 2410.07348", "moe++, no residual", "moe++, 2 of 16 + 4"),
    ("A recurrent router beats a linear one", "RMoE 2408.06793", "top-k", "rmoe"),
    ("Routing by similar tokens helps", "2505.00792", "top-k", "graph of tokens"),
    ("Sinkhorn steps replace the loss", "SSR 2511.08972", "top-k", "ssr"),
    (
        "A chain of experts beats parallel ones",
        "CoE 2506.18945",
        "top-k, raw weights",
        "chain of 2 x 1",
    ),
    (
        "Experts reused over layers beat own ones",
        "ReXMoE 2510.17483",
        "top-k, raw weights",
        "rexmoe, 16 to 48 of one pool",
    ),
    (
        "Growing candidates help a pool",
        "ReXMoE 2510.17483",
        "one pool of 48 for 3 layers",
        "rexmoe, 16 to 48 of one pool",
    ),
    (
        "Growing candidates help without a pool",
        "control of ReXMoE",
        "top-k, raw weights",
        "own experts, 8 to 16 of them",
    ),
    (
        "Rounding to tiles costs nothing",
        "SonicMoE 2512.14080",
        "top-k",
        "token rounding, tiles of 128",
    ),
    ("Fine experts beat coarse ones", "DeepSeekMoE 2401.06066", "top-k", "6 of 48 x 16"),
    ("A shared expert helps", "DeepSeekMoE 2401.06066", "top-k, raw weights", "1 shared, 1 of 15"),
    ("Trees beat top-k", "COMET KDD 2023", "top-k", "comet"),
    ("Local search helps", "COMET KDD 2023", "top-k", "local search"),
    (
        "An MLP router with mutual information helps",
        "ModuleFormer 2306.04640",
        "top-k",
        "moduleformer",
    ),
    (
        "Segments route better than tokens",
        "Seg-MoE 2601.21641 (time series)",
        "top-k",
        "segments of 4, delayed",
    ),
]
