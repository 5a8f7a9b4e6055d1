"""The training loop: our own, short, resumable, the same on one process and on many."""

import signal
from typing import Any

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.layers import MoekitForCausalLM
from moekit.layers.balance import move_bias

from .balance import balance_rules
from .distill import load_teacher
from .distributed import World
from .freeze import freeze
from .log import RunLog, Window, line_of
from .look import evaluate, write_probe
from .model import tap_routers
from .optim import build_optimizers, rate_at, set_rate
from .run import Run
from .shard import gradient_norm, is_sharded, put_together
from .state import find_checkpoint, load_checkpoint, save_checkpoint
from .step import StepResult, build_losses, run_step
from .track import open_trackers


class _Stop:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the current step."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "_Stop":
        self._old = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *exc) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def train(run: Run) -> dict[str, Any]:
    """Train until the recipe's tokens are seen; returns the last log entry and the evaluation.

    Raises KeyboardInterrupt after saving a checkpoint when asked to stop.
    """
    recipe, settings, world = run.recipe, run.recipe.train, run.world
    tap = tap_routers(run.model)
    balance = balance_rules(
        recipe.balance, run.model.config, bool(tap.biases), tap.self_balanced, world.sum_
    )
    sharded = is_sharded(run.model)
    optimizers = build_optimizers(run.model, recipe.optim, tap.router_names, tap.fused_names)
    teacher = load_teacher(recipe.distill, settings, len(run.tokenizer), world.device)
    losses = build_losses(run.model, tap, balance, settings, teacher=teacher)
    micro = min(settings.micro_windows, settings.batch_windows // world.size)
    if settings.batch_windows % (world.size * micro):
        raise UserError(
            f"train.batch_windows {settings.batch_windows} does not split into "
            f"{world.size} processes of micro-batches of {micro}."
        )
    checkpoint, step = run.folder / "checkpoint", 0
    found = find_checkpoint(checkpoint)
    if found is not None:
        step = load_checkpoint(found, run.model, optimizers)["step"]
    trackers = open_trackers(recipe, run.folder) if world.is_main else []
    log = RunLog(run.folder / "log.jsonl", step, world.is_main, trackers)
    per_step = settings.batch_windows * settings.seq_len
    share = settings.batch_windows // world.size
    entry, window = log.last_step(), Window(step)

    def save() -> None:
        state = {"step": step, "tokens": step * per_step}
        if world.is_main or sharded:
            save_checkpoint(checkpoint, run.model, optimizers, state, world.is_main)
        world.barrier()

    with _Stop() as stop:
        while step < recipe.steps:
            if step in settings.probe_at:
                write_probe(put_together(run), step)
            routers_learn = step < settings.freeze_routers_at * recipe.steps
            if not routers_learn:
                freeze(run.model, ["routers"])
            fraction = rate_at(step, recipe.steps, recipe.optim)
            set_rate(optimizers, fraction)
            first = step * settings.batch_windows + world.rank * share
            ids, _ = run.mix.batch(range(first, first + share))
            windows = torch.from_numpy(ids).to(world.device)
            result = run_step(
                losses, windows, micro, step, settings.seed, world.rank, step / recipe.steps
            )
            if not sharded:
                world.average_gradients(run.model)
            norm = gradient_norm(run.model.parameters(), recipe.optim.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            counts, lost = _over_processes(world, result)
            balance.after_step()
            if balance.bias_rate and routers_learn:
                for bias, count in zip(tap.biases, counts, strict=True):
                    move_bias(bias, count, balance.bias_rate)
            if isinstance(run.model, MoekitForCausalLM) and routers_learn:
                run.model.after_step(result.routings, counts)
            window.add(result, counts, lost)
            step += 1
            run.advance(step, recipe.steps)
            if step % settings.log_every == 0 or step == recipe.steps:
                entry = window.entry(world, step, per_step)
                entry |= {"grad_norm": round(norm, 4), "lr_fraction": round(fraction, 5)}
                log.write(entry)
                run.say(line_of(entry, recipe.steps))
                window = Window(step)
            stopping = world.agree(stop.asked)
            last = step == recipe.steps
            if not (last or stopping) and settings.eval_every and step % settings.eval_every == 0:
                seen = put_together(run)
                if world.is_main:
                    score = evaluate(seen, settings.eval_bytes)
                    log.write({"step": step, "valid": score})
                    run.say(f"step {step}: mean bits per byte {score['mean']:.4f}")
                world.barrier()
                window.restart_clock(step)
            if stopping or last or step % settings.checkpoint_every == 0:
                save()
            if stopping and not last:
                raise KeyboardInterrupt
    # What follows computes on the main process alone.
    run.model = put_together(run).model
    if recipe.steps in settings.probe_at:
        write_probe(run, step)
    log.close()
    return entry


def _over_processes(world: World, result: StepResult) -> tuple[list[Tensor], list[Tensor]]:
    """Pairs by expert and lost pairs of every layer, summed over processes in one message."""
    if not result.counts:
        return [], []
    sizes = [len(count) for count in result.counts]
    flat = world.sum_(torch.cat([*result.counts, torch.stack(result.lost)]))
    *counts, lost = flat.split([*sizes, len(sizes)])
    return list(counts), list(lost)
