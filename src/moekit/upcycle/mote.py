"""MoTE: ternary experts beside the dense FFN, trained a little, and packed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from moekit.core.architecture import meta_model
from moekit.core.deferred import Deferred
from moekit.core.errors import UserError
from moekit.upcycle.check_start import in_memory
from moekit.upcycle.converter import Job, Made, upcycler
from moekit.upcycle.domain_texts import all_texts, tokenizer_of, windows_of
from moekit.upcycle.ffn import PARTS, constant, mapped
from moekit.upcycle.layer_choice import CHOICES, chosen_layers
from moekit.upcycle.model.blocks import mlp_blocks
from moekit.upcycle.model.config import experts_config
from moekit.upcycle.model.ternary import TernaryBlock, pack_matrices
from moekit.upcycle.routers import ROUTERS, initial_rows
from moekit.upcycle.short_training import (
    batches_of,
    freeze,
    next_token_loss,
    train_parts,
    trained,
)
from moekit.upcycle.start import ROUNDING, SOURCE, Start
from moekit.upcycle.upcycled import LOADS_HERE, PREFIX, below_base, config_of, part_of

LENGTH, BATCH, WINDOWS = 128, 8, 4000
# Scales are kept in the model's number format; codes are exact.
PACKED_SHORT = 2.0**-6


@upcycler(
    "mote",
    title="Ternary experts beside the dense FFN, which stays",
    paper="MoTE 2506.14435",
    needs=("weights", "data", "training"),
    limits="Loads through moekit. Helps from about 1.5B parameters on, by the paper.",
    options={
        "experts": "ternary experts a layer, of which a token is given one",
        "layers": f"which layers get experts: {CHOICES}",
        "router": f"{', '.join(ROUTERS)}: the router's rows",
        "preserve": "zero the experts' down projections, so that the model starts as the source",
        "steps": "of training experts and routers on --data",
        "learning_rate": "of experts and routers",
        "balance": "coefficient of the balance loss",
    },
)
def mote(
    job: Job,
    *,
    experts: int = 4,
    layers: str | int = "all",
    router: str = "random",
    preserve: bool = False,
    steps: int = 0,
    learning_rate: float = 2e-4,
    balance: float = 0.01,
) -> Made:
    """The dense model with experts that begin as copies of its FFNs and count as ternary."""
    job.need_dense()
    job.need_alone()
    if experts < 2:
        raise UserError(f"experts is {experts}; a router needs 2 or more to choose from.")
    if bool(job.data) != bool(steps):
        raise UserError("give both --data and mote:steps=, of training on it, or neither.")
    text: Any = job.base.config
    chosen = chosen_layers(str(layers), job.base.num_layers)
    bank = experts_config(text, experts, int(text.intermediate_size))
    config = config_of(job.base, "ternary", bank, layers=list(chosen))
    changed = [block for block in mlp_blocks(meta_model(text)) if block.index in chosen]
    made = below_base(job.base.tensors, [block.path for block in changed])
    for block in changed:
        made |= _block(job, block.path, block.index, experts, router, preserve)
    numbers: dict[str, Any] = {}
    if steps and not job.dry_run:
        losses, made = _train(job, config, made, steps, learning_rate, balance)
        numbers = {"first_loss": losses[0], "last_loss": losses[-1]}
    return Made(config, made, _start(preserve, steps), [LOADS_HERE], numbers)


def _block(
    job: Job, path: str, layer: int, experts: int, router: str, preserve: bool
) -> dict[str, Deferred]:
    """One layer: the dense FFN under its new name, the bank of copies, and the router."""
    tensors: Any = job.base.tensors
    of = {part: tensors[f"{path}.{part}_proj.weight"] for part in PARTS}
    dtype, width = of["down"].dtype, int(of["gate"].shape[1])
    gate_up: Any = torch.stack([torch.cat([of["gate"], of["up"]])] * experts)
    first: Any = mapped(of["down"], torch.zeros_like) if preserve else of["down"]
    down: Any = torch.stack([first] * experts)
    rows = initial_rows(router, experts, width, job.seed, layer).to(dtype)
    own = f"{PREFIX}{path}"
    return {
        **{f"{own}.shared_expert.{part}_proj.weight": tensor for part, tensor in of.items()},
        f"{own}.experts.gate_up_proj": gate_up,
        f"{own}.experts.down_proj": down,
        f"{own}.gate.weight": constant(rows),
    }


def _start(preserve: bool, steps: int) -> Start:
    if steps:
        return Start.not_equal("its experts and routers were trained.")
    if preserve:
        return Start.equal("the experts' down projections are zero, so they add nothing.")
    return Start.not_equal(
        "the likeliest expert, a ternary copy of the FFN, is added by its probability, about one "
        "in the number of experts; preserve=true begins as the source."
    )


def _train(
    job: Job,
    config: Any,
    tensors: dict[str, Deferred],
    steps: int,
    learning_rate: float,
    balance: float,
) -> tuple[list[float], dict[str, Deferred]]:
    """The losses, and the tensors with experts and routers as training left them."""
    model = in_memory(config, tensors)
    windows = windows_of(tokenizer_of(job.base), all_texts(job), LENGTH + 1, WINDOWS, job.seed)
    freeze(model)
    names: list[str] = []
    uneven: list[Tensor] = []
    for path, block in model.named_modules():
        if isinstance(block, TernaryBlock):
            block.gate.register_forward_hook(_balance_into(uneven))
            names += [f"{path}.gate.weight"]
            names += [f"{path}.experts.{n}" for n, _ in block.experts.named_parameters()]

    def loss_of(batch: Tensor) -> Tensor:
        uneven.clear()
        loss = next_token_loss(model, batch)
        return loss + balance * torch.stack(uneven).mean()

    parameters = [model.get_parameter(name) for name in names]
    batches = batches_of(windows, BATCH, job.seed)
    losses = train_parts(parameters, loss_of, batches, steps, learning_rate)
    return losses, trained(tensors, model, names)


def _balance_into(found: list[Tensor]) -> Any:
    """A hook on a router that puts Switch's loss there: one where all experts get alike."""

    def hook(module: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, _, ids = output
        load = torch.bincount(ids.flatten(), minlength=logits.shape[-1]) / ids.numel()
        found.append(logits.shape[-1] * (load * logits.float().softmax(-1).mean(0)).sum())

    return hook


@upcycler(
    "pack-ternary",
    title="MoTE's trained experts as five weights a byte and a scale a matrix",
    paper="MoTE 2506.14435",
    needs=("weights",),
    limits="Models made by mote. The packed experts are run, not trained.",
)
def pack_ternary(job: Job) -> Made:
    """The same model with its experts as codes; `UserError` where it has none to pack."""
    part = part_of(job, "ternary", "mote")
    if part.get("packed"):
        raise UserError(f"{job.base.name} is packed already.")
    config = copy.deepcopy(job.base.config)
    config.part["packed"] = True
    made: dict[str, Deferred] = {}
    for name, tensor in job.base.tensors.items():
        bank = name.rpartition(".")[2]
        if bank not in ("gate_up_proj", "down_proj"):
            made[name] = tensor
            continue
        codes, scales = pack_matrices(tensor.read().float(), 2 if bank == "gate_up_proj" else 1)
        made[f"{name}_codes"] = constant(codes)
        made[f"{name}_scale"] = constant(scales.to(tensor.dtype))
    short = any(t.dtype in (torch.bfloat16, torch.float16) for t in job.base.tensors.values())
    why = "three levels a weight are what its experts count as already."
    return Made(config, made, Start(SOURCE, why, PACKED_SHORT if short else ROUNDING), [LOADS_HERE])
