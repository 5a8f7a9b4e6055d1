"""What a run will need, told before it starts: parameters, FLOPs, bytes and seconds."""

import time

import torch

from moekit.core.forecast import Forecast
from moekit.core.spec import spec_from_config

from .balance import family_balance
from .model import build_model, tap_routers
from .optim import build_optimizers
from .recipe import Recipe
from .step import build_losses, run_step

# fp32 weights and gradients, and two fp32 moments (AdamW) or one (Muon).
_BYTES_A_PARAMETER = {"adamw": 16, "muon": 12}


def forecast(recipe: Recipe, processes: int = 1) -> Forecast:
    """Size, FLOPs, bytes and time of a run; times one real micro-batch of random tokens.

    FLOPs are 6 * active parameters without the embedding table * tokens (forward and backward of
    every matrix product, attention scores left out). Seconds are those of this machine, with the
    recipe's kernels uncompiled, and count neither evaluation nor start-up.
    """
    vocab = recipe.tokenizer.vocab_size
    model = build_model(recipe, vocab, vocab - 1)
    tap = tap_routers(model)
    total = sum(param.numel() for param in model.parameters())
    active = spec_from_config(model.config).params.active_no_embedding if tap.num_experts else total
    balance = family_balance(recipe.balance, model.config, bool(tap.biases))
    optimizers = build_optimizers(model, recipe.optim, tap.router_names, tap.fused_names)
    losses = build_losses(model, tap, balance, recipe.train, compiled=False)
    micro = recipe.train.micro_windows
    windows = torch.randint(vocab, (micro, recipe.train.seq_len + 1))
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
    }
    return Forecast(2 * total, round(step * recipe.steps, 1), "measured on one step", details)
