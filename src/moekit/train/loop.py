"""The training loop: our own, short, resumable, the same on one process and on many."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.layers import MoekitForCausalLM

from .balance import family_balance, move_bias
from .look import evaluate, write_probe
from .metrics import router_metrics
from .model import tap_routers
from .optim import build_optimizers, rate_at, set_rate
from .run import Run
from .state import find_checkpoint, load_checkpoint, save_checkpoint
from .step import add_counts, build_losses, run_step


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
    balance = family_balance(recipe.balance, run.model.config, bool(tap.biases), tap.self_balanced)
    optimizers = build_optimizers(run.model, recipe.optim, tap.router_names, tap.fused_names)
    losses = build_losses(run.model, tap, balance, settings)
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
    log = _Log(run.folder / "log.jsonl", step, world.is_main)
    per_step = settings.batch_windows * settings.seq_len
    share = settings.batch_windows // world.size
    window_counts: list[Tensor] = []
    window_loss = torch.zeros(3)
    entry = log.last_step()
    clock, since = time.perf_counter(), step

    def save() -> None:
        if world.is_main:
            state = {"step": step, "tokens": step * per_step}
            save_checkpoint(checkpoint, run.model, optimizers, state)
        world.barrier()

    with _Stop() as stop:
        while step < recipe.steps:
            if step in settings.probe_at:
                write_probe(run, step)
            fraction = rate_at(step, recipe.steps, recipe.optim)
            set_rate(optimizers, fraction)
            first = step * settings.batch_windows + world.rank * share
            ids, _ = run.mix.batch(range(first, first + share))
            windows = torch.from_numpy(ids).to(world.device)
            result = run_step(losses, windows, micro, step, settings.seed, world.rank)
            world.average_gradients(run.model)
            norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), recipe.optim.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            counts = [world.sum_(layer) for layer in result.counts]
            if balance.bias_rate:
                move_bias(tap.biases, counts, balance.bias_rate)
            if isinstance(run.model, MoekitForCausalLM):
                run.model.after_step(result.routings, counts)
            window_counts = add_counts(window_counts, counts)
            window_loss += torch.tensor([result.loss, result.balance, 1.0])
            step += 1
            run.advance(step, recipe.steps)
            if step % settings.log_every == 0 or step == recipe.steps:
                summed = world.sum_(window_loss)
                means = summed / summed[2]
                seconds, clock = time.perf_counter() - clock, time.perf_counter()
                entry = {
                    "step": step,
                    "tokens": step * per_step,
                    "loss": round(means[0].item(), 5),
                    "balance": round(means[1].item(), 5),
                    "grad_norm": round(float(norm), 4),
                    "lr_fraction": round(fraction, 5),
                    "tokens_per_second": round((step - since) * per_step / seconds, 1),
                }
                if window_counts:
                    entry["routers"] = router_metrics(window_counts)
                log.write(entry)
                run.say(_line(entry, recipe.steps))
                window_counts, window_loss, since = [], torch.zeros(3), step
            stopping = world.agree(stop.asked)
            last = step == recipe.steps
            if not (last or stopping) and settings.eval_every and step % settings.eval_every == 0:
                if world.is_main:
                    score = evaluate(run, settings.eval_bytes)
                    log.write({"step": step, "valid": score})
                    run.say(f"step {step}: mean bits per byte {score['mean']:.4f}")
                world.barrier()
                clock, since = time.perf_counter(), step
            if stopping or last or step % settings.checkpoint_every == 0:
                save()
            if stopping and not last:
                raise KeyboardInterrupt
    if recipe.steps in settings.probe_at:
        write_probe(run, step)
    return entry


class _Log:
    """A JSON line an entry. On resuming, entries after the checkpoint's step are dropped."""

    def __init__(self, path: Path, step: int, active: bool) -> None:
        self.path, self.active = path, active
        if active and path.exists():
            lines = [line for line in path.read_text().splitlines() if line]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            path.write_text("".join(line + "\n" for line in kept))

    def last_step(self) -> dict[str, Any]:
        """The newest entry of a training step; empty before the first."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return next((e for e in map(json.loads, reversed(lines)) if "loss" in e), {})

    def write(self, entry: dict[str, Any]) -> None:
        if self.active:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")


def _line(entry: dict[str, Any], steps: int) -> str:
    line = f"step {entry['step']}/{steps} loss {entry['loss']:.4f}"
    line += f" {entry['tokens_per_second']:,.0f} tokens/s"
    if "routers" in entry:
        routers = entry["routers"]
        line += f" imbalance {max(routers['imbalance']):.2f} dead {routers['dead']}"
    return line
