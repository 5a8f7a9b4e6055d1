"""What a trace of the model gives an engine: hot sets, learned predictors, an expected hit rate."""

import pytest
import torch

import moekit
from moekit.core.cache_score import policy
from moekit.core.errors import UserError
from moekit.core.pack import pack
from moekit.core.trace import RoutingTrace
from moekit.core.trace_writer import TraceWriter
from moekit.runtime.forecast_decode import plan_decode
from moekit.runtime.known_routing import expected_hit_rate, open_trace, usage
from moekit.runtime.predict.files import make_predictor, save_predictor
from moekit.runtime.prefetch import Prefetching
from moekit.runtime.recent_scores import RecentScores
from tests.models import CONTEXT, write_tiny_model

TOKENS = 200


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    tiny = write_tiny_model(tmp_path_factory.mktemp("known") / "tiny")
    pack(tiny, tiny.with_name("packed"), codec="fp32")
    return tiny.with_name("packed")


@pytest.fixture(scope="module")
def trace(packed):
    """The routing of random tokens, a few at a time."""
    loaded = moekit.load(packed.with_name("tiny"))
    ids = torch.randint(3, 300, (TOKENS // 40, 40), generator=torch.Generator().manual_seed(0))
    view = moekit.MoEView(loaded.model)
    writer = TraceWriter()
    moekit.collect(view, list(ids.split(1)), [writer])
    writer.trace.save(packed.with_name("trace"))
    return packed.with_name("trace")


def half(packed):
    with moekit.open_engine(packed) as engine:
        return engine.cache.nbytes // 2


def logits(engine):
    seq = engine.runner.new_sequence(CONTEXT)
    rows = [engine.runner.forward([seq], [[token]]) for token in range(3, 23)]
    engine.runner.drop(seq)
    return torch.cat(rows)


def test_usage_counts_every_choice(trace):
    opened = RoutingTrace.open(trace)
    counts = usage(opened)
    layer = opened.layers[0]
    assert counts.shape == (len(opened.layers), layer.num_experts)
    assert (counts.sum(1) == TOKENS * layer.top_k).all()
    first = opened.layer(0).topk_ids
    assert counts[0, 1] == int((first == 1).sum())


def test_expected_hit_rate(trace):
    opened = RoutingTrace.open(trace)
    layers, experts = len(opened.layers), opened.layers[0].num_experts
    rates = [
        expected_hit_rate(opened, policy("lru"), share * layers * experts // 4)
        for share in (1, 2, 3, 4)
    ]
    assert rates == sorted(rates)
    # The first half has used every expert: only what was evicted is missing.
    assert rates[-1] == 1.0
    assert 0 < expected_hit_rate(opened, policy("hot-set"), layers * experts // 2) < 1


def test_a_hot_set_is_loaded_and_used(packed, trace):
    with moekit.open_engine(packed) as whole:
        whole.cache.load_all()
        exact = logits(whole)
    limit = half(packed)
    options = {"expert_cache": limit, "prefetch": False}
    with moekit.open_engine(packed, policy="hot-set", trace=trace, **options) as engine:
        assert engine.cache.stats.preload_reads > 0
        ranks = usage(RoutingTrace.open(trace))
        inside = engine.cache.table != 0
        assert ranks[inside].min() >= ranks[~inside].max()
        assert torch.equal(logits(engine), exact)
    with pytest.raises(UserError, match="give a trace of the model"):
        moekit.open_engine(packed, policy="hot-set", **options)


@pytest.mark.parametrize("runner", ["graph", "native"])
def test_router_scores_reach_the_policy(packed, runner):
    """Minus recent score ranks experts that were nearly chosen above those that were not."""
    with moekit.open_engine(
        packed, policy="mrs", expert_cache=half(packed), runner=runner, prefetch=False
    ) as engine:
        seen = []
        original = engine.cache.scored

        def scored(layer, experts, scores):
            seen.append((layer, len(experts), float(scores.sum())))
            original(layer, experts, scores)

        engine.cache.scored = scored
        logits(engine)
        top_k, layers = engine.spec.top_k, len(engine.spec.per_layer)
    assert [layer for layer, _, _ in seen] == list(range(layers)) * 20
    assert {count for _, count, _ in seen} == {2 * top_k}
    assert all(0 < total <= 1.0001 for _, _, total in seen)


@pytest.mark.parametrize("name", ["edgemoe:order=1", "popularity", "saved"])
def test_learned_predictors_change_no_logit(packed, trace, name, tmp_path):
    with moekit.open_engine(packed) as whole:
        whole.cache.load_all()
        exact = logits(whole)
    options = {"expert_cache": half(packed)}
    if name == "saved":
        learned = make_predictor("transitions", traces=[RoutingTrace.open(trace)])
        save_predictor(learned, "transitions", tmp_path / "saved")
        options["predictor"] = str(tmp_path / "saved")
    else:
        options |= {"predictor": name, "trace": trace}
    with moekit.open_engine(packed, **options) as engine:
        assert torch.equal(logits(engine), exact)
        hints = engine.cache.stats
        assert hints.prefetch_reads + hints.demand_reads > 0
    if name != "saved":
        with pytest.raises(UserError, match="learns from routing"):
            moekit.open_engine(packed, predictor=name, expert_cache=half(packed))


def test_small_experts_are_not_predicted_unless_asked(packed):
    limit = half(packed)
    with moekit.open_engine(packed, expert_cache=limit) as engine:
        assert engine.runner.observer is None
        assert "nothing is read ahead: predicting takes as long as a read" in engine.notes
    with moekit.open_engine(packed, expert_cache=limit, predictor="next-gate") as engine:
        assert isinstance(engine.runner.observer.__self__, Prefetching)
    with moekit.open_engine(packed, expert_cache=limit, policy="mrs") as engine:
        assert isinstance(engine.runner.observer.__self__, RecentScores)


def test_the_forecast_takes_its_hit_rate_from_the_trace(packed, trace):
    limit = half(packed)
    known = plan_decode(packed, expert_cache=limit, trace=trace, policy="lru")
    opened = RoutingTrace.open(trace)
    slots = int(known.budget.expert_cache // known.load.expert_bytes)
    assert known.hit_rate == expected_hit_rate(opened, policy("lru"), slots)


def test_a_trace_of_another_model_is_refused(trace):
    with pytest.raises(UserError, match="is of another model"):
        open_trace(trace, [7, 7])
