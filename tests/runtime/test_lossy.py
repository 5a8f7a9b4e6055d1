"""Expert sharing and low-bit fallback: off they are nowhere, on they do what they say."""

import math

import numpy as np
import pytest
import torch

import moekit
from moekit.core.errors import UserError
from moekit.core.pack import pack
from moekit.core.view import MoEView
from moekit.ops.native import library
from moekit.runtime.schedule.fallback import PlaneFallback
from moekit.runtime.store import ExpertStore
from moekit.runtime.torch_experts import decoded
from tests.families.tiny import TINY, build_tiny

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A qwen3_moe whose experts are 32 wide, with all its weights and in nested planes."""
    config = TINY["qwen3_moe"]()
    config.moe_intermediate_size = 32
    root = tmp_path_factory.mktemp("lossy")
    model = build_tiny("qwen3_moe", config=config)
    model.save_pretrained(root / "m")
    for codec in ("fp32", "nested4"):
        pack(root / "m", root / codec, codec=codec)
    return root, model


def steps(engine, rows=6, count=8):
    """Logits of `count` steps of several sequences together, and the experts of each layer."""
    seen = []
    engine.runner.observer = lambda routed: seen.append((routed.layer, routed.ids.copy()))
    seqs = [engine.runner.new_sequence(count) for _ in range(rows)]
    ids = torch.randint(3, 120, (count, rows), generator=torch.Generator().manual_seed(0))
    logits = [
        engine.runner.forward(seqs, [[token] for token in row]).clone() for row in ids.tolist()
    ]
    for seq in seqs:
        engine.runner.drop(seq)
    engine.runner.observer = None
    return torch.stack(logits), seen


def test_sharing_everything_changes_nothing(packed):
    root, _ = packed
    with moekit.open_engine(root / "fp32", max_context=64, streams=6) as engine:
        exact, _ = steps(engine)
        alone, _ = steps(engine, rows=1)
    with moekit.open_engine(
        root / "fp32", max_context=64, streams=6, share_experts="des-vote:share=1.0"
    ) as engine:
        assert torch.equal(steps(engine)[0], exact)
    with moekit.open_engine(
        root / "fp32", max_context=64, streams=6, share_experts="des-vote:share=0.01"
    ) as engine:
        assert any("lossy" in line for line in engine.notes)
        assert torch.equal(steps(engine, rows=1)[0], alone)
        assert not torch.equal(steps(engine)[0], exact)


@pytest.mark.parametrize("name", ["des-vote:share=0.01", "des-vote:share=0.5", "des-seq"])
def test_all_sequences_choose_from_one_set(packed, name):
    """As the transform at the seam of a model in torch does on the same logits."""
    root, model = packed
    config = model.config
    with moekit.open_engine(root / "fp32", max_context=64, streams=6) as engine:
        before = [len(np.unique(ids)) for _, ids in steps(engine, count=1)[1]]
    with moekit.open_engine(root / "fp32", max_context=64, streams=6, share_experts=name) as engine:
        _, seen = steps(engine, count=1)
        sharing = engine.runner.sharing
    after = [len(np.unique(ids)) for _, ids in seen]
    assert sum(after) <= sum(before)
    if name.startswith("des-vote"):
        most = max(math.ceil(sharing.share * config.num_experts), config.num_experts_per_tok)
        assert max(after) <= most
    # The first layer sees the same hidden states in both.
    view = MoEView(model)
    ids = torch.randint(3, 120, (8, 6), generator=torch.Generator().manual_seed(0))[0]
    with torch.no_grad(), view.transform_routing(sharing, on="logits"), view.trace() as trace:
        model(ids[:, None])
    expected = trace.layer(0).topk_ids.sort(-1).values
    assert torch.equal(torch.from_numpy(seen[0][1]).long().sort(-1).values, expected)


def test_sharing_is_refused_where_it_would_not_hold(tmp_path, packed):
    root, _ = packed
    with pytest.raises(UserError, match="need the native runner"):
        moekit.open_engine(root / "fp32", share_experts="des-vote", runner="graph")
    with pytest.raises(UserError, match="need a packed model"):
        moekit.open_engine(root / "m", share_experts="des-vote")
    with pytest.raises(UserError, match="hebf shares no experts"):
        moekit.open_engine(root / "fp32", share_experts="hebf")
    build_tiny("deepseek_v3").save_pretrained(tmp_path / "m")
    pack(tmp_path / "m", tmp_path / "p", codec="fp32")
    with pytest.raises(UserError, match="correction bias or by groups"):
        moekit.open_engine(tmp_path / "p", share_experts="des-vote")


def decode(engine):
    seq = engine.runner.new_sequence(24)
    rows = [engine.runner.forward([seq], [[token]]) for token in range(3, 23)]
    engine.runner.drop(seq)
    return torch.cat(rows)


def small(root):
    """Bytes for a third of the experts."""
    with ExpertStore.open(root / "nested4") as store:
        return store.expert_bytes // 3


def test_no_weight_is_too_light_at_zero(packed):
    root, _ = packed
    with moekit.open_engine(root / "nested4", max_context=64) as engine:
        engine.cache.load_all()
        exact = decode(engine)
    options = {"max_context": 64, "expert_cache": small(root), "prefetch": False}
    with moekit.open_engine(root / "nested4", low_bit_fallback=0.0, **options) as engine:
        assert torch.equal(decode(engine), exact)
        assert engine.low_bit.stats.misses == 0
    with moekit.open_engine(root / "nested4", low_bit_fallback=0.4, **options) as engine:
        assert not torch.equal(decode(engine), exact)
        assert engine.low_bit.stats.hits + engine.low_bit.stats.misses > 0
        assert engine.stats.misses == engine.cache.stats.misses + engine.low_bit.stats.misses
        assert any("lossy" in line for line in engine.notes)


def test_fallback_computes_the_first_planes(packed):
    """Where every weight is light no whole expert is ever read: the model of the first planes."""
    root, model = packed
    exact, few = ({}, {})
    with ExpertStore.open(root / "nested4") as store:
        for planes, logits in ((None, exact), (1, few)):
            view = MoEView(model)
            for position, layer in enumerate(view):
                for expert in range(layer.num_experts):
                    layer.set_expert(expert, decoded(store.read(position, expert, planes)))
            with torch.no_grad():
                logits["found"] = model(torch.arange(3, 23)[None]).logits[0]
    options = {"max_context": 64, "expert_cache": small(root)}
    with moekit.open_engine(root / "nested4", low_bit_fallback=1.0, **options) as engine:
        found = decode(engine)
        assert engine.cache.stats.misses == 0
        assert engine.low_bit.stats.demand_bytes < small(root) * 10

    def gap(one, other):
        return float((one - other).norm() / other.norm())

    # The kernels round activations to bf16, 2**-9 a product; planes are worth far more.
    assert gap(found, few["found"]) < 0.02
    assert gap(found, exact["found"]) > 5 * gap(found, few["found"])


def test_fallback_needs_planes(packed):
    root, _ = packed
    with ExpertStore.open(root / "fp32") as store:
        nbytes = store.expert_bytes // 2
    with pytest.raises(UserError, match="have 1 planes, so 1 are not fewer than all"):
        moekit.open_engine(root / "fp32", low_bit_fallback=0.1, expert_cache=nbytes)
    rule = PlaneFallback(planes=9)
    with pytest.raises(UserError, match="pack with a nested codec"):
        moekit.open_engine(root / "nested4", low_bit_fallback=rule, expert_cache=small(root))
