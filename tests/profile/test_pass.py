"""Splits of the data, sets on request, refusals, and the pass beside other sinks."""

from __future__ import annotations

import pytest
import torch

from moekit.core.collect import Batch
from moekit.core.errors import UserError
from moekit.core.stats import Lazy, merge_all
from moekit.core.stats_table import STATISTICS
from moekit.core.trace_writer import TraceWriter
from moekit.core.view import MoEView
from moekit.ops.experts_naive import run_expert, run_up
from moekit.profile import profile, shortfalls
from tests.families.tiny import build_tiny
from tests.profile.common import batches_of, differences, padded_batch

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def view():
    return MoEView(build_tiny("qwen3_moe"))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "granitemoehybrid", "gpt_oss"])
def test_any_split_of_the_data_adds_up(family):
    view = MoEView(build_tiny(family))
    batch = padded_batch(12)
    whole = profile(view, [batch])
    rows = [
        Batch(batch.ids[i : i + 1], batch.mask[i : i + 1], [batch.domains[i]]) for i in range(3)
    ]
    parts = merge_all(profile(view, [row]) for row in rows)
    assert parts.domains == whole.domains
    for (position, name), value in whole.held.items():
        other = parts.get(position, name)
        if not STATISTICS[name].dtype.is_floating_point:
            assert torch.equal(value, other), name
        else:
            error = (value - other).double().norm() / value.double().norm()
            assert error < 1e-6, (name, float(error))


def test_profiling_leaves_the_model_alone(view):
    batch = padded_batch(9)
    with torch.no_grad():
        before = view.model(input_ids=batch.ids).logits
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in view.model.modules())
    profile(view, [batch], sets=("default", "full", "outputs"), layers=[0])
    with pytest.raises(UserError):
        profile(view, [Batch(batch.ids)], layers=[9], sets=("full",))
    with torch.no_grad():
        assert torch.equal(view.model(input_ids=batch.ids).logits, before)
    assert hooks == sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in view.model.modules()
    )
    assert all("forward" not in m.__dict__ for m in view.model.modules())


def test_a_trace_of_the_same_pass(view):
    writer = TraceWriter()
    stats = profile(view, batches_of(), sinks=[writer])
    for position in range(len(view)):
        ids = writer.trace.layer(position).topk_ids
        assert torch.equal(ids.flatten().bincount(minlength=8), stats.counts(position))


def inputs_of(view, position):
    """(expert, gate, input, down input) of every unpadded choice of a layer."""
    found, inputs = [], []

    def see(call):
        if call.layer.position != position:
            return
        experts = call.layer.experts
        for t in call.mask.nonzero().flatten().tolist():
            inputs.append(call.hidden[t])
            for e, w in zip(call.ids[t].tolist(), call.weights[t].tolist(), strict=True):
                row = call.hidden[t : t + 1]
                found.append((e, w, row[0], run_up(experts, e, row)[0]))

    with view.observe(see), torch.no_grad():
        for batch in batches_of():
            view.model(input_ids=batch.ids, attention_mask=batch.mask)
    return found, torch.stack(inputs)


def test_diagonal_moments(view):
    stats = profile(view, batches_of(), sets=("diagonal",), layers=[1])
    found, _ = inputs_of(view, 1)
    for e in range(view[1].num_experts):
        mine = [(w, x, m) for other, w, x, m in found if other == e]
        assert stats.get(1, "moment_tokens")[e] == len(mine)
        for role, i in (("input", 1), ("middle", 2)):
            if not mine:
                assert not stats.get(1, f"{role}_sq")[e].any()
                continue
            x = torch.stack([row[i] for row in mine]).double()
            w = torch.tensor([row[0] for row in mine]).double().unsqueeze(-1)
            for name, expected in (
                (f"{role}_sq", x.square().sum(0)),
                (f"{role}_abs", x.abs().sum(0)),
                (f"{role}_peak", x.abs().amax(0).float()),
                (f"gated_{role}_sq", (w * x).square().sum(0)),
            ):
                torch.testing.assert_close(stats.get(1, name)[e], expected, **CLOSE)
    assert not stats.has(0, "input_sq")


def test_full_moments_of_routed_and_of_all_tokens(view):
    found, inputs = inputs_of(view, 0)
    routed = profile(view, batches_of(), sets=("full",), layers=[0])
    for e in range(view[0].num_experts):
        mine = [(x, m) for other, _, x, m in found if other == e]
        for i, name in enumerate(("input_second", "middle_second")):
            rows = torch.stack([row[i] for row in mine]) if mine else torch.zeros(1, 8)
            expected = rows.T @ rows if mine else torch.zeros_like(routed.get(0, name)[e])
            torch.testing.assert_close(routed.get(0, name)[e], expected, **CLOSE)
    everyone = profile(view, batches_of(), sets=("full",), layers=[0], all_tokens=True)
    for e in range(view[0].num_experts):
        middle = run_up(view[0].experts, e, inputs)
        torch.testing.assert_close(everyone.get(0, "input_second")[e], inputs.T @ inputs, **CLOSE)
        torch.testing.assert_close(everyone.get(0, "middle_second")[e], middle.T @ middle, **CLOSE)
    with pytest.raises(UserError, match="moments_over"):
        routed.merge(everyone)


def test_running_all_experts_keeps_the_routed_output(view):
    """What later layers see does not change by what is measured in earlier ones."""
    plain = profile(view, batches_of())
    heavy = profile(view, batches_of(), sets=("default", "full", "outputs"), all_tokens=True)
    cheap = {k: v for k, v in heavy.held.items() if not STATISTICS[k[1]].heavy}
    assert cheap.keys() == plain.held.keys()
    assert all(torch.equal(cheap[k], v) for k, v in plain.held.items())


def test_output_similarity(view):
    stats = profile(view, batches_of(), sets=("outputs",), layers=[0])
    _, inputs = inputs_of(view, 0)
    outputs = torch.stack([run_expert(view[0].experts, e, inputs) for e in range(8)]).double()
    assert stats.get(0, "output_tokens") == len(inputs)
    for name, expected in (
        ("output_sum", outputs.sum(1)),
        ("output_norm_sum", outputs.norm(dim=-1).sum(1)),
        ("output_gram", torch.einsum("etd,ftd->ef", outputs, outputs)),
    ):
        torch.testing.assert_close(stats.get(0, name), expected, **CLOSE)


def test_as_many_passes_as_memory_asks_for(view, tmp_path):
    """One layer at a time, set aside on disk, gives what all at once gives; later layers rest."""
    from moekit.profile.input_moments import InputMoments

    size = InputMoments(full=True).bytes(view[0])
    at_once = profile(view, batches_of(), sets=("full",))
    ran = []
    handle = view.model.model.layers[-1].register_forward_hook(lambda *_: ran.append(1))
    forwards = []
    one_by_one = profile(
        view,
        batches_of(),
        sets=("full",),
        heavy_bytes=size,
        scratch=tmp_path,
        progress=lambda done, total: forwards.append((done, total)),
    )
    handle.remove()
    assert differences(at_once, one_by_one) == []
    assert all(isinstance(v, Lazy) for v in one_by_one.held.values())
    passes = len(view)
    assert forwards[-1] == (2 * passes, 2 * passes)
    # Every forward ends at the last layer it is for, so the last layer never ends one normally.
    assert ran == []
    with pytest.raises(UserError, match="more than the"):
        profile(view, batches_of(), sets=("full",), heavy_bytes=size - 1)


def test_refusals(view):
    with pytest.raises(UserError, match="0 sequences"):
        profile(view, [])
    with pytest.raises(UserError, match="unknown set 'x'"):
        profile(view, batches_of(), sets=("x",))
    with pytest.raises(UserError, match="exclude each other"):
        profile(view, batches_of(), sets=("full", "diagonal"))
    with pytest.raises(UserError, match="input moments are not available for Llama4Layer"):
        profile(MoEView(build_tiny("llama4")), batches_of(), sets=("full",))


def test_why_experts_fell_short(view):
    batches = [padded_batch(12, seed=s) for s in range(3)]
    with view.ban_experts({0: [3]}):
        stats = profile(view, batches)
    # The logits were edited to -inf, which is what a ban is; ask the plain layer below instead.
    banned = [s for s in shortfalls(stats, 1) if s.expert == 3 and s.layer == view[0].index]
    assert [(s.tokens, s.tokens_needed) for s in banned] == [(0, None)]
    assert "never chosen" in banned[0].reason
    for short in shortfalls(stats, 10**6):
        if short.tokens:
            assert "the text is short" in short.reason
            total = stats.num_tokens(0)
            assert short.tokens_needed >= 10**6 * total / short.tokens
    fair = stats.counts(1).sum().item() / 8
    rare = [s for s in shortfalls(stats, int(fair)) if s.layer == view[1].index and s.tokens]
    assert rare
    assert all("rarely chosen" in s.reason for s in rare)
    assert shortfalls(stats, 0) == []


def test_short_text_is_the_reason_before_any_other(view):
    """An expert that a few tokens never chose is not kept out by anything."""
    stats = profile(view, [padded_batch(6)])
    never = [s for s in shortfalls(stats, 100) if not s.tokens]
    assert never
    assert all(s.reason.startswith("never chosen; the text is short") for s in never)


def test_a_likely_expert_kept_out_by_a_bias_is_told_apart():
    view = MoEView(build_tiny("deepseek_v3"))
    layer = view[0]
    stats = profile(view, batches_of())
    likely = int(stats.by_domain(0, "softmax_sum").argmax())
    layer.correction_bias[likely] = -10
    found = [s for s in shortfalls(profile(view, batches_of()), 1) if s.layer == layer.index]
    assert "bias or group limit keeps it out" in next(s for s in found if s.expert == likely).reason
