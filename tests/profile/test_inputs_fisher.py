"""The sample of inputs is of the inputs; Fisher information is that of the definition."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import Qwen3MoeForCausalLM

from moekit.core.errors import UserError
from moekit.core.neurons import neuron_rows
from moekit.core.stats import ExpertStats
from moekit.core.view import MoEView
from moekit.profile import profile
from tests.families.tiny import build_tiny
from tests.models import tiny_config
from tests.profile.common import batches_of, differences

VOCAB, EXPERTS = 12, 4


@pytest.fixture(scope="module")
def view() -> MoEView:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MoEView(Qwen3MoeForCausalLM(tiny_config(vocab_size=VOCAB)).eval())


def ids_of(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (rows, length), generator=source)


@pytest.mark.parametrize("sample", [7, 24, 1000])
def test_sample_is_every_nth_token(view: MoEView, sample: int) -> None:
    batches = [ids_of(3, 4, seed) for seed in range(4)]
    seen = []
    with view.observe(seen.append, layers=[1]):
        stats = profile(view, batches, sets=["inputs"], sample=sample)
    stride = -(-48 // sample)
    for name, attribute in (("hidden", "hidden"), ("ids", "ids"), ("weights", "weights")):
        whole = torch.cat([getattr(call, attribute) for call in seen])
        assert torch.equal(stats.get(1, f"sample_{name}"), whole[::stride])


def test_sample_leaves_out_padding(view: MoEView) -> None:
    stats = profile(view, [ids_of(2, 5)], sets=["inputs"])
    family = MoEView(build_tiny("qwen3_moe"))
    padded = profile(family, batches_of(), sets=["default", "inputs"])
    assert len(padded.get(0, "sample_ids")) == padded.num_tokens(0)
    assert len(stats.get(0, "sample_ids")) == 10


def test_samples_and_information_of_two_texts_combine(view: MoEView, tmp_path) -> None:
    parts = [
        profile(view, [ids_of(2, 5, seed)], sets=["inputs", "fisher"], scratch=None)
        for seed in (0, 1)
    ]
    merged = parts[0].merge(parts[1])
    merged.save(tmp_path / "stats")
    opened = ExpertStats.open(tmp_path / "stats")
    both = torch.cat([part.get(1, "sample_hidden") for part in parts])
    assert torch.equal(opened.get(1, "sample_hidden"), both)
    assert int(opened.get(1, "fisher_sequences")) == 4
    total = parts[0].get(1, "neuron_fisher") + parts[1].get(1, "neuron_fisher")
    assert torch.equal(opened.get(1, "neuron_fisher"), total)


def test_small_memory_changes_nothing(view: MoEView, tmp_path) -> None:
    batches = [ids_of(2, 5)]
    sets = ["default", "outputs", "inputs", "fisher"]
    whole = profile(view, batches, sets=sets)
    by_layer = profile(view, batches, sets=sets, scratch=tmp_path, heavy_bytes=30_000)
    assert not differences(whole, by_layer)


def squared_gradients(view: MoEView, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[E, F, N] of layer 1 for given labels, by an expert-wise backward pass of its own."""
    banks = list(view[1].experts.parameters())
    logits = view.model(input_ids=ids).logits[0]
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    gate_up, down = torch.autograd.grad(loss, banks)
    gate, up = gate_up.chunk(2, dim=1)
    return torch.cat([gate, up, down.transpose(1, 2)], dim=2).square()


def test_information_is_the_expectation_over_the_models_own_labels(view: MoEView) -> None:
    ids = ids_of(1, 1)
    with torch.no_grad():
        probabilities = view.model(input_ids=ids).logits[0, 0].softmax(-1)
    exact = sum(
        p * squared_gradients(view, ids, torch.tensor([label]))
        for label, p in enumerate(probabilities)
    )
    draws = 400
    mean = (
        sum(
            profile(view, [ids], sets=["fisher"], layers=[1], seed=seed).get(1, "neuron_fisher")
            for seed in range(draws)
        )
        / draws
    )
    # 12 labels drawn 400 times: shares are known to some 5 %.
    assert float(mean.sum()) == pytest.approx(float(exact.sum()), rel=0.15)
    used = exact > 0
    assert torch.corrcoef(torch.stack([mean[used], exact[used]]))[0, 1] > 0.95


def test_squares_are_of_one_sequence_at_a_time(view: MoEView) -> None:
    """Squares of sums over a batch would hold products of different sequences."""
    batch = ids_of(3, 4)
    together = profile(view, [batch], sets=["fisher"]).get(0, "neuron_fisher")
    one_by_one = profile(view, [row[None] for row in batch], sets=["fisher"])
    assert torch.equal(together, one_by_one.get(0, "neuron_fisher"))


def test_model_is_left_as_it_was(view: MoEView) -> None:
    before = [(p.requires_grad, p.grad) for p in view.model.parameters()]
    profile(view, [ids_of(1, 3)], sets=["fisher"])
    assert [(p.requires_grad, p.grad) for p in view.model.parameters()] == before


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "deepseek_v3", "nemotron_h"])
def test_information_lies_as_the_neurons_do(family: str) -> None:
    view = MoEView(build_tiny(family))
    stats = profile(view, batches_of()[:1], sets=["fisher"])
    rows = neuron_rows(view[0].get_expert(0))
    assert stats.get(0, "neuron_fisher").shape == (view[0].num_experts, *rows.shape)
    assert stats.get(0, "neuron_fisher").sum() > 0


def test_families_without_a_bank_are_refused() -> None:
    with pytest.raises(UserError, match="no bank"):
        profile(MoEView(build_tiny("llama4")), batches_of()[:1], sets=["fisher"])
