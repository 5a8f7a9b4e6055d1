"""Read-ME: a dense model cut into domain experts by what is active, with a router in front of all.

Shapes: T tokens, D width, F neurons, E experts (one a domain), L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moekit.core.deferred import Deferred
from moekit.core.errors import UserError
from moekit.core.seeds import derive_seed
from moekit.upcycle.check_start import in_memory
from moekit.upcycle.converter import Job, Made, upcycler
from moekit.upcycle.domain_texts import texts_by_domain, tokenizer_of, windows_of
from moekit.upcycle.ffn import PARTS, constant
from moekit.upcycle.model.blocks import mlp_blocks
from moekit.upcycle.model.config import experts_config
from moekit.upcycle.model.pre_gated import PreGatingRouter
from moekit.upcycle.short_training import (
    batches_of,
    freeze,
    next_token_loss,
    train_parts,
    trained,
)
from moekit.upcycle.start import Start
from moekit.upcycle.upcycled import LOADS_HERE, PREFIX, below_base, config_of

LENGTH, BATCH, WINDOWS = 128, 8, 1000
# Levels of activity that count towards an expert (five), the soft part of the loss, smoothing.
LEVELS, SOFT, SMOOTHING, SHARPNESS = 5, 0.25, 0.5, 10.0
BACKBONE_FALL = 0.8
# Rows of grouped products begin at multiples of 16 bytes.
MULTIPLE = 8


@dataclass(frozen=True)
class Slices:
    """The neurons of one layer: those of all experts, and each expert's own ones."""

    shared: Tensor
    own: tuple[Tensor, ...]

    @property
    def masks(self) -> tuple[Tensor, ...]:
        """The neurons of each expert, the shared ones among them."""
        return tuple(torch.cat([self.shared, own]) for own in self.own)


def slices_of(activity: Tensor, ratio: float) -> Slices:
    """Slices by the mean activity [E, F] of the neurons on each domain's text.

    An expert has the `ratio` most active neurons; the published code's strict comparison with the
    least of them keeps one fewer.
    """
    count = max(1, round(ratio * activity.shape[1]))
    mask = torch.zeros_like(activity, dtype=torch.bool)
    mask.scatter_(1, activity.topk(count, dim=1).indices, True)
    common = mask.all(0)
    own = tuple((row & ~common).nonzero().flatten() for row in mask)
    return Slices(common.nonzero().flatten(), own)


@upcycler(
    "read-me",
    title="Domain experts of the most active neurons, chosen for all layers before the first",
    paper="Read-ME 2410.19123",
    needs=("weights", "data", "training"),
    limits="Loads through moekit. One expert for each domain of --data.",
    options={
        "ratio": "share of the neurons that an expert has, the shared ones among them",
        "router_width": "width of the router, a causal transformer on token embeddings",
        "router_layers": "layers of it",
        "rounds": "of training: the router by distillation, then the backbone on the text",
        "router_steps": "steps of the router in a round",
        "backbone_steps": "steps of the backbone in a round; 0 leaves it as it was cut",
        "router_rate": "learning rate of the router",
        "backbone_rate": "learning rate of the backbone, which falls with every round",
    },
)
def read_me(
    job: Job,
    *,
    ratio: float = 0.5,
    router_width: int = 128,
    router_layers: int = 1,
    rounds: int = 1,
    router_steps: int = 100,
    backbone_steps: int = 0,
    router_rate: float = 1e-3,
    backbone_rate: float = 1e-5,
) -> Made:
    """The cut model and its router; `UserError` for fewer than two domains of text."""
    job.need_dense()
    job.need_alone()
    if not 0 < ratio <= 1:
        raise UserError(f"ratio is {ratio}; it is a share of the neurons, above 0 and up to 1.")
    if router_width < 2 or router_width % 2 or (router_width > 32 and router_width % 32):
        raise UserError(f"router_width is {router_width}; above 32 it is a multiple of 32.")
    texts = texts_by_domain(job)
    if len(texts) < 2:
        raise UserError(
            f"--data has the domains {', '.join(texts)}; each expert is one, of 2 or more."
        )
    tokenizer = tokenizer_of(job.base)
    windows = [
        windows_of(tokenizer, docs, LENGTH + 1, WINDOWS, job.seed) for docs in texts.values()
    ]
    dense: Any = in_memory(job.base.config, job.base.tensors)
    cut = [slices_of(activity, ratio) for activity in measured_activity(dense, windows)]
    width = max(len(own) for layer in cut for own in layer.own)
    width = max(MULTIPLE, -(-width // MULTIPLE) * MULTIPLE)
    config = config_of(
        job.base,
        "pre-gated",
        experts_config(job.base.config, len(texts), width),
        num_experts=len(texts),
        experts=list(texts),
        shared_width=[len(layer.shared) for layer in cut],
        router_width=router_width,
        router_layers=router_layers,
    )
    blocks = mlp_blocks(dense)
    made = below_base(job.base.tensors, [block.path for block in blocks])
    for block, layer in zip(blocks, cut, strict=True):
        made |= _block(job, block.path, layer, width)
    made |= _new_router(job, config)
    model = in_memory(config, made)
    losses: list[float] = []
    batches = batches_of(torch.cat(windows), BATCH, job.seed)
    backbone = [name for name in made if name.startswith(PREFIX)]
    for turn in range(0 if job.dry_run else rounds):
        losses += _teach(model, dense, cut, batches, router_steps, router_rate)
        if backbone_steps:
            _adapt(model, backbone, batches, backbone_steps, backbone_rate * BACKBONE_FALL**turn)
    names = [name for name in made if not name.startswith(PREFIX)]
    made = trained(made, model, names + (backbone if backbone_steps else []))
    start = Start.not_equal(
        f"of every FFN a token has the {ratio:g} most active neurons of one domain; with ratio=1 "
        "it is the source whatever the router says."
    )
    numbers = {
        "router_loss": losses[-1] if losses else None,
        "shared_width": [len(layer.shared) for layer in cut],
        "own_width": [[len(own) for own in layer.own] for layer in cut],
    }
    return Made(config, made, start, [LOADS_HERE], numbers)


@torch.no_grad()
def measured_activity(dense: Any, windows: Sequence[Tensor]) -> list[Tensor]:
    """Mean absolute input of each layer's down projection [E, F], on the windows of each domain."""
    blocks = mlp_blocks(dense)
    found = [[torch.zeros(()) for _ in windows] for _ in blocks]
    for domain, of_domain in enumerate(windows):
        handles = [
            block.module.down_proj.register_forward_pre_hook(_add_into(sums, domain))
            for block, sums in zip(blocks, found, strict=True)
        ]
        for batch in of_domain[:128].split(BATCH):
            dense.base_model(input_ids=batch, use_cache=False)
        for handle in handles:
            handle.remove()
    return [torch.stack(sums) for sums in found]


def _add_into(sums: list[Tensor], place: int) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sums[place] = sums[place] + args[0].abs().sum((0, 1))

    return hook


def _block(job: Job, path: str, cut: Slices, width: int) -> dict[str, Deferred]:
    """The slices of one FFN; own ones are filled up with neurons that add nothing."""
    tensors: Any = job.base.tensors
    gate, up, down = (tensors[f"{path}.{part}_proj.weight"] for part in PARTS)
    columns = int(gate.shape[1])

    def rows(matrix: Any, chosen: Tensor) -> Any:
        empty: Any = constant(torch.zeros(width - len(chosen), columns, dtype=gate.dtype))
        return torch.cat([matrix.index_select(0, chosen), empty])

    def ends(chosen: Tensor) -> Any:
        empty: Any = constant(torch.zeros(columns, width - len(chosen), dtype=down.dtype))
        return torch.cat([down.index_select(1, chosen), empty], 1)

    own = f"{PREFIX}{path}"
    made: dict[str, Any] = {
        f"{own}.experts.gate_up_proj": torch.stack(
            [torch.cat([rows(gate, chosen), rows(up, chosen)]) for chosen in cut.own]
        ),
        f"{own}.experts.down_proj": torch.stack([ends(chosen) for chosen in cut.own]),
    }
    if len(cut.shared):
        made |= {
            f"{own}.shared_expert.gate_proj.weight": gate.index_select(0, cut.shared),
            f"{own}.shared_expert.up_proj.weight": up.index_select(0, cut.shared),
            f"{own}.shared_expert.down_proj.weight": down.index_select(1, cut.shared),
        }
    return made


def _new_router(job: Job, config: Any) -> dict[str, Deferred]:
    part = config.part
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(job.seed, "pre-gating router"))
        router = PreGatingRouter(
            config.text_config, part["num_experts"], part["router_width"], part["router_layers"]
        )
    dtype = next(iter(job.base.tensors.values())).dtype
    return {
        f"part.router.{name}": constant(tensor.detach().to(dtype))
        for name, tensor in router.state_dict().items()
    }


def _teach(
    model: Any, dense: Any, cut: Sequence[Slices], batches: Any, steps: int, rate: float
) -> list[float]:
    """Teach the router by which experts hold the neurons that the dense model makes active."""
    freeze(model)
    seen: list[Tensor] = []
    handles = [
        block.module.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for block in mlp_blocks(dense)
    ]
    router = model.part.router

    def loss_of(batch: Tensor) -> Tensor:
        ids = batch[:, :-1]
        seen.clear()
        with torch.no_grad():
            dense.base_model(input_ids=ids, use_cache=False)
            teachers = [
                teacher_of(active.flatten(0, 1), layer)
                for active, layer in zip(seen, cut, strict=True)
            ]
        logits = router(model.get_input_embeddings()(ids)).flatten(0, 1)
        losses = [distillation_loss(logits, teacher) for teacher in teachers]
        return torch.stack(losses).sum()

    losses = train_parts(list(router.parameters()), loss_of, batches, steps, rate)
    for handle in handles:
        handle.remove()
    return losses


def teacher_of(active: Tensor, cut: Slices) -> Tensor:
    """What each expert would hold of what is active: [T, E] for activations [T, F].

    A neuron counts once for each of five levels that it is above, the n-th, 4/5 n-th, ... largest,
    n being the size of the first expert; the sum over an expert's neurons, centred, times ten.
    """
    size = len(cut.masks[0])
    ranked = active.sort(-1, descending=True).values
    feature = torch.zeros_like(active)
    for level in range(1, LEVELS + 1):
        place = max(0, size * level // LEVELS - 1)
        feature += (active > ranked[:, place, None]).to(active.dtype)
    feature /= 3 * size
    held = torch.stack([feature[:, mask].sum(-1) for mask in cut.masks], -1)
    return SHARPNESS * (held - held.mean(-1, keepdim=True))


def distillation_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Three quarters the teacher's choice, smoothed, and one quarter all it says; both [T, E]."""
    hard = cross_entropy(logits, teacher.argmax(-1), label_smoothing=SMOOTHING)
    return (1 - SOFT) * hard + SOFT * cross_entropy(logits, teacher.softmax(-1))


def _adapt(model: nn.Module, names: Sequence[str], batches: Any, steps: int, rate: float) -> None:
    """Train the backbone on the text, the router as it is."""
    freeze(model)
    stored: Mapping[str, nn.Parameter] = dict(model.named_parameters())
    parameters = [stored[name] for name in names if name in stored]
    train_parts(parameters, lambda batch: next_token_loss(model, batch), batches, steps, rate)
