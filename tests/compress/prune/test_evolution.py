"""EEP: genomes as plans, and what the evolution guarantees."""

from __future__ import annotations

import pytest
import torch

from moekit.compress.fitted import rewrite_of
from moekit.compress.live import apply_live
from moekit.compress.prune.evolution import eep, loss_points, token_loss
from moekit.compress.prune.genome import LayerGenome, MixedExperts, genome_plan
from moekit.compress.prune.select import Room
from moekit.core.convert import convert
from moekit.core.errors import UserError
from moekit.core.plan import ExpertPlan
from moekit.core.spec import spec_of
from tests.compress.prune.common import tiny_view, tokens
from tests.profile.common import padded_batch


@pytest.fixture(scope="module")
def view():
    return tiny_view()


def rooms(view, count: int, **fields) -> list[Room]:
    return [Room(layer.index, layer.num_experts, count, **fields) for layer in view]


def logits(view) -> torch.Tensor:
    with torch.no_grad():
        return view.model(tokens().ids).logits


def live(view, asked, genome) -> torch.Tensor:
    plan = genome_plan(spec_of(view.model), asked, genome)
    with apply_live(view, plan, MixedExperts(plan) if plan.fit else None):
        return logits(view)


def random_genome(asked, seed: int = 0) -> list[LayerGenome]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for room in asked:
        base = LayerGenome.keeping(room, list(range(room.count)))
        noise = torch.randn(2, *base.experts.shape, generator=generator) * 0.1
        made.append(LayerGenome(base.slots, base.experts + noise[0], base.router + noise[1]))
    return made


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_one_hot_rows_are_masking(family):
    # Check (a) of EEP.
    view = tiny_view(family)
    asked = rooms(view, 3)
    genome = [LayerGenome.keeping(room, [1, 4, 6]) for room in asked]
    gone = [0, 2, 3, 5, 7]
    with view.ban_experts(gone):
        expected = logits(view)
    assert torch.equal(live(view, asked, genome), expected)
    # Rows in another order are the same experts under other numbers.
    shuffled = [
        LayerGenome((6, 1, 4), layer.experts[[1, 2, 0]], layer.router[[1, 2, 0]])
        for layer in genome
    ]
    torch.testing.assert_close(live(view, asked, shuffled), expected)


def test_identity_matrices_change_no_bit(view):
    # Check (b) of EEP.
    asked = rooms(view, 8)
    genome = [LayerGenome.keeping(room, range(8)) for room in asked]
    assert genome_plan(spec_of(view.model), asked, genome).uses() == []
    assert torch.equal(live(view, asked, genome), logits(view))


def test_mixtures_by_hand(view):
    asked = rooms(view, 3)
    genome = random_genome(asked)
    found = live(view, asked, genome)
    reference = tiny_view()
    for layer, genes in zip(reference, genome, strict=True):
        experts = layer.experts
        old, rows = experts.gate_up_proj.detach().clone(), layer.router_weight.detach().clone()
        down = experts.down_proj.detach().clone()
        for slot, mix, route in zip(genes.slots, genes.experts, genes.router, strict=True):
            experts.gate_up_proj.data[slot] = torch.einsum("e,eij->ij", mix, old)
            experts.down_proj.data[slot] = torch.einsum("e,eij->ij", mix, down)
            layer.router_weight.data[slot] = route @ rows
    with reference.ban_experts([3, 4, 5, 6, 7]):
        expected = logits(reference)
    # float32 sums of eight terms, in another order, through two layers.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_written_and_loaded_it_is_the_same(view, tmp_path):
    from transformers import AutoModelForCausalLM

    asked = rooms(view, 3)
    plan = genome_plan(spec_of(view.model), asked, random_genome(asked))
    plan.save(tmp_path / "plan.json")
    again = ExpertPlan.load(tmp_path / "plan.json")
    assert again == plan
    view.model.save_pretrained(tmp_path / "model")
    rewrite = rewrite_of(again, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "out", plan=again, rewrite=rewrite)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_experts == 3
    with apply_live(view, plan, MixedExperts(plan) if plan.fit else None), torch.no_grad():
        expected = logits(view)
    with torch.no_grad():
        found = loaded(tokens().ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def needs(experts: set[int]):
    """A fitness that counts the wanted experts which a genome holds undiluted."""

    def evaluate(genome) -> float:
        return float(sum(float(layer.experts[:, e].max()) for layer in genome for e in experts))

    return evaluate


def test_the_experts_that_a_task_needs_are_found():
    # Check (d) of EEP; two layers of 8 experts, of which 3 stay.
    asked = [Room(0, 8, 3), Room(1, 8, 3)]
    found = eep(asked, needs({1, 3}), pruning=150, total=150)
    assert all({1, 3} <= set(layer.slots) for layer in found.best)
    assert not any(layer.mixes for layer in found.best)


def test_the_best_never_gets_worse_and_mixing_begins(view):
    # Check (c) of EEP.
    asked = rooms(view, 3)
    evaluate = loss_points(view, asked, [tokens().ids[:2]])
    found = eep(asked, evaluate, initial=4, pruning=8, total=16)
    assert found.history == sorted(found.history)
    assert found.fitness == found.history[-1] == evaluate(found.best)
    assert (found.evaluations, found.complete) == (16, True)
    mixed = eep([Room(0, 8, 3)], needs({1, 3, 5, 6}), initial=4, pruning=8, total=60)
    assert mixed.best[0].mixes


def test_the_start_comes_first(view):
    seen = []

    def evaluate(genome) -> float:
        seen.append([layer.slots for layer in genome])
        return 0.0

    start = [[[5, 6, 7], [0, 1, 2]]]
    eep(rooms(view, 3), evaluate, start=start, initial=3, pruning=3, total=3)
    assert seen[0] == [(5, 6, 7), (0, 1, 2)]


@pytest.mark.parametrize("fields", [{"protected": frozenset({6})}, {"num_groups": 2}])
def test_protected_experts_and_groups_last(fields):
    asked = [Room(0, 8, 4, **fields)]

    def check(genome) -> float:
        (layer,) = genome
        room = asked[0]
        held = [room.group_of(e) for e in layer.slots]
        assert all(held.count(g) == room.per_group for g in range(room.num_groups))
        assert len(set(layer.slots)) == 4
        for e in room.protected:
            row = layer.slots.index(e)
            expected = torch.eye(8)[e]
            assert torch.equal(layer.experts[row], expected)
            assert torch.equal(layer.router[row], expected)
        return float(layer.experts.sum())

    eep(asked, check, initial=4, pruning=20, total=80)


def test_interrupted_evolution_goes_on(tmp_path):
    asked, state = [Room(0, 8, 3)], tmp_path / "state.json"
    sizes = {"initial": 4, "pruning": 8, "total": 30, "state": state}
    calls = []

    def evaluate(genome) -> float:
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return needs({1, 3})(genome)

    with pytest.raises(KeyboardInterrupt):
        eep(asked, evaluate, **sizes)
    again = eep(asked, evaluate, **sizes)
    assert again.evaluations == 30 - 11
    whole = eep(asked, needs({1, 3}), initial=4, pruning=8, total=30)
    assert again.history == whole.history
    assert torch.equal(again.best[0].experts, whole.best[0].experts)
    with pytest.raises(UserError, match="with seed 0, not 1"):
        eep(asked, evaluate, seed=1, **sizes)


def test_a_budget_of_time_ends_it_with_an_answer():
    found = eep([Room(0, 8, 3)], needs({1}), max_seconds=0.0)
    assert (found.evaluations, found.complete) == (1, False)


def test_token_loss_leaves_padding_out(view):
    batch = padded_batch(9)
    rows = [batch.ids[r : r + 1, : int(batch.mask[r].sum())] for r in range(3)]
    lengths = [row.shape[1] - 1 for row in rows]
    losses = [token_loss(view.model, [row]) * n for row, n in zip(rows, lengths, strict=True)]
    assert token_loss(view.model, [batch]) == pytest.approx(sum(losses) / sum(lengths), rel=1e-5)
