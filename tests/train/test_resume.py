"""A run of moekit's layers that is stopped and resumed is the run that was not, bit for bit."""

import pytest
import torch

from moekit.layers import MoekitForCausalLM
from moekit.train.balance import balance_rules
from moekit.train.model import tap_routers
from moekit.train.optim import build_optimizers
from moekit.train.recipe import BalanceRecipe, OptimRecipe, TrainRecipe
from moekit.train.state import load_checkpoint, save_checkpoint
from moekit.train.step import build_losses, run_step
from tests.layers.test_router_models import MODELS, SWIGLU, build

SHRINKING = {"router": {"name": "loss-free", "bias_rule": "sign-sqrt"}, "experts": SWIGLU}
SHRINKING["top_k"] = 2


class Trainer:
    """The parts of a run that a step needs, freshly built, or continued from a checkpoint."""

    def __init__(self, name: str, checkpoint=None) -> None:
        changes = SHRINKING if name == "shrinking bias" else {}
        self.model: MoekitForCausalLM = build("thor" if changes else name, **changes).train()
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        tap = tap_routers(self.model)
        recipe = OptimRecipe(lr=1e-2, embedding_lr=1e-2)
        self.optimizers = build_optimizers(self.model, recipe, tap.router_names, tap.fused_names)
        self.rules = balance_rules(BalanceRecipe(scope="global"), self.model.config, False)
        self.losses = build_losses(self.model, tap, self.rules, TrainRecipe(precision="fp32"))
        self.step = 0
        if checkpoint is not None:
            self.step = load_checkpoint(checkpoint, self.model, self.optimizers)["step"]

    def run(self, last: int) -> list[float]:
        losses = []
        while self.step < last:
            draw = torch.Generator().manual_seed(self.step)
            windows = torch.randint(48, (4, 9), generator=draw)
            result = run_step(self.losses, windows, 2, self.step, seed=7)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.rules.after_step()
            self.model.after_step(result.routings, result.counts)
            losses.append(result.loss)
            self.step += 1
        return losses


@pytest.mark.parametrize("name", [*MODELS, "shrinking bias"])
def test_stopped_and_resumed_is_as_if_it_had_not_been(name, tmp_path) -> None:
    whole = Trainer(name)
    first = whole.run(2)
    save_checkpoint(tmp_path / "at", whole.model, whole.optimizers, {"step": 2})
    second = whole.run(4)
    resumed = Trainer(name, tmp_path / "at")
    assert resumed.run(4) == second
    assert first != second
    state = resumed.model.state_dict()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(state[key], value), key
