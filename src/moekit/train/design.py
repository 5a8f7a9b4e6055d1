"""From a compute budget to a model: width, depth, experts, granularity and activation.

Compute, rate and batch follow the laws of `leverage`; the shape follows the design rules of the
same paper (Efficiency Leverage, arXiv 2507.17702): granularity 12, one shared expert in twelve from
1e20 FLOPs on and two below, attention 40 % of a layer, the first layer dense. Loss falls with ever
sparser models; accuracy in reasoning is best near 20 tokens a parameter (Optimal Sparsity, arXiv
2508.18672), so one design is named for each.

Letters: D width, F expert width, L layers, E experts, K chosen, S sequence length.
"""

from dataclasses import asdict, dataclass
from typing import Any

from moekit.core.errors import UserError

from .leverage import FITTED_FLOPS, Allocation, efficiency_leverage, moe_allocation

GRANULARITY = 12
ACTIVE = 12  # experts of a token, shared ones included
# F = D / 6 must be a multiple of 8, and heads are 64 wide in fours.
STEP = 192
WIDTH_A_LAYER = 96
SHARED_TURN = 1e20
BEST_TOKENS_A_PARAMETER = 20
BYTES_A_PARAMETER = 16  # fp32 weights, gradients and the two moments of AdamW


@dataclass(frozen=True)
class Design:
    """One model for the budget. `activation` is the share of experts a token uses; `leverage` how
    many times the compute a dense model of its loss would need; parameters are without embeddings
    and `training_bytes` those of weights, gradients and AdamW's moments in fp32."""

    activation: float
    leverage: float
    num_experts: int
    top_k: int
    shared: int
    width: int
    expert_width: int
    layers: int
    parameters: int
    active_parameters: int
    tokens_per_parameter: float
    training_bytes: int


@dataclass(frozen=True)
class Plan:
    """The designs from dense to sparse, what the budget buys, and what to beware of.

    `for_loss` and `for_reasoning` are places in `designs`.
    """

    flops: float
    allocation: Allocation
    designs: list[Design]
    for_loss: int
    for_reasoning: int
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan_for(flops: float, *, seq_len: int = 4096, max_bytes: float | None = None) -> Plan:
    """Designs for a training budget of `flops`, without those whose training state exceeds
    `max_bytes`.

    Raises UserError for a budget that buys no model of the smallest width, or where none fits.
    """
    if not flops > 0:
        raise UserError(f"--plan-for {flops:g}: give the training compute in FLOPs, such as 1e19.")
    bought = moe_allocation(flops)
    width = _width(bought.flops_per_token, seq_len)
    made = [_design(flops, bought, width, 2**power) for power in range(1, 8)]
    designs = [d for d in made if max_bytes is None or d.training_bytes <= max_bytes]
    if not designs:
        raise UserError(
            f"training the smallest of these models takes {made[0].training_bytes / 1e9:.1f} GB, "
            f"more than {(max_bytes or 0) / 1e9:.1f} GB; lower the budget or raise the memory."
        )
    distance = [abs(d.tokens_per_parameter - BEST_TOKENS_A_PARAMETER) for d in designs]
    sparsest = len(designs) - 1
    best = min(range(len(designs)), key=distance.__getitem__)
    warnings = _warnings(flops, seq_len, width, bought)
    return Plan(flops, bought, designs, sparsest, best, warnings)


def _layer_parameters(width: int, experts: int) -> int:
    """Attention and so many experts of one layer; the router is left out as the law does."""
    return 4 * width**2 + experts * 3 * width * (2 * width // GRANULARITY)


def _layers(width: int) -> int:
    return max(2, round(width / WIDTH_A_LAYER))


def _flops_per_token(width: int, seq_len: int) -> float:
    """Forward and backward: 6 a parameter, and 6 D S for causal attention in every layer."""
    return _layers(width) * (6 * _layer_parameters(width, ACTIVE) + 6 * width * seq_len)


def _width(flops_per_token: float, seq_len: int) -> int:
    """The width whose model comes nearest to the compute a token."""
    width = STEP
    while _flops_per_token(width + STEP, seq_len) <= flops_per_token:
        width += STEP
    low, high = _flops_per_token(width, seq_len), _flops_per_token(width + STEP, seq_len)
    return width if flops_per_token / low <= high / flops_per_token else width + STEP


def _design(flops: float, bought: Allocation, width: int, sparsity: int) -> Design:
    experts, layers = ACTIVE * sparsity, _layers(width)
    shared = 2 if flops < SHARED_TURN else 1
    active = layers * _layer_parameters(width, ACTIVE)
    dense = _layer_parameters(width, ACTIVE)
    parameters = dense + (layers - 1) * _layer_parameters(width, experts)
    return Design(
        activation=1 / sparsity,
        leverage=efficiency_leverage(1 / sparsity, GRANULARITY, flops),
        num_experts=experts - shared,
        top_k=ACTIVE - shared,
        shared=shared,
        width=width,
        expert_width=2 * width // GRANULARITY,
        layers=layers,
        parameters=parameters,
        active_parameters=active,
        tokens_per_parameter=bought.tokens / parameters,
        training_bytes=parameters * BYTES_A_PARAMETER,
    )


def _warnings(flops: float, seq_len: int, width: int, bought: Allocation) -> list[str]:
    low, high = FITTED_FLOPS
    found = []
    if not low <= flops <= high:
        found.append(
            f"{flops:.0e} FLOPs lie outside of {low:.0e} to {high:.0e}, where laws were fitted; "
            "the paper checked the leverage at one point beyond, near 1e22"
        )
    miss = _flops_per_token(width, seq_len) / bought.flops_per_token
    if not 0.7 <= miss <= 1.4:
        found.append(
            f"the nearest width, {width}, costs {miss:.2f} times the optimal compute a token"
        )
    found.append(
        "the leverage is in loss; reasoning accuracy falls again in models too sparse, which the "
        "tokens a parameter show, though not in models of a few million active parameters"
    )
    return found


def recipe_of(plan: Plan, place: int, name: str, seq_len: int = 4096) -> dict[str, Any]:
    """The recipe, for `moekit train`, of the design at `place`."""
    design, bought = plan.designs[place], plan.allocation
    expert = {"type": "swiglu", "expert_width": design.expert_width}
    windows = max(1, round(bought.batch_tokens / seq_len))
    return {
        "name": name,
        "model": {
            "model_type": "moekit",
            "hidden_size": design.width,
            "intermediate_size": ACTIVE * design.expert_width,
            "num_hidden_layers": design.layers,
            "num_attention_heads": design.width // 64,
            "head_dim": 64,
            "max_position_embeddings": seq_len,
            "moe": {
                "router": "softmax-renormalised",
                "top_k": design.top_k,
                "experts": {**expert, "count": design.num_experts},
                "shared": {"type": "swiglu", "expert_width": design.shared * design.expert_width},
                "layers": {"first": 1},
            },
        },
        "optim": {"name": "adamw", "lr": float(f"{bought.learning_rate:.3g}")},
        "balance": {"rule": "loss", "coefficient": 0.01, "scope": "global", "z_loss": 0.001},
        "train": {
            "tokens": round(bought.tokens),
            "seq_len": seq_len,
            "batch_windows": windows,
            "micro_windows": 1,
        },
    }
