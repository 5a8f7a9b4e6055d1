"""Measures that run the model again on the tokens of a trace."""

import math

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from moekit.analyze.next_gate import next_gate
from moekit.analyze.proxy_metrics import proxy_metrics, token_statistics, token_weights
from moekit.core.collect import collect, pad_batches
from moekit.core.errors import UserError
from moekit.core.trace_writer import TraceWriter
from moekit.core.view import MoEView
from tests.models import tiny_config

from .traces import make_trace, random_ids


def model(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen3MoeForCausalLM(tiny_config(num_hidden_layers=3, **changes)).eval()


@pytest.fixture(scope="module")
def view():
    return MoEView(model())


def traced(view):
    generator = torch.Generator().manual_seed(1)
    lengths = (40, 23, 31)
    samples = [
        (torch.randint(0, 320, (n,), generator=generator).tolist(), f"d{n}") for n in lengths
    ]
    writer = TraceWriter()
    collect(view, pad_batches(samples, 2), [writer])
    return writer.trace


def test_next_gate_is_exact_where_layers_add_nothing():
    """Without attention and experts every layer sees the same residual, and norms are equal."""
    still = model()
    with torch.no_grad():
        for layer in still.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.down_proj.zero_()
    view = MoEView(still)
    result = next_gate(traced(view), view, widen=1)
    assert result.column("+0") == [1, 1]
    assert result.summary["tokens"] == 94


def test_next_gate_by_hand(view):
    """Each layer's recorded router input through the next router, without padding or batches."""
    trace = traced(view)
    result = next_gate(trace, view, widen=2)
    hits, chosen = torch.zeros(2, 3), 0
    for sample in trace.samples:
        calls = []
        with torch.no_grad(), view.observe(calls.append, logits=True):
            view.model(trace.tokens[sample.start : sample.stop][None])
        chosen += 2 * len(calls[0].hidden)
        for row in range(2):
            logits = calls[row].router_input.flatten(0, -2) @ view[row + 1].router_weight.T
            for extra in range(3):
                guess = logits.topk(2 + extra).indices
                found = (calls[row + 1].ids[:, :, None] == guess[:, None, :]).any(-1)
                hits[row, extra] += found.sum()
    for row in range(2):
        assert result.rows[row][2:] == pytest.approx((hits[row] / chosen).tolist())
    # More guesses find more; all four experts are all.
    assert (hits.diff(dim=1) >= 0).all()
    assert result.rows[0][-1] == 1


def test_layers_that_replace_the_residual_are_not_predicted():
    """Each layer drowns what came before it: a router sees nothing of its input a layer early."""
    wild = model(num_experts=16)
    with torch.no_grad():
        for number, layer in enumerate(wild.model.layers):
            layer.mlp.experts.down_proj.mul_(100.0 ** (number + 1))
    view = MoEView(wild)
    trace = traced(view)
    found = next_gate(trace, view, widen=0)
    for row, value in enumerate(found.column("+0")):
        ids = trace.layer(row + 1).topk_ids
        load = torch.bincount(ids.flatten(), minlength=16) / len(ids)
        # The most that a guess without knowledge finds is the two most used experts.
        assert value < float(load.topk(2).values.sum()) / 2 + 0.05


def test_proxy_statistics_of_a_model_that_knows():
    targets = torch.tensor([0, 3, 2])
    sure = token_statistics(100 * torch.nn.functional.one_hot(targets, 5), targets)
    assert sure["rank"].tolist() == [1, 1, 1]
    for name in ("loss", "margin", "entropy", "wrong_confidence"):
        assert sure[name].tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert sure["top1"].tolist() == [1, 1, 1]


def test_proxy_statistics_of_a_model_that_does_not():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    found = token_statistics(logits, torch.tensor([2]))
    p = logits.softmax(-1)[0]
    assert found["rank"] == 3
    assert [float(found[f"top{k}"]) for k in (1, 2, 3, 5)] == [0, 0, 1, 1]
    assert float(found["margin"]) == pytest.approx(float(p[0] - p[2]), rel=1e-5)
    assert float(found["wrong_confidence"]) == pytest.approx(float(p[0]), rel=1e-5)
    uniform = token_statistics(torch.zeros(1, 4), torch.tensor([1]))
    assert float(uniform["entropy"]) == pytest.approx(1)
    assert float(uniform["loss"]) == pytest.approx(math.log(4))
    assert token_weights(found, torch.tensor([4]))["1/frequency"].tolist() == [0.25]


def test_uniform_loss_is_the_ordinary_one(view):
    trace = traced(view)
    result = proxy_metrics(trace, view)
    losses = []
    for sample in trace.samples:
        tokens = trace.tokens[sample.start : sample.stop][None]
        with torch.no_grad():
            losses.append(float(view.model(tokens, labels=tokens).loss))
    assert result.summary["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert result.summary["tokens"] == 91


def test_another_model_and_unknown_tokens_are_refused(view):
    trace = make_trace(random_ids(20, 4, 2, layers=3), 4, model_type="olmoe")
    with pytest.raises(UserError, match="of a olmoe model, the model given is qwen3_moe"):
        next_gate(trace, view)
    trace = make_trace(random_ids(20, 4, 2, layers=2), 4, model_type="qwen3_moe")
    with pytest.raises(UserError, match="2 MoE layers, the model 3"):
        proxy_metrics(trace, view)
    trace = make_trace(random_ids(20, 8, 2, layers=3), 8, model_type="qwen3_moe")
    with pytest.raises(UserError, match=r"\(0, 8, 2\) in the trace and \(0, 4, 2\) in the model"):
        proxy_metrics(trace, view)
    ids, tokens = random_ids(20, 4, 2, layers=3), torch.full((20,), -1)
    with pytest.raises(UserError, match="cannot be run again"):
        next_gate(make_trace(ids, 4, tokens=tokens, model_type="qwen3_moe"), view)
