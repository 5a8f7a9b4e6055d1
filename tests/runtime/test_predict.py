"""Predictors on routing whose best prediction is known, and on routing that has none."""

import json

import numpy as np
import pytest
import torch

from moekit.core.collect import Batch, pad_batches
from moekit.core.errors import UserError
from moekit.core.registry import registry
from moekit.core.view import MoEView
from moekit.runtime.predict.files import (
    HEADER,
    TENSORS,
    load_predictor,
    make_predictor,
    save_predictor,
)
from moekit.runtime.predict.gates import Gate, gates_of, plain_gate
from moekit.runtime.predict.measure import measure
from moekit.runtime.predict.recorded import Recording, record
from tests.families.tiny import build_tiny

from .routing import make_trace, random_ids

EXPERTS, WIDTH = 8, 2
LEARNED = ("popularity", "moe-infinity", "premoe", "transitions", "edgemoe", "expertflow")
# Standard error of a recall at chance over 600 tokens of 2 experts is below 0.013.
NOISE = 0.05


def split(ids, tokens=None, count=600, sample=20):
    """A trace to learn from and a recording of the rest."""
    tokens = np.zeros(len(ids), dtype=int) if tokens is None else tokens
    learned, held = slice(0, -count), slice(-count, None)
    traces = [
        make_trace(ids[part], EXPERTS, tokens=tokens[part], lengths=[sample] * (len(x) // sample))
        for part in (learned, held)
        for x in [ids[part]]
    ]
    return traces[0], Recording.of(traces[1])


def recall(name, trace, recording, ahead=1, batch=1, **options):
    predictor = make_predictor(name, traces=[trace], **options)
    return measure(predictor, recording, batch=batch)[ahead - 1].recall[0]


@pytest.mark.parametrize("name", ["random", *LEARNED])
def test_random_routing_cannot_be_predicted(name):
    trace, recording = split(random_ids(2600, EXPERTS, WIDTH, 3))
    assert recall(name, trace, recording) == pytest.approx(WIDTH / EXPERTS, abs=NOISE)


def follows_two(steps, seed=0):
    """Top 1; layer 2 is a function of layers 0 and 1 together and of neither alone."""
    ids = random_ids(steps, EXPERTS, 1, 3, seed)
    ids[:, 2] = (ids[:, 0] + ids[:, 1]) % EXPERTS
    return ids


def test_pairs_predict_what_single_experts_cannot():
    trace, recording = split(follows_two(2600))
    paired = measure(make_predictor("edgemoe", traces=[trace]), recording)[0]
    assert paired.by_layer[2] == 1
    single = measure(make_predictor("transitions", traces=[trace]), recording)[0]
    assert single.by_layer[2] == pytest.approx(1 / EXPERTS, abs=NOISE)


def test_few_pairs_fall_back_on_single_experts():
    ids = random_ids(2600, EXPERTS, 1, 3)
    ids[:, 2] = (ids[:, 1] + 1) % EXPERTS
    trace, recording = split(ids)
    assert recall("edgemoe", trace, recording, pairs=1) > 0.5
    found = measure(make_predictor("edgemoe", traces=[trace], pairs=1), recording)[0]
    assert found.by_layer[2] == 1


@pytest.mark.parametrize("name", ["transitions", "edgemoe", "expertflow"])
def test_a_chain_of_layers_is_predicted_three_ahead(name):
    ids = np.repeat(random_ids(4600, EXPERTS, WIDTH, 1), 4, axis=1)
    ids = (ids + np.arange(4)[:, None]) % EXPERTS
    trace, recording = split(ids)
    for ahead in (1, 2, 3):
        assert recall(name, trace, recording, ahead) > 0.9


def test_the_network_knows_what_a_token_uses_before_any_layer_ran():
    tokens = np.random.default_rng(3).integers(0, 50, 4600)
    ids = random_ids(50, EXPERTS, WIDTH, 2)[tokens]
    trace, recording = split(ids, tokens)
    predictor = make_predictor("expertflow", traces=[trace], epochs=8)
    predictor.start(2, EXPERTS, WIDTH)
    hits = 0
    for row in range(200):
        predictor.begin(recording.tokens[row : row + 1])
        order = np.argsort(-predictor.predict(-1, 1))
        hits += len(set(order[:WIDTH]) & set(recording.ids[0][row]))
    assert hits > 0.95 * 200 * WIDTH


def two_kinds(steps=2600, sample=20):
    """Sequences that keep to one half of the experts in every layer, in turns of two domains."""
    half = random_ids(steps, EXPERTS // 2, WIDTH, 3)
    kind = (np.arange(steps) // sample) % 2
    ids = half + kind[:, None, None] * (EXPERTS // 2)
    domains = ["low" if k == 0 else "high" for k in kind[::sample]]
    return ids, domains, sample


@pytest.mark.parametrize("name", ["premoe", "moe-infinity"])
def test_profiles_find_the_kind_of_text_on_the_first_token(name):
    ids, domains, sample = two_kinds()
    trace = make_trace(ids, EXPERTS, lengths=[sample] * len(domains), domains=domains)
    predictor = make_predictor(name, traces=[trace])
    for half in (0, 4):
        predictor.start(3, EXPERTS, WIDTH)
        predictor.begin()
        predictor.observe(0, [[half, half + 1]])
        best = np.argsort(-predictor.predict(0, 2))[:4]
        assert set(best) == set(range(half, half + 4))


def test_keep_sets_are_those_of_the_task():
    ids, domains, sample = two_kinds()
    trace = make_trace(ids, EXPERTS, lengths=[sample] * len(domains), domains=domains)
    predictor = make_predictor("premoe", traces=[trace])
    predictor.start(3, EXPERTS, WIDTH)
    predictor.begin()
    predictor.observe(0, [[5, 6], [4, 7]])
    assert [kept.tolist() for kept in predictor.keep_sets(4)] == [[4, 5, 6, 7]] * 3
    assert [kept.tolist() for kept in predictor.keep_sets(EXPERTS)] == [list(range(EXPERTS))] * 3


def test_capacity_bounds_the_profiles_of_samples():
    ids, domains, sample = two_kinds()
    trace = make_trace(ids, EXPERTS, lengths=[sample] * len(domains), domains=domains)
    few = make_predictor("moe-infinity", traces=[trace], capacity=7)
    assert len(few.names) <= 7 < len(domains)


def test_popularity_predicts_what_is_used_most():
    preference = np.linspace(0, 6, EXPERTS)
    trace, recording = split(random_ids(2600, EXPERTS, WIDTH, 2, preference=preference))
    share = np.isin(recording.ids[1], [EXPERTS - 1, EXPERTS - 2]).mean()
    assert recall("popularity", trace, recording) == pytest.approx(share)


@pytest.fixture(scope="module")
def view():
    torch.manual_seed(0)
    return MoEView(build_tiny("qwen3_moe"))


def silence(view):
    """Nothing is added to the residual stream after the first layer's attention."""
    for layer in view:
        layer.experts.down_proj.data.zero_()
    for block in view.model.model.layers[1:]:
        block.self_attn.o_proj.weight.data.zero_()


def batches(view, seed=1):
    random = np.random.default_rng(seed)
    vocabulary = view.model.config.vocab_size
    texts = [random.integers(1, vocabulary, n).tolist() for n in (9, 5, 7)]
    return list(pad_batches([(text, "") for text in texts], 2))


@pytest.mark.parametrize("renorm", [True, False])
def test_the_gate_is_exact_where_layers_add_nothing(renorm):
    torch.manual_seed(0)
    view = MoEView(build_tiny("qwen3_moe"))
    silence(view)
    for block in view.model.model.layers:
        block.post_attention_layernorm.weight.data.uniform_(-2, 2)
    recording = record(view, batches(view))
    found = measure(make_predictor("next-gate", gates=gates_of(view), renorm=renorm), recording)
    if renorm:
        assert found[0].recall[0] == 1
    else:
        assert found[0].recall[0] < 1


def test_the_gate_of_a_batch_finds_the_union():
    """Nearly: two tokens that both nearly choose an expert count as much as one that just does."""
    torch.manual_seed(0)
    view = MoEView(build_tiny("qwen3_moe"))
    silence(view)
    recording = record(view, batches(view))
    found = measure(make_predictor("next-gate", gates=gates_of(view)), recording, batch=3)
    assert np.nanmin(found[0].by_layer) > 0.95


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "ernie4_5_moe"])
def test_gates_choose_as_the_model_does(family):
    """Plain products, a correction bias, groups, a router bias."""
    torch.manual_seed(0)
    view = MoEView(build_tiny(family))
    for layer in view:
        if layer.correction_bias is not None:
            layer.correction_bias.data.uniform_(-0.5, 0.5)
    for layer, gate in zip(view, gates_of(view), strict=True):
        hidden = torch.randn(40, layer.router_width)
        chosen = gate.values(hidden).topk(gate.top_k).indices.sort(-1).values
        assert torch.equal(chosen, layer.route(hidden).ids.sort(-1).values)


def test_a_gain_of_zero_leaves_nothing_to_divide():
    weight = torch.eye(4)
    first = plain_gate(weight, 1, gain=torch.tensor([0.0, 1, 1, 1]))
    second = plain_gate(weight, 1, gain=torch.tensor([9.0, 2, 1, 1]))
    factor, summand = second.renorm(first)
    assert factor.tolist() == [0, 2, 1, 1]
    assert summand.tolist() == [0, 0, 0, 0]
    assert Gate(first.values, 1).renorm(second) is None


def test_recording_keeps_the_input_of_every_router(view):
    recording = record(view, batches(view))
    assert len(recording) == 21
    assert recording.starts == (0, 9, 14)
    for layer in view:
        hidden = torch.from_numpy(recording.hidden[layer.position])
        again = layer.route(hidden).ids.sort(-1).values.numpy()
        assert np.array_equal(again, np.sort(recording.ids[layer.position]))


def test_passes_step_through_sequences_side_by_side(view):
    recording = record(view, batches(view))
    steps = list(recording.passes(2))
    assert steps[0][0]
    assert steps[0][1].tolist() == [0, 9]
    assert [rows.tolist() for _, rows in steps[5:7]] == [[5], [6]]
    assert sum(len(rows) for _, rows in steps) == 21


def test_measure_counts_by_hand():
    """Four experts, top 1; a table says 0 -> 2, and half of the time 3 follows."""
    ids = np.array([[[0], [2]], [[0], [3]], [[0], [2]], [[0], [2]]])
    predictor = make_predictor("transitions", traces=[make_trace(ids, 4)])
    held = Recording.of(make_trace(np.array([[[0], [2]], [[0], [3]]]), 4))
    (found,) = measure(predictor, held, budgets=(1, 2))
    assert found.recall.tolist() == [0.5, 1]
    assert found.precision.tolist() == [0.5, 0.5]
    assert found.wasted.tolist() == [0.5, 1]
    assert found.chance.tolist() == [0.25, 0.5]
    assert found.by_layer[1] == 0.5


@pytest.mark.parametrize("name", LEARNED)
def test_saved_predictors_predict_the_same(name, tmp_path):
    trace, recording = split(random_ids(700, EXPERTS, WIDTH, 3, preference=np.arange(EXPERTS)))
    predictor = make_predictor(name, traces=[trace])
    save_predictor(predictor, name, tmp_path / "p")
    loaded = load_predictor(tmp_path / "p")
    for one in (predictor, loaded):
        one.start(3, EXPERTS, WIDTH)
        one.begin([5])
        one.observe(0, recording.ids[0][:1])
        one.observe(1, recording.ids[1][:1])
    # Tables and profiles are saved in half precision.
    assert np.allclose(predictor.predict(1, 1), loaded.predict(1, 1), atol=1e-3)
    with pytest.raises(UserError, match="cannot write"):
        save_predictor(predictor, name, tmp_path / "p")


def test_damaged_and_foreign_predictors_are_refused(tmp_path):
    trace, _ = split(random_ids(700, EXPERTS, WIDTH, 3))
    save_predictor(make_predictor("popularity", traces=[trace]), "popularity", tmp_path / "p")
    header = json.loads((tmp_path / "p" / HEADER).read_text())
    for change, words in (
        ({"version": 9}, "version 9"),
        ({"format": "else"}, "no header"),
        ({"name": "edgemoe"}, "damaged"),
        ({"name": "lru"}, "no predictor"),
    ):
        (tmp_path / "p" / HEADER).write_text(json.dumps({**header, **change}))
        with pytest.raises(UserError, match=words):
            load_predictor(tmp_path / "p")
    (tmp_path / "p" / TENSORS).write_bytes(b"\x00" * 7)
    with pytest.raises(UserError, match="cannot be read"):
        load_predictor(tmp_path / "p")


def test_what_is_missing_is_named():
    with pytest.raises(UserError, match="next-gate needs the model's routers"):
        make_predictor("next-gate")
    with pytest.raises(UserError, match="moekit trace"):
        make_predictor("edgemoe")
    with pytest.raises(UserError, match="order is 1 or 2"):
        registry.find("edgemoe", kind="predictor").load()(order=3)
    with pytest.raises(UserError, match="unexpected keyword"):
        make_predictor("random", colour="red")
    gate = make_predictor("next-gate", gates=[plain_gate(torch.eye(4), 1)] * 2)
    gate.start(2, 4, 1)
    with pytest.raises(UserError, match="given none"):
        gate.observe(0, [[1]])
    trace, recording = split(random_ids(700, EXPERTS, WIDTH, 3))
    predictor = make_predictor("popularity", traces=[trace])
    with pytest.raises(UserError, match="3 layers of 8 experts, the model has 4 of 8"):
        predictor.start(4, EXPERTS, WIDTH)
    with pytest.raises(UserError, match="budgets are 1 to 8"):
        measure(predictor, recording, budgets=(9,))
    with pytest.raises(UserError, match="no tokens"):
        make_predictor("popularity", traces=[make_trace(np.zeros((0, 2, 1), int), 4)])


def test_recording_without_text_is_refused(view):
    with pytest.raises(UserError, match="no text"):
        record(view, [])
    assert len(record(view, [Batch(torch.ones(1, 3, dtype=torch.long))])) == 3
