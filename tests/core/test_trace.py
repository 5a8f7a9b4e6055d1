"""Traces: what is written, what is read back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from moekit.core.collect import Batch, collect, pad_batches
from moekit.core.errors import UserError
from moekit.core.forward_context import TokenContext
from moekit.core.port import SeamCall
from moekit.core.routing_rule import Routing
from moekit.core.trace import DECODE, PREFILL, RoutingTrace, Sample
from moekit.core.trace_writer import TraceWriter
from moekit.core.view import MoEView
from tests.families.tiny import build_tiny, tiny_inputs

SAMPLES = [([5, 6, 7], "code"), ([8, 9, 10, 11, 12], "maths"), ([13], "code")]


@pytest.fixture(scope="module")
def view():
    return MoEView(build_tiny("qwen3_moe"))


def written(view: MoEView, out: Path | None, **options) -> RoutingTrace:
    writer = TraceWriter(out, **options)
    collect(view, pad_batches(SAMPLES, 2), [writer], logits=options.get("logits", False))
    return writer.trace


def test_samples_domains_and_tokens(view, tmp_path):
    trace = written(view, tmp_path / "trace")
    assert len(trace) == 9
    assert trace.samples == [Sample(0, 3, "code"), Sample(3, 8, "maths"), Sample(8, 9, "code")]
    assert trace.domains == ["code", "maths"]
    assert trace.tokens.tolist() == [id for ids, _ in SAMPLES for id in ids]
    assert trace.sample_of.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 2]
    assert set(trace.phase.tolist()) == {PREFILL}


def test_disk_and_memory_agree_and_are_exact(view, tmp_path):
    on_disk = written(view, tmp_path / "trace", logits=True, metadata={"model": "tiny"})
    in_memory = written(view, None, logits=True)
    opened = RoutingTrace.open(tmp_path / "trace")
    in_memory.save(tmp_path / "saved")
    saved = RoutingTrace.open(tmp_path / "saved")
    assert opened.header.model_type == "qwen3_moe"
    assert opened.header.metadata == {"model": "tiny"}
    assert [(m.index, m.num_experts, m.top_k) for m in opened.layers] == [(1, 8, 2), (2, 8, 2)]
    for position in range(2):
        expected = in_memory.layer(position)
        assert expected.topk_ids.dtype == torch.int64
        for trace in (on_disk, opened, saved):
            found = trace.layer(position)
            assert torch.equal(found.topk_ids, expected.topk_ids)
            assert torch.equal(found.topk_weights, expected.topk_weights)
            assert torch.equal(found.logits, expected.logits)
    assert not (tmp_path / "trace.partial").exists()


def test_weights_keep_the_dtype_that_the_experts_received(tmp_path):
    view = MoEView(build_tiny("qwen3_moe", torch.bfloat16))
    written(view, tmp_path / "trace")
    assert RoutingTrace.open(tmp_path / "trace").layer(0).topk_weights.dtype == torch.bfloat16


def test_spans_and_slices_cross_chunks(view, tmp_path):
    trace = written(view, tmp_path / "trace", chunk_bytes=1)
    assert list(trace.spans()) == [(0, 8), (8, 9)]
    whole = trace.layer(1)
    for start, stop in [(0, 9), (2, 5), (7, 9), (8, 9), (4, 4), (9, 9)]:
        part = trace.layer(1, start, stop)
        assert torch.equal(part.topk_ids, whole.topk_ids[start:stop])
        assert torch.equal(part.topk_weights, whole.topk_weights[start:stop])
    with pytest.raises(UserError, match="tokens 0 to 9, not 3 to 10"):
        trace.layer(1, 3, 10)
    with pytest.raises(UserError, match="layers 0 to 1, not 2"):
        trace.layer(2)


def test_generation_keeps_prompt_and_steps_of_a_sample_together(view):
    writer = TraceWriter()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    collect(view, pad_batches(SAMPLES, 2, side="left"), [writer], generate=options)
    trace = writer.trace
    assert [s.stop - s.start for s in trace.samples] == [5, 7, 3]
    assert trace.phase.tolist() == [0, 0, 0, 1, 1] + [0] * 5 + [1, 1] + [0, 1, 1]
    assert trace.tokens[:3].tolist() == [5, 6, 7]
    with torch.no_grad():
        full = view.model.generate(torch.tensor([[5, 6, 7]]), **options)
    assert trace.tokens[:5].tolist() == full[0, :5].tolist()
    assert (trace.phase == DECODE).sum() == 6


def test_context_without_a_pass(view, tmp_path):
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with view.trace(tmp_path / "trace", domain="probe") as trace, torch.no_grad():
        view.model(ids)
        view.model(ids[:1])
        with pytest.raises(UserError, match="filled when its context ends"):
            trace.layer(0)
    assert trace.samples == [Sample(0, 3, "probe"), Sample(3, 6, "probe"), Sample(6, 9, "probe")]
    again = RoutingTrace.open(tmp_path / "trace")
    assert torch.equal(again.layer(1).topk_ids, trace.layer(1).topk_ids)
    assert torch.equal(again.layer(1).topk_ids[:3], again.layer(1).topk_ids[6:])


def test_layers_that_a_token_does_not_pass_have_no_ids():
    model = build_tiny("switch_transformers")
    inputs = tiny_inputs("switch_transformers", model)
    writer = TraceWriter()
    decoder_ids = inputs["decoder_input_ids"][:, :4]
    batch = Batch(inputs["input_ids"], inputs={"decoder_input_ids": decoder_ids})
    collect(MoEView(model), [batch], [writer])
    trace = writer.trace
    assert [s.stop - s.start for s in trace.samples] == [13, 13]
    encoder, decoder = trace.layer(0, 0, 13), trace.layer(1, 0, 13)
    assert (encoder.topk_ids[9:] == -1).all()
    assert (decoder.topk_ids[:9] == -1).all()
    assert not encoder.topk_weights[9:].any()
    assert (encoder.topk_ids[:9] >= 0).any()
    assert (decoder.topk_ids[9:] >= 0).any()


def test_layers_may_differ_and_ids_are_stored_as_small_as_they_fit(tmp_path):
    out = tmp_path / "trace"
    trace = _synthetic(out, tokens=6, batch_tokens=6, shapes=[(4, 1), (128, 2), (129, 3)])
    tensors = load_file(out / "chunk-00000.safetensors")
    assert [tensors[f"ids.{i}"].dtype for i in range(3)] == [torch.int8, torch.int8, torch.int16]
    assert [trace.layer(i).topk_ids.shape for i in range(3)] == [(6, 1), (6, 2), (6, 3)]
    assert [(m.num_experts, m.top_k) for m in trace.layers] == [(4, 1), (128, 2), (129, 3)]


def test_nothing_traced_is_an_empty_trace(view, tmp_path):
    with view.trace(tmp_path / "trace"):
        pass
    trace = RoutingTrace.open(tmp_path / "trace")
    assert len(trace) == 0
    assert trace.layer(0).topk_ids.shape == (0, 2)
    assert trace.samples == []


def test_a_failure_leaves_nothing_that_looks_finished(view, tmp_path):
    out = tmp_path / "trace"

    def interrupt(call):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), view.observe(interrupt, layers=[1]):
        written(view, out)
    assert not out.exists()
    with pytest.raises(UserError, match="is no trace"):
        RoutingTrace.open(out)
    written(view, out)  # the next attempt replaces what was left
    assert len(RoutingTrace.open(out)) == 9
    assert not (tmp_path / "trace.partial").exists()


def test_existing_outputs_are_not_touched(view, tmp_path):
    out = tmp_path / "trace"
    out.mkdir()
    with pytest.raises(UserError, match="exists already"):
        written(view, out)
    other = tmp_path / "other.partial"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis\.txt, which is no trace"):
        written(view, tmp_path / "other")
    assert (other / "thesis.txt").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        written(view, tmp_path / "file" / "trace")


def test_a_changed_number_of_experts_cannot_be_traced(view):
    def first(layer, routing, hidden):
        return Routing(None, routing.weights[:, :1], routing.ids[:, :1])

    with (
        pytest.raises(UserError, match="a token has 1 experts and not 2"),
        view.transform_routing(first, on="selection"),
    ):
        written(view, None)


def test_logits_need_a_pass_with_logits(view):
    with pytest.raises(UserError, match="logits=True"):
        collect(view, pad_batches(SAMPLES, 2), [TraceWriter(logits=True)])


# -- damaged and foreign files --


@pytest.fixture
def trace_dir(view, tmp_path):
    written(view, tmp_path / "trace")
    return tmp_path / "trace"


def _edit(directory: Path, **changes) -> None:
    path = directory / "trace.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_truncated_chunk(trace_dir):
    chunk = trace_dir / "chunk-00000.safetensors"
    chunk.write_bytes(chunk.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"chunk-00000\.safetensors is missing or truncated"):
        RoutingTrace.open(trace_dir)


def test_missing_chunk(trace_dir):
    (trace_dir / "chunk-00000.safetensors").unlink()
    with pytest.raises(UserError, match=r"chunk-00000\.safetensors is missing or truncated"):
        RoutingTrace.open(trace_dir)


def test_foreign_chunk(trace_dir):
    save_file({"tokens": torch.zeros(9)}, trace_dir / "chunk-00000.safetensors")
    with pytest.raises(UserError, match=r"phase is missing, expected \(9,\)"):
        RoutingTrace.open(trace_dir)


@pytest.mark.parametrize("content", ["{}", "[1]", '{"format": "other"}'])
def test_foreign_header(trace_dir, content):
    (trace_dir / "trace.json").write_text(content)
    with pytest.raises(UserError, match="is not the header of a moekit trace"):
        RoutingTrace.open(trace_dir)


def test_broken_header(trace_dir):
    path = trace_dir / "trace.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        RoutingTrace.open(trace_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "format version 2; this moekit reads version 1"),
        ({"lengths": [3, 5, 2]}, "its chunks hold 9 tokens and its samples 10"),
        ({"lengths": [3, -5, 11]}, "-5 is no count"),
        ({"sample_domains": [0, 7, 0]}, "domain 7 of 2"),
        ({"sample_domains": [0]}, "3 lengths, 1 domains"),
        ({"layers": [{}]}, "KeyError"),
        ({"chunks": [{"file": "../secret", "num_tokens": 9}]}, "'../secret' is no chunk name"),
        ({"chunks": []}, "its chunks hold 0 tokens"),
    ],
)
def test_damaged_header(trace_dir, changes, message):
    _edit(trace_dir, **changes)
    with pytest.raises(UserError, match=message):
        RoutingTrace.open(trace_dir)


def test_header_that_disagrees_with_its_chunks(trace_dir):
    layers = json.loads((trace_dir / "trace.json").read_text())["layers"]
    layers[1]["top_k"] = 4
    _edit(trace_dir, layers=layers)
    with pytest.raises(UserError, match=r"ids\.1 is \(9, 2\), expected \(9, 4\)"):
        RoutingTrace.open(trace_dir)


# -- size --


def _synthetic(
    out: Path, tokens: int, batch_tokens: int, shapes: list[tuple[int, int]]
) -> RoutingTrace:
    """Write random routing of `tokens` tokens, layers of (E, K) each, without a model."""
    layers = [
        SimpleNamespace(
            position=i, index=i, name=f"layers.{i}", num_experts=e, num_choices=e, top_k=k
        )
        for i, (e, k) in enumerate(shapes)
    ]
    writer = TraceWriter(out)
    writer.start(_FakeView(layers))
    for forward in range(tokens // batch_tokens):
        ids = torch.full((1, batch_tokens), forward)
        writer.batch(Batch(ids))
        context = TokenContext(forward, None, ids.flatten(), (1, batch_tokens), 0)
        for layer in layers:
            chosen = torch.randint(0, layer.num_experts, (batch_tokens, layer.top_k))
            weights = torch.rand(batch_tokens, layer.top_k)
            hidden = torch.empty(batch_tokens, 1)
            writer.layer(SeamCall(layer, hidden, chosen, weights, None, None, {}, context))
        writer.end_batch()
    writer.close()
    return RoutingTrace.open(out)


class _FakeView(list):
    model = None


def _anonymous_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


@pytest.mark.slow
def test_a_million_tokens_in_bounded_memory(tmp_path):
    """24 layers of top 8: about 1 GB on disk, written and read back within a fraction of it."""
    before = _anonymous_mib()
    trace = _synthetic(tmp_path / "trace", 2**20, 2**12, [(128, 8)] * 24)
    written_peak = _anonymous_mib()
    assert len(trace) == 2**20
    size = sum(f.stat().st_size for f in (tmp_path / "trace").iterdir())
    assert size > 900 * 2**20
    counts = torch.zeros(128, dtype=torch.long)
    peak = 0.0
    for start, stop in trace.spans():
        for position in range(len(trace.layers)):
            counts += trace.layer(position, start, stop).topk_ids.flatten().bincount(minlength=128)
            peak = max(peak, _anonymous_mib())
    assert counts.sum() == 2**20 * 24 * 8
    # two chunks of 64 MiB while they are put together, and the allocator's slack
    assert max(peak, written_peak) - before < 400
