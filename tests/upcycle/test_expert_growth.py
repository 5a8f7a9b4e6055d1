"""A larger MoE: which experts are copied, and what the copies leave of the function."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from moekit.core.errors import UserError
from moekit.core.stats import ExpertStats, StatsLayer
from moekit.upcycle.expert_growth import most_useful
from moekit.upcycle.run import Request, upcycle
from tests.families.tiny import build_tiny

METHOD = "expert-upcycling"
EXACT = {"utility": "uniform", "router_noise": 0}
# Weights of copies are added in another order: float32 rounding.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """The tiny model of a MoE family, written once."""
    root, made = tmp_path_factory.mktemp("moe"), {}

    def of(family: str):
        if family not in made:
            build_tiny(family).save_pretrained(root / family)
            made[family] = root / family
        return made[family]

    return of


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "granitemoe"])
def test_uniform_copies_hold_the_source_with_half_its_top_k(mixture, tmp_path, family):
    result = upcycle(Request(METHOD, str(mixture(family)), options=EXACT), tmp_path / "out")
    assert result.start.equal_to == "the source with top_k 1"
    assert result.measured is not None
    assert result.measured < ROUNDING


def test_as_many_places_as_copies_hold_the_source_itself(mixture, tmp_path):
    options = {**EXACT, "experts": 24, "top_k": 6}
    result = upcycle(Request(METHOD, str(mixture("mixtral")), options=options), tmp_path / "out")
    assert result.start.equal_to == "the source"
    assert result.measured is not None
    assert result.measured < ROUNDING
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_local_experts == 24
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2).shape == (1, 5)


@pytest.mark.parametrize("family", ["ernie4_5_moe", "deepseek_v3"])
def test_routers_whose_weights_do_not_add_up_are_not_called_equal(mixture, tmp_path, family):
    # A selection bias that softmax halves leave whole, and groups ranked by their two best.
    result = upcycle(Request(METHOD, str(mixture(family)), options=EXACT), tmp_path / "out")
    assert result.start.equal_to is None
    assert result.measured is not None
    assert result.measured > ROUNDING


def test_the_best_are_copied_up_to_the_limit():
    utility = torch.tensor([1.0, 9.0, 2.0, 8.0, 3.0, 0.5])
    assert most_useful(utility, 6, max_copies=3) == [1, 1, 1, 3, 3, 3]
    # All full: the counts start anew.
    assert most_useful(utility[:2], 5, max_copies=2) == [1, 1, 0, 0, 1]
    draw = torch.Generator().manual_seed(0)
    drawn = most_useful(utility, 12, max_copies=2, temperature=1.0, draw=draw)
    assert sorted(drawn) == [e for e in range(6) for _ in range(2)]


def test_copies_are_those_of_the_heaviest_experts(mixture, tmp_path):
    source = mixture("mixtral")
    result = upcycle(
        Request(METHOD, str(source), options={"router_noise": 0}), tmp_path / "out", check=False
    )
    before = AutoModelForCausalLM.from_pretrained(source)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for number in range(2):
        old, new = (model.model.layers[number].mlp for model in (before, after))
        gates = old.experts.gate_up_proj[:, :48].detach()
        best = gates.flatten(1).norm(dim=1).argsort(descending=True)[:3]
        order = result.numbers["sources_of_experts"][f"model.layers.{number}.mlp"]
        assert order[:8] == list(range(8))
        assert order[8:] == [int(e) for e in best for _ in range(3)][:8]
        assert torch.equal(new.experts.down_proj, old.experts.down_proj[order])
        assert torch.equal(new.gate.weight, old.gate.weight[order])


def test_noise_unties_copies_and_leaves_the_originals(mixture, tmp_path):
    for family, tensor in (
        ("mixtral", "gate.weight"),
        ("glm4_moe", "gate.e_score_correction_bias"),
    ):
        source, out = mixture(family), tmp_path / family
        options = {"utility": "uniform", "router_noise": 0.5}
        assert upcycle(Request(METHOD, str(source), options=options), out).start.equal_to is None
        old, new = (
            AutoModelForCausalLM.from_pretrained(path).model.layers[-1].mlp
            for path in (source, out)
        )
        first, grown = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in (old, new))
        count = len(first[tensor])
        groups = getattr(new.gate, "num_group", 1)
        kept = grown[tensor].reshape(groups, 2, count // groups, -1)
        assert torch.equal(kept[:, 0].reshape(first[tensor].shape), first[tensor])
        assert not torch.isclose(kept[:, 1], kept[:, 0]).all()


def test_utility_from_statistics(mixture, tmp_path):
    source = mixture("mixtral")
    spec = AutoModelForCausalLM.from_pretrained(source).config
    layers = [StatsLayer(i, f"{i}", 8, 8, 2) for i in range(spec.num_hidden_layers)]
    stats = ExpertStats("mixtral", layers, ["all"])
    for position in range(len(layers)):
        stats.held[position, "count"] = torch.tensor([[1, 1, 1, 1, 1, 90, 1, 5]])
        stats.held[position, "tokens"] = torch.tensor([50])
    stats.save(tmp_path / "stats")
    options = {"utility": "frequency", "experts": 12}
    result = upcycle(
        Request(METHOD, str(source), options=options), tmp_path / "out", stats=tmp_path / "stats"
    )
    assert all(order[8:] == [5, 5, 5, 7] for order in result.numbers["sources_of_experts"].values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts": 8}, "experts is 8; the model has 8"),
        ({"experts": 12, "utility": "uniform"}, "no multiple of 8"),
        ({"utility": "frequency"}, "give --stats"),
        ({"max_copies": 0}, "max_copies is 1 or more"),
    ],
    ids=lambda o: "-".join(o) if isinstance(o, dict) else "",
)
def test_refused(mixture, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        upcycle(Request(METHOD, str(mixture("mixtral")), options=options), tmp_path / "out")
