"""Super experts: found where planted, none where there is none."""

import numpy as np
import pytest
import torch

from moekit.analyze.attention_sink import attention_sink
from moekit.analyze.super_experts import measure_peaks, skipped, super_experts

from .models import tiny_view, traced

PLANTED = (1, 5)


@pytest.fixture(scope="module")
def planted():
    """Expert 5 of the middle layer has its down projection a thousand times as large."""
    view = tiny_view()
    with torch.no_grad():
        view[1].expert_views(PLANTED[1]).down.mul_(1000)
    return view


def test_the_planted_expert_is_the_only_one(planted):
    result = super_experts(traced(planted), planted)
    assert result.detail["super_experts"] == [PLANTED]
    first = result.rows[0]
    assert (first[0], first[1], first[-1]) == (*PLANTED, True)
    # The down projection stands out by what it was multiplied with, give or take the random draw.
    assert 300 < dict(zip(result.columns, first, strict=True))["down"] < 3000
    forms = [row["forms"] for row in result.detail["layers"]]
    assert forms == [False, True, False]


@pytest.mark.parametrize("seed", range(4))
def test_a_random_model_has_none(seed):
    view = tiny_view(seed)
    result = super_experts(traced(view), view)
    assert result.summary["super_experts"] == 0
    assert "sink_decay" not in result.summary


def test_large_outputs_that_all_tokens_get_are_not_massive():
    """Every expert of a layer a thousand times as large: no expert stands out from its layer."""
    view = tiny_view()
    with torch.no_grad():
        view[1].experts.down_proj.mul_(1000)
    assert super_experts(traced(view), view).summary["super_experts"] == 0


def test_peaks_by_hand(planted):
    """The largest output of each expert over the tokens that chose it, and where that token is."""
    trace = traced(planted)
    ids = [trace.tokens[s.start : s.stop].tolist() for s in trace.samples]
    peaks = measure_peaks(planted, ids)
    expected = np.full((3, 16), -1.0)
    place = np.full((3, 16), -1)
    for sample in ids:
        calls = []
        with torch.no_grad(), planted.observe(calls.append):
            planted.model(torch.tensor([sample]))
        for call in calls:
            row = call.layer.position
            for token, chosen in enumerate(call.ids.tolist()):
                for expert in chosen:
                    row_in = call.hidden[token : token + 1]
                    out = call.layer.run_expert(expert, row_in).detach()
                    if float(out.abs().max()) > expected[row, expert]:
                        expected[row, expert] = float(out.abs().max())
                        place[row, expert] = token
    for row in range(3):
        # Batched and single-row products differ in rounding.
        np.testing.assert_allclose(peaks.output[row], expected[row], rtol=1e-4)
        assert (peaks.place[row] == place[row]).all()


def test_the_order_of_samples_does_not_matter(planted):
    trace = traced(planted)
    ids = [trace.tokens[s.start : s.stop].tolist() for s in trace.samples]
    one, other = measure_peaks(planted, ids), measure_peaks(planted, ids[::-1])
    for row in range(3):
        assert (one.output[row] == other.output[row]).all()


def test_skipping_takes_away_the_output_and_nothing_else(planted):
    """The layer without the expert, by hand: the same weights for the other choice."""
    tokens = torch.arange(30)[None]
    calls = []
    with torch.no_grad(), skipped(planted, {PLANTED}), planted.observe(calls.append):
        planted.model(tokens)
    plain = []
    with torch.no_grad(), planted.observe(plain.append):
        planted.model(tokens)
    hit = plain[1].ids == PLANTED[1]
    assert hit.any()
    assert (calls[1].ids[hit] == -1).all()
    assert (calls[1].weights[hit] == 0).all()
    assert torch.equal(calls[1].weights[~hit], plain[1].weights[~hit])


def test_sink_of_known_attention():
    """Queries of zero attend to every visible token alike; the measure then equals uniform."""
    view = tiny_view()
    with torch.no_grad():
        for layer in view.model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    sink = attention_sink(view, [list(range(40))])
    assert sink.strength == pytest.approx(sink.uniform, rel=1e-5)
    assert sink.uniform == pytest.approx(sum(1 / n for n in range(17, 41)) / 24)
    assert view.model.config._attn_implementation == "sdpa"
    assert attention_sink(view, [[1, 2, 3]]) is None
