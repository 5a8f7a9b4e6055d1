"""The default set against a double loop over tokens and choices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moekit.core.collect import Batch
from moekit.core.errors import UserError
from moekit.core.view import MoEView
from moekit.ops.experts_naive import run_expert, run_up
from moekit.profile import profile
from moekit.profile.experts_run import run_routed
from moekit.profile.routing_sums import token_contributions
from tests.families.tiny import TINY, build_tiny, tiny_inputs
from tests.profile.common import batches_of, padded_batch

# float32 sums of a few dozen terms, taken in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def model():
    return build_tiny("qwen3_moe")


@pytest.fixture(scope="module")
def oracle(model):
    """Every statistic of the tokens of `batches_of()`, one token at a time."""
    view = MoEView(model)
    seen = []
    streams = _residual_streams(model)
    with view.observe(lambda call: seen.append((call, streams[call.layer.index])), logits=True):
        found: list[dict[str, object]] = []
        for batch in batches_of():
            with torch.no_grad():
                model(input_ids=batch.ids, attention_mask=batch.mask)
            labels = [d for d in batch.domains for _ in range(batch.ids.shape[1])]
            previous: dict[int, Tensor] = {}
            for call, stream in seen:
                for t, domain in enumerate(labels):
                    if batch.mask.flatten()[t]:
                        found.append(_token(call, t, domain, stream.flatten(0, 1)[t], previous))
            seen.clear()
    return found


def _residual_streams(model):
    streams = {}
    for index, layer in enumerate(model.model.layers):
        layer.post_attention_layernorm.register_forward_hook(
            lambda _, args, __, index=index: streams.__setitem__(index, args[0])
        )
    return streams


def _token(call, t, domain, stream, previous):
    ids, weights = call.ids[t].tolist(), call.weights[t].tolist()
    hidden = call.hidden[t : t + 1]
    experts = call.layer.experts
    outputs = [run_expert(experts, e, hidden)[0] for e in ids]
    update = sum(w * o for w, o in zip(weights, outputs, strict=True)).double()
    stream = stream.double()
    cosine = torch.cosine_similarity(stream, stream + update, dim=0).item()
    token = {
        "position": call.layer.position,
        "domain": domain,
        "ids": ids,
        "weights": weights,
        "norms": [o.norm().item() for o in outputs],
        "peaks": [o.abs().max().item() for o in outputs],
        "middles": [run_up(experts, e, hidden).abs().max().item() for e in ids],
        "contribution": max(0.0, 1 - cosine),
        "logits": call.logits[t].double(),
        "hidden": hidden[0],
        "stream": stream,
        "before": previous.get(t),
    }
    previous[t] = ids
    return token


def _sum(oracle, position, value, domain=None):
    total = None
    for token in oracle:
        if token["position"] == position and domain in (None, token["domain"]):
            part = value(token)
            total = part if total is None else total + part
    return total


def _spread(ids, values, num=8):
    row = torch.zeros(num, dtype=torch.float64)
    for e, value in zip(ids, values, strict=True):
        row[e] += value
    return row


def test_sums_are_those_of_a_double_loop(model, oracle):
    view = MoEView(model)
    stats = profile(view, batches_of())
    experts = view[0].num_experts
    assert stats.domains == ["a", "b"]
    for position in range(len(view)):
        for domain in (None, "a", "b"):
            assert stats.num_tokens(position, domain) == _sum(oracle, position, lambda _: 1, domain)
            counts = _sum(oracle, position, lambda t: _spread(t["ids"], [1] * 2, experts), domain)
            assert torch.equal(stats.counts(position, domain).double(), counts)
            for gate, norm, contribution in stats.moments:

                def saliency(t, gate=gate, norm=norm, contribution=contribution):
                    values = [
                        w**gate * n**norm * t["contribution"] ** contribution
                        for w, n in zip(t["weights"], t["norms"], strict=True)
                    ]
                    return _spread(t["ids"], values, experts)

                torch.testing.assert_close(
                    stats.saliency_sum(position, gate, norm, contribution, domain),
                    _sum(oracle, position, saliency, domain),
                    **CLOSE,
                )
            torch.testing.assert_close(
                stats.by_domain(position, "logit_sum", domain),
                _sum(oracle, position, lambda t: t["logits"], domain),
                **CLOSE,
            )
            torch.testing.assert_close(
                stats.by_domain(position, "softmax_sum", domain),
                _sum(oracle, position, lambda t: t["logits"].softmax(-1), domain),
                **CLOSE,
            )

            torch.testing.assert_close(
                stats.by_domain(position, "chosen_softmax_sum", domain),
                _sum(
                    oracle,
                    position,
                    lambda t: _spread(t["ids"], t["logits"].softmax(-1)[t["ids"]], experts),
                    domain,
                ),
                **CLOSE,
            )

            def top(t):
                winner = int(t["logits"].argmax())
                return _spread([winner], [t["logits"][winner]], experts)

            torch.testing.assert_close(
                stats.by_domain(position, "top_logit_sum", domain),
                _sum(oracle, position, top, domain),
                **CLOSE,
            )
        gram = _sum(oracle, position, lambda t: torch.outer(t["logits"], t["logits"]))
        torch.testing.assert_close(stats.get(position, "logit_gram"), gram, **CLOSE)


def test_extremes_channels_and_company(model, oracle):
    view = MoEView(model)
    stats = profile(view, batches_of())
    for position in range(len(view)):
        mine = [t for t in oracle if t["position"] == position]
        for name, key in (("output_max", "peaks"), ("middle_max", "middles")):
            expected = torch.zeros(view[position].num_experts)
            for token in mine:
                for e, value in zip(token["ids"], token[key], strict=True):
                    expected[e] = max(float(expected[e]), value)
            torch.testing.assert_close(stats.get(position, name), expected, **CLOSE)
        hidden = torch.stack([t["hidden"] for t in mine])
        stream = torch.stack([t["stream"] for t in mine])
        torch.testing.assert_close(stats.get(position, "input_max"), hidden.abs().amax(0), **CLOSE)
        torch.testing.assert_close(
            stats.get(position, "input_abs_sum"), hidden.double().abs().sum(0), **CLOSE
        )
        torch.testing.assert_close(
            stats.get(position, "residual_max"), stream.float().abs().amax(0), **CLOSE
        )
        torch.testing.assert_close(
            stats.get(position, "residual_sq_sum"), stream.square().sum(0), **CLOSE
        )
        experts = view[position].num_experts
        together = torch.zeros(experts, experts, dtype=torch.long)
        flow = torch.zeros(experts, experts, dtype=torch.long)
        for token in mine:
            for e in token["ids"]:
                for other in token["ids"]:
                    together[e, other] += 1
                for other in token["before"] or []:
                    flow[other, e] += 1
        assert torch.equal(stats.get(position, "coactivation"), together)
        if position:
            assert torch.equal(stats.get(position, "transitions"), flow)
        ratios = stats.get(position, "weight_ratio")
        assert ratios.sum() == len(mine)
        expected_bin = [min(255, int(256 * min(t["weights"]) / max(t["weights"]))) for t in mine]
        mean = (ratios * torch.arange(256)).sum() / len(mine)
        assert abs(float(mean) - sum(expected_bin) / len(mine)) < 0.1


def test_kept_logits_by_share(model):
    view = MoEView(model)
    everything = profile(view, batches_of()).by_domain(0, "kept_logit_sum")
    with_share = profile(view, batches_of(), kept_share=0.6).by_domain(0, "kept_logit_sum")
    nothing = profile(view, batches_of(), kept_share=1.1).by_domain(0, "kept_logit_sum")
    assert not nothing.any()
    assert not torch.equal(everything, with_share)
    stats = profile(view, batches_of(), kept_share=0.6)
    with pytest.raises(UserError, match="kept_share"):
        stats.merge(profile(view, batches_of()))


def test_contribution_of_a_token():
    h = torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [3e3, 0.0]])
    r = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [-5.0, 0.0], [0.0, 1.0]])
    # Nothing and parallel: 0; right angle of 3 and 4: 1 - 3/5; turned round: 2; and a change so
    # small that the plain formula in float32 gives 0 or noise.
    expected = [0.0, 0.0, 0.4, 2.0, 1 - math.cos(math.atan(1 / 3e3))]
    assert token_contributions(h, r).tolist() == pytest.approx(expected, rel=1e-5)


def test_padding_changes_nothing(model):
    """The same sequences alone and padded count the same."""
    ids = padded_batch(9, seed=3).ids[:1]
    alone = Batch(ids[:, :6], None, ["a"])
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    padded = Batch(ids, mask, ["a"])
    first, second = (profile(MoEView(model), [b]) for b in (alone, padded))
    for key, value in first.held.items():
        torch.testing.assert_close(second.held[key], value, **CLOSE)


# One of each way to run experts; the rest of the families in the whole grid.
FAST = {"qwen3_moe", "gpt_oss", "nemotron_h", "llama4", "dbrx", "longcat_flash", "zaya"}


@pytest.mark.parametrize(
    "family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in TINY]
)
def test_every_family_runs_its_experts_as_itself(family):
    """The loop over experts computes what the family's own experts compute."""
    model = build_tiny(family)
    calls = []
    with (
        MoEView(model).observe(calls.append),
        torch.no_grad(),
    ):
        model(**tiny_inputs(family, model))
    assert calls
    for call in calls:
        rows = []
        with torch.no_grad():
            fast = run_routed(call.layer, call.hidden, call.ids, call.weights, rows.append)
            usable = call.ids.where(call.ids < max(call.layer.num_experts, _runs(call.layer)), -1)
            slow = call.layer.run_naive(call.hidden, usable, call.weights)
        scale = float(slow.abs().max()) + 1e-6
        # float32, sums of at most a few hundred terms in another order.
        torch.testing.assert_close(fast / scale, slow / scale, rtol=0, atol=2e-5)
        seen = torch.cat([r.pairs for r in rows]) if rows else torch.tensor([])
        assert len(seen.unique()) == len(seen) == int((usable >= 0).sum())


def _runs(layer):
    from moekit.profile.experts_run import runs_choices

    return layer.num_choices if runs_choices(layer) else 0


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_rounded_numbers_of_rows_in_low_precision(family):
    model = build_tiny(family, torch.bfloat16)
    calls = []
    with MoEView(model).observe(calls.append), torch.no_grad():
        model(**tiny_inputs(family, model))
    for call in calls:
        rows = []
        with torch.no_grad():
            fast = run_routed(call.layer, call.hidden, call.ids, call.weights, rows.append)
            slow = call.layer.run_naive(call.hidden, call.ids, call.weights).float()
        for part in rows:
            assert len(part.output) == len(part.middle) == len(part.tokens)
        # bf16 rounds to 8 bits, in every product and in every sum.
        assert (fast.float() - slow).norm() < 0.02 * slow.norm()
