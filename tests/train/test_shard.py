"""A model cut over two processes trains, stops and resumes as one that is whole."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from moekit.core.errors import UserError
from moekit.train.balance import balance_rules
from moekit.train.distributed import World
from moekit.train.model import tap_routers
from moekit.train.optim import build_optimizers
from moekit.train.recipe import BalanceRecipe, OptimRecipe, TrainRecipe, recipe_from_dict
from moekit.train.shard import gradient_norm, is_sharded, shard, whole_state
from moekit.train.state import load_checkpoint, save_checkpoint
from moekit.train.step import build_losses, run_step
from tests.families.tiny import build_tiny
from tests.train.test_balance import tiny_model

RANKS = 2


def made(model: str):
    if model == "moekit":
        return tiny_model()
    stock = build_tiny(model).double().train()
    # transformers' grouped products know no float64.
    stock.set_experts_implementation("eager")
    return stock


def steps(world: World, model, folder: Path, first: int, last: int) -> None:
    """Steps `first` to `last`, from the checkpoint of the one before; leaves another one."""
    tap = tap_routers(model)
    recipe = OptimRecipe(lr=1e-2, embedding_lr=1e-2)
    optimizers = build_optimizers(model, recipe, tap.router_names, tap.fused_names)
    if first:
        load_checkpoint(folder / f"step-{first}", model, optimizers)
    rules = balance_rules(
        BalanceRecipe(rule="loss", coefficient=0.1, scope="global"),
        model.config,
        False,
        sum_over_processes=world.sum_,
    )
    losses = build_losses(model, tap, rules, TrainRecipe(precision="fp32"))
    for step in range(first, last):
        draw = torch.Generator().manual_seed(step)
        windows = torch.randint(64, (4, 13), generator=draw)
        run_step(losses, windows.chunk(world.size)[world.rank], 4 // world.size)
        if not is_sharded(model):
            world.average_gradients(model)
        gradient_norm(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        rules.after_step()
    save_checkpoint(folder / f"step-{last}", model, optimizers, {"step": last}, world.is_main)


def one_rank(rank: int, folder: str, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS
    )
    world = World(rank, RANKS, torch.device("cpu"))
    for first, last in ((0, 2), (2, 4)):
        model = made(name)
        full = sum(param.numel() for param in model.parameters())
        shard(model, world)
        own = sum(param.to_local().numel() for param in model.parameters())
        assert own <= full * 0.6
        steps(world, model, Path(folder), first, last)
        dist.barrier()
    state = whole_state(model)
    if world.is_main:
        torch.save(state, f"{folder}/state")
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["moekit", "qwen2_moe"])
def test_two_slices_stopped_and_resumed_are_one_whole(name, tmp_path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=one_rank, args=(rank, str(tmp_path), name)) for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
    assert [process.exitcode for process in ranks] == [0] * RANKS
    alone = made(name)
    (tmp_path / "alone").mkdir()
    steps(World(0, 1, torch.device("cpu")), alone, tmp_path / "alone", 0, 4)
    found = torch.load(tmp_path / "state", weights_only=True)
    assert set(found) == set(alone.state_dict())
    for key, value in alone.state_dict().items():
        # Routers compute in float32, and AdamW makes steps of 1e-2 of gradients near zero.
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-4, msg=key)


def test_an_optimiser_that_needs_whole_matrices_is_refused() -> None:
    raw = {"name": "x", "model": {"model_type": "qwen3_moe"}, "optim": {"name": "muon"}}
    with pytest.raises(UserError, match="adamw"):
        recipe_from_dict({**raw, "train": {"shard": True}})
