"""Balance in a run: over processes, over micro-batches, from a recipe."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from moekit.core.errors import UserError
from moekit.layers import MoekitConfig, MoekitForCausalLM
from moekit.train.balance import balance_rules
from moekit.train.distributed import World
from moekit.train.model import tap_routers
from moekit.train.recipe import BalanceRecipe, TrainRecipe, recipe_from_dict
from moekit.train.step import build_losses, run_step

RANKS, WINDOWS, LENGTH, VOCAB = 4, 8, 12, 64


def tiny_model(router: str = "softmax-raw") -> MoekitForCausalLM:
    torch.manual_seed(0)
    experts = {"type": "swiglu", "count": 8, "expert_width": 8}
    config = MoekitConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=8,
        moe={"router": router, "top_k": 2, "experts": experts},
    )
    return MoekitForCausalLM(config).double().train()


def windows() -> torch.Tensor:
    return torch.randint(VOCAB, (WINDOWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def gradients(world: World, scope: str, micro: int, share: torch.Tensor) -> dict:
    """The gradients of one optimiser step on `share` of the windows, averaged over processes."""
    model = tiny_model()
    tap = tap_routers(model)
    # Heavy enough for the balance loss to rule the router's gradient.
    recipe = BalanceRecipe(rule="loss", coefficient=10.0, scope=scope)
    rules = balance_rules(recipe, model.config, False, sum_over_processes=world.sum_)
    losses = build_losses(model, tap, rules, TrainRecipe(precision="fp32"))
    run_step(losses, share, micro, rank=world.rank)
    world.average_gradients(model)
    return {name: param.grad for name, param in model.named_parameters()}


def one_rank(rank: int, folder: str, scope: str, micro: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS
    )
    world = World(rank, RANKS, torch.device("cpu"))
    found = gradients(world, scope, micro, windows().chunk(RANKS)[rank])
    if world.is_main:
        torch.save(found, f"{folder}/gradients")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together() -> dict:
    """What one process finds that has the whole batch in one piece."""
    return gradients(World(0, 1, torch.device("cpu")), "micro", WINDOWS, windows())


@pytest.mark.parametrize("scope", ["step", "global", "micro"])
def test_four_ranks_balance_as_one_process_does(scope, together, tmp_path) -> None:
    # Forked, for importing transformers four times more would be most of the test's work.
    context = multiprocessing.get_context("fork")
    arguments = (str(tmp_path), scope, WINDOWS // RANKS)
    ranks = [context.Process(target=one_rank, args=(r, *arguments)) for r in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
    assert [process.exitcode for process in ranks] == [0] * RANKS
    found = torch.load(tmp_path / "gradients", weights_only=True)
    # Routers compute in float32, so their gradients (about 0.1) are sums in another order of it.
    same = all(torch.allclose(found[n], together[n], rtol=0, atol=1e-6) for n in together)
    assert same is (scope != "micro")


def test_the_last_micro_batch_sees_the_whole_global_batch() -> None:
    """With accumulation the buffer holds what was seen so far (2501.11873): the last is whole."""
    model = tiny_model()
    tap = tap_routers(model)
    recipe = BalanceRecipe(rule="loss", coefficient=1.0, scope="global")
    rules = balance_rules(recipe, model.config, False)
    result = run_step(build_losses(model, tap, rules, TrainRecipe(precision="fp32")), windows(), 2)
    (balance,) = rules.losses
    assert torch.equal(balance._seen, torch.cat(result.counts))
    rules.after_step()
    again = run_step(build_losses(model, tap, rules, TrainRecipe(precision="fp32")), windows(), 2)
    assert torch.equal(balance._seen, torch.cat(again.counts))


def test_listed_losses_act_and_end_by_their_schedule() -> None:
    model = tiny_model()
    tap = tap_routers(model)
    listed = [
        {"name": "mutual-information", "weight": 1.0, "end": 0.5},
        {"name": "coupling", "weight": 1.0, "alpha": 0.5},
    ]
    rules = balance_rules(BalanceRecipe(losses=listed), model.config, False)
    losses = build_losses(model, tap, rules, TrainRecipe(precision="fp32"))
    gates = []
    for progress in (0.0, 0.75):
        copied = copy.deepcopy(rules)
        assert [loss.schedule.at(progress) for loss in copied.losses] == [progress < 0.5, 1.0]
        model.zero_grad()
        run_step(losses, windows(), WINDOWS, progress=progress)
        gates.append(model.model.layers[0].mlp.router.score.weight.grad.clone())
    assert not torch.equal(*gates)


def test_recomputation_changes_no_route_and_no_gradient() -> None:
    found = []
    for recompute in (False, True):
        model = tiny_model("thor")
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        tap = tap_routers(model)
        rules = balance_rules(BalanceRecipe(), model.config, False)
        losses = build_losses(model, tap, rules, TrainRecipe(precision="fp32"))
        result = run_step(losses, windows(), 4, step=3, seed=1)
        found.append((result.counts, [param.grad for param in model.parameters()]))
    for plain, again in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize(
    ("balance", "message"),
    [
        ({"losses": [{"name": "balance-los", "weight": 1}]}, "balance-loss"),
        ({"losses": [{"name": "balance-loss"}]}, "lacks weight"),
        ({"losses": [{"name": "balance-loss", "weight": "much"}]}, "not a number"),
        ({"losses": [{"name": "z-loss", "weight": 1, "begin": 0.9, "end": 0.1}]}, "schedule"),
        ({"losses": {"name": "z-loss"}}, "list of mappings"),
        ({"scope": "globl"}, "global"),
    ],
)
def test_wrong_balance_sections_are_refused(balance, message) -> None:
    with pytest.raises(UserError, match=message):
        recipe_from_dict({"name": "x", "model": {"model_type": "moekit"}, "balance": balance})
