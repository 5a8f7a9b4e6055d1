"""One pass: what sinks are given, and in which order."""

from __future__ import annotations

import pytest
import torch

from moekit.core.collect import Batch, collect, pad_batches
from moekit.core.errors import UserError
from moekit.core.view import MoEView
from tests.families.tiny import build_tiny, tiny_inputs


class Log:
    """A sink that notes what it is told."""

    def __init__(self):
        self.events: list[str] = []
        self.calls = []

    def start(self, view):
        self.events.append("start")

    def batch(self, batch):
        self.events.append("batch")

    def layer(self, call):
        self.events.append(f"layer {call.layer.position}")
        self.calls.append(call)

    def end_batch(self):
        self.events.append("end")

    def close(self):
        self.events.append("close")


@pytest.fixture
def view():
    return MoEView(build_tiny("qwen3_moe"))


def test_every_sink_sees_every_call_of_one_pass(view):
    sinks = [Log(), Log()]
    forwards = []
    handle = view.model.register_forward_hook(lambda *args: forwards.append(1))
    collect(view, [torch.tensor([[3, 4, 5]]), Batch(torch.tensor([[6], [7]]))], sinks)
    handle.remove()
    one = ["batch", "layer 0", "layer 1", "end"]
    assert sinks[0].events == sinks[1].events == ["start", *one, *one, "close"]
    assert len(forwards) == 2
    assert [len(call.hidden) for call in sinks[0].calls] == [3, 3, 2, 2]


def test_padding_is_marked(view):
    sink = Log()
    batches = pad_batches([([5, 6], "a"), ([7, 8, 9], "b")], 2)
    collect(view, batches, [sink])
    assert sink.calls[0].mask.tolist() == [True, True, False, True, True, True]


def test_pad_batches():
    samples = [([1, 2, 3], "a"), ([4], "b"), ([5, 6], "a")]
    right = list(pad_batches(samples, 2, pad_id=9))
    assert right[0].ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert right[0].mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert right[0].domains == ["a", "b"]
    assert right[1].ids.tolist() == [[5, 6]]
    left = next(pad_batches(samples, 2, side="left"))
    assert left.ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert left.mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_padding_does_not_change_the_routing_of_the_other_tokens(view):
    alone, padded = Log(), Log()
    collect(view, pad_batches([([5, 6], "")], 1), [alone])
    collect(view, pad_batches([([5, 6], ""), ([7, 8, 9, 10], "")], 2), [padded])
    for one, other in zip(alone.calls, padded.calls, strict=True):
        assert torch.equal(one.ids, other.ids[:4][other.mask[:4]])


def test_the_pass_runs_in_evaluation_mode_and_restores_the_modes(view):
    model = view.model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    seen = []

    class Modes(Log):
        def layer(self, call):
            seen.append((model.training, torch.is_grad_enabled()))

    collect(view, [torch.tensor([[3, 4]])], [Modes()])
    assert set(seen) == {(False, False)}
    assert [module.training for module in model.modules()] == modes


def test_prompts_and_steps_are_told_apart_under_generate(view):
    sink = Log()
    batches = pad_batches([([5, 6], ""), ([7, 8, 9], "")], 2, side="left")
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    collect(view, batches, [sink], generate=options)
    first = [call for call in sink.calls if call.layer.position == 0]
    assert [(call.phase, len(call.ids)) for call in first] == [
        ("prefill", 6),
        ("decode", 2),
        ("decode", 2),
    ]


def test_ended_sequences_count_as_padding(view):
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    (batch,) = pad_batches([([5, 6], ""), ([7, 8, 9], "")], 2, side="left")
    out = view.model.generate(batch.ids, attention_mask=batch.mask, **options)
    # Let the first token that the first sequence makes end it; the other one goes on.
    end = int(out[0, 3])
    assert end not in out[1]
    sink = Log()
    collect(view, [batch], [sink], generate={**options, "eos_token_id": end})
    masks = [call.mask.tolist() for call in sink.calls if call.layer.position == 0]
    assert masks == [[False] + [True] * 5, [False, True], [False, True], [False, True]]


def test_beams_are_refused(view):
    with pytest.raises(UserError, match="num_beams=1"):
        collect(view, [], [], generate={"num_beams": 2})


def test_sinks_are_not_closed_after_a_failure(view):
    class Failing(Log):
        def layer(self, call):
            raise RuntimeError("full")

    sink = Failing()
    with pytest.raises(RuntimeError, match="full"):
        collect(view, [torch.tensor([[3]])], [sink])
    assert "close" not in sink.events


def test_an_encoder_decoder_runs_with_further_inputs():
    model = build_tiny("switch_transformers")
    inputs = tiny_inputs("switch_transformers", model)
    decoder_ids = inputs["decoder_input_ids"][:, :4]
    sink = Log()
    batch = Batch(inputs["input_ids"], inputs={"decoder_input_ids": decoder_ids})
    collect(MoEView(model), [batch], [sink])
    assert [call.tokens.batch_shape for call in sink.calls] == [(2, 9), (2, 4)]
