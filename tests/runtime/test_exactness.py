"""Greedy tokens are those of transformers, and no budget, policy or prefetch changes a bit."""

from pathlib import Path

import pytest
import torch

import moekit
from moekit.core.load import BABEL_PATH
from moekit.core.pack import pack
from tests.families.tiny import TINY, build_tiny, supports_generate

# Adapters, hybrids, recurrent layers, compressed and sliding caches, keys split across tokens.
FAST = {"qwen3_moe", "gpt_oss", "deepseek_v3", "jamba", "qwen3_next", "llama4", "doge", "minimax"}
ENCODERS = {"nllb_moe", "switch_transformers"}
DECODERS = [family for family in TINY if supports_generate(family) and family not in ENCODERS]
FAMILIES = [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in DECODERS]
NEW = 10
# English prose that never changes.
TEXT = Path(__file__).parents[2] / "LICENSE"


def prompts(rows, length=11):
    return torch.randint(3, 120, (rows, length), generator=torch.Generator().manual_seed(1))


def packed(family, path, codec="fp32", dtype=torch.float32):
    model = build_tiny(family, dtype=dtype)
    model.save_pretrained(path / "m")
    pack(path / "m", path / "packed", codec=codec)
    return model, path / "packed"


def greedy(model, ids):
    with torch.inference_mode():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_transformers(tmp_path, family):
    model, path = packed(family, tmp_path)
    with moekit.open_engine(path, max_context=64) as whole:
        half = whole.cache.nbytes // 2
    with moekit.open_engine(path, max_context=64, expert_cache=half, streams=8) as engine:
        for rows in (1, 8):
            ids = prompts(rows)
            # In a batch doge splits the keys of one sequence over those of another.
            parts = ids.split(1) if family == "doge" else [ids]
            expected = torch.cat([greedy(model, part) for part in parts])
            assert torch.equal(engine.generate(ids, NEW), expected), rows
        assert engine.stats.misses


def all_logits(engine):
    """Logits after every token of a prompt given in two parts, and of steps after it."""
    seq = engine.runner.new_sequence(40)
    ids = prompts(1, 16)[0].tolist()
    parts = [engine.runner.forward([seq], [ids[:12]], all_positions=True)[0]]
    parts += [engine.runner.forward([seq], [[token]]) for token in ids[12:]]
    engine.runner.drop(seq)
    return torch.cat(parts)


POLICIES = [
    "mrs",
    "mrs:near=3,half_life=4",
    "lru",
    "lfu",
    "lfu-aged",
    "edgemoe",
    "shallow-first",
    "refreshed-set",
]


@pytest.mark.parametrize("runner", ["graph", "native"])
@pytest.mark.parametrize(
    ("codec", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("int8", torch.bfloat16)],
)
def test_logits_do_not_depend_on_what_is_in_memory(tmp_path, monkeypatch, runner, codec, dtype):
    config = TINY["qwen3_moe"]()
    config.moe_intermediate_size = 32
    monkeypatch.setitem(TINY, "qwen3_moe", lambda: config)
    _, path = packed("qwen3_moe", tmp_path, codec, dtype)
    with moekit.open_engine(path, max_context=64, runner=runner) as engine:
        engine.cache.load_all()
        assert engine.budget.complete
        expected, size = all_logits(engine), engine.cache.nbytes
        assert engine.stats.misses == 0
    expert = size // 16
    for policy in POLICIES:
        for nbytes in (2 * expert, 5 * expert, size - 1):
            for prefetch in (False, True):
                with moekit.open_engine(
                    path,
                    max_context=64,
                    runner=runner,
                    expert_cache=nbytes,
                    policy=policy,
                    prefetch=prefetch,
                    predictor="next-gate",
                    slots_per_layer=nbytes == size - 1,
                ) as engine:
                    assert torch.equal(all_logits(engine), expected), (policy, nbytes, prefetch)
                    assert engine.cache.stats.peak_bytes <= nbytes
                    assert engine.stats.misses


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["graph", "native"])
def test_bf16_is_as_near_to_fp32_as_transformers(tmp_path, runner):
    """Teacher-forced on real text: mean KL to the fp32 model, and its top token where that is
    clear, beside transformers' own bf16."""
    whole = {name: moekit.load("babel", dtype=name) for name in ("float32", "bfloat16")}
    ids = whole["float32"].tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
    # Divergences of single texts of this length differ by a factor of two in either direction.
    texts = [ids[start : start + 512] for start in range(0, 6 * 512, 512)]
    assert len(texts[-1]) == 512

    def forced(dtype, experts):
        model = whole[dtype].model
        model.set_experts_implementation(experts)
        with torch.inference_mode():
            return model(torch.tensor(texts)).logits.float().flatten(0, 1)

    exact = forced("float32", "grouped_mm")
    grouped, eager = (forced("bfloat16", name) for name in ("grouped_mm", "eager"))
    pack(BABEL_PATH, tmp_path / "packed", codec="bf16")
    with moekit.open_engine(tmp_path / "packed", runner=runner) as engine:
        made = []
        for text in texts:
            seq = engine.runner.new_sequence(len(text))
            made += engine.runner.forward([seq], [text], all_positions=True)
            engine.runner.drop(seq)
    ours = torch.cat(made)
    assert divergence(exact, ours) <= 1.1 * min(
        divergence(exact, grouped), divergence(exact, eager)
    )
    best = exact.topk(2).values
    clear = best[:, 0] - best[:, 1] > (grouped - eager).abs().max()
    assert torch.equal(ours.argmax(-1)[clear], exact.argmax(-1)[clear])


def divergence(exact, other):
    log = exact.log_softmax(-1)
    return float((log.exp() * (log - other.log_softmax(-1))).sum(-1).mean())
