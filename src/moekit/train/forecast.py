"""What a run will need, told before it starts: parameters, FLOPs, bytes and seconds."""

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekit.core.find import find_moe
from moekit.core.forecast import Forecast
from moekit.core.spec import spec_from_config
from moekit.layers import MoekitForCausalLM

from .balance import balance_rules
from .model import build_model, planned_vocab, tap_routers
from .optim import build_optimizers
from .recipe import Recipe
from .step import build_losses, run_step

# fp32 weights and gradients, and two fp32 moments (AdamW) or one (Muon).
_BYTES_A_PARAMETER = {"adamw": 16, "muon": 12}


def active_parameters(model: Any) -> int:
    """Parameters that one token passes through, embedding tables and the output head left out.

    In moekit's layers as many experts as the router's `top_k`, of mean size: their load is even.
    """
    if not isinstance(model, MoekitForCausalLM):
        if find_moe(model):
            return spec_from_config(model.config).params.active_no_embedding
        return sum(param.numel() for param in model.parameters())
    ends = {id(module.weight) for module in (model.lm_head, model.get_input_embeddings())}
    experts = {id(p) for layer in model.moe_layers() for p in layer.pool.parameters()}
    total = sum(p.numel() for p in model.parameters() if id(p) not in ends | experts)
    recipes = [recipe for recipe in model.config.layer_recipes() if recipe is not None]
    for layer, recipe in zip(model.moe_layers(), recipes, strict=True):
        total += round(recipe.rounds.count * recipe.top_k * float(layer.pool.cost().mean()))
    return total


@dataclass
class Saved:
    """Bytes that graphs keep for the backward pass: `now`, and `most` at any time."""

    now: int = 0
    most: int = 0


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[Saved]:
    """Measure what backward passes keep in memory beside the parameters of `model`."""
    saved = Saved()
    own = {param.untyped_storage().data_ptr() for param in model.parameters()}
    uses: dict[int, int] = {}

    def drop(place: int, size: int) -> None:
        uses[place] -= 1
        if not uses[place]:
            saved.now -= size

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in own:
            return tensor
        kept = tensor.detach()
        if not uses.get(place):
            saved.now += size
            saved.most = max(saved.most, saved.now)
        uses[place] = uses.get(place, 0) + 1
        weakref.finalize(kept, drop, place, size)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


def forecast(recipe: Recipe, processes: int = 1) -> Forecast:
    """Size, FLOPs, bytes and time of a run; times one real micro-batch of random tokens.

    FLOPs are 6 * active parameters without the embedding table * tokens (forward and backward of
    every matrix product, attention scores left out). Seconds are those of this machine, with the
    recipe's kernels uncompiled, and count neither evaluation nor start-up. Activation bytes are
    what that micro-batch kept for its backward pass, on top of weights, gradients and optimiser.
    """
    vocab = planned_vocab(recipe)
    model = build_model(recipe, vocab, vocab - 1)
    vocab = model.config.vocab_size
    tap = tap_routers(model)
    total = sum(param.numel() for param in model.parameters())
    active = active_parameters(model)
    balance = balance_rules(recipe.balance, model.config, bool(tap.biases), tap.self_balanced)
    optimizers = build_optimizers(model, recipe.optim, tap.router_names, tap.fused_names)
    losses = build_losses(model, tap, balance, recipe.train, compiled=False)
    micro = recipe.train.micro_windows
    windows = torch.randint(vocab, (micro, recipe.train.seq_len + 1))
    with saved_bytes(model) as saved:
        run_step(losses, windows, micro)
    begin = time.perf_counter()
    run_step(losses, windows, micro)
    middle = time.perf_counter()
    for optimizer in optimizers:
        optimizer.step()
    rounds = recipe.train.batch_windows / (micro * processes)
    step = (middle - begin) * rounds + time.perf_counter() - middle
    tokens = recipe.steps * recipe.train.batch_windows * recipe.train.seq_len
    details = {
        "parameters": total,
        "active_parameters": active,
        "steps": recipe.steps,
        "tokens": tokens,
        "flops": 6 * active * tokens,
        "state_bytes": total * _BYTES_A_PARAMETER[recipe.optim.name],
        "activation_bytes": saved.most,
    }
    return Forecast(2 * total, round(step * recipe.steps, 1), "measured on one step", details)
