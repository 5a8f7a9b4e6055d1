"""OTP: what the networks learn, and the rule that they make."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div

from moekit.compress.prune.learned_skipping import (
    LearnedSkipping,
    _log_probabilities,
    train_skipping,
)
from moekit.compress.prune.skipping import skipping
from moekit.core.errors import UserError
from moekit.core.registry import registry
from moekit.core.routing_rule import Routing
from tests.compress.prune.common import tiny_view, tokens
from tests.profile.common import padded_batch


@pytest.fixture(scope="module")
def view():
    return tiny_view(num_experts_per_tok=4)


def run(view, rule, batch=None) -> tuple[float, float, list]:
    """Divergence from the whole model, share of choices run, and what the experts got."""
    calls, batch = [], batch or tokens()
    with torch.no_grad():
        target = _log_probabilities(view.model, batch)
        with skipping(view, rule) as counts, view.observe(calls.append):
            found = _log_probabilities(view.model, batch)
    loss = float(kl_div(found, target, log_target=True, reduction="batchmean"))
    return loss, 1 - counts.share, calls


def test_untrained_networks_keep_everything(view):
    loss, kept, _ = run(view, LearnedSkipping(view))
    assert (loss, kept) == (0.0, 1.0)


def test_the_price_decides_how_many_are_kept(view):
    # Check (a) of MC#: nothing to pay keeps all, a high price leaves one.
    free = train_skipping(view, [tokens()], keep=1.0, steps=20)
    assert run(view, free)[1] == 1.0
    dear = train_skipping(view, [tokens()], keep=0.01, steps=80, learning_rate=0.05)
    assert run(view, dear)[1] == 0.25


def test_what_runs_is_a_prefix_of_the_ranking(view):
    # Check (b) of MC#.
    rule = train_skipping(view, [tokens()], keep=0.6, steps=60, learning_rate=0.03)
    plain = []
    with view.observe(plain.append, layers=[0]), torch.no_grad():
        view.model(tokens().ids)
    _, kept, calls = run(view, rule)
    assert 0.25 < kept < 1
    used = calls[0].ids >= 0
    weights = plain[0].weights
    lightest = weights.masked_fill(~used, 2).min(-1).values
    heaviest = weights.masked_fill(used, -1).max(-1).values
    assert bool((heaviest <= lightest).all())


def test_it_beats_chance_at_the_same_share(view):
    # Check (c) of MC#.
    rule = train_skipping(view, [tokens()], keep=0.6, steps=60, learning_rate=0.03)
    loss, kept, _ = run(view, rule)

    class Chance:
        def keep(self, layer, routing: Routing, hidden) -> torch.Tensor:
            generator = torch.Generator().manual_seed(layer.position)
            return torch.rand(routing.ids.shape, generator=generator) < kept

    other, share, _ = run(view, Chance())
    assert share == pytest.approx(kept, abs=0.05)
    assert loss < other


def test_the_model_is_left_as_it_was(view):
    before = {name: p.clone() for name, p in view.model.named_parameters()}
    train_skipping(view, [padded_batch(9)], steps=2)
    for name, parameter in view.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None


def test_files(view, tmp_path):
    path = tmp_path / "otp.safetensors"
    rule = train_skipping(view, [tokens()], keep=0.6, steps=40, learning_rate=0.03)
    rule.save(path)
    _, kept, calls = run(view, rule)
    with registry.find("otp", kind="skipping").load()(view, file=path) as counts, torch.no_grad():
        again = []
        with view.observe(again.append):
            view.model(tokens().ids)
    assert 1 - counts.share == kept
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(calls, again, strict=True))
    with pytest.raises(UserError, match="of a model with other layers: size mismatch"):
        LearnedSkipping.load(tiny_view(), path)
    path.write_text("x")
    with pytest.raises(UserError, match="cannot be read"):
        LearnedSkipping.load(view, path)


def test_refusals(view):
    with pytest.raises(UserError, match="keep 0"):
        train_skipping(view, [tokens()], keep=0.0)
    with pytest.raises(UserError, match="no text"):
        train_skipping(view, [])
