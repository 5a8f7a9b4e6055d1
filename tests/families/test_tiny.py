"""Every MoE family of the installed transformers has a tiny model that runs."""

from __future__ import annotations

import pytest
import torch

from tests.families.scan import UNDECORATED, decorated_families
from tests.families.tiny import SKIP, TINY, build_tiny, supports_generate, tiny_inputs


def test_every_moe_family_has_a_tiny_model_or_a_reason():
    found = decorated_families() | UNDECORATED
    listed = TINY.keys() | SKIP.keys()
    assert found - listed == set(), "new MoE families: give each a row in rows.py or a SKIP reason"
    assert listed - found == set(), "families that transformers no longer has"
    assert not TINY.keys() & SKIP.keys()
    assert all(SKIP.values())


def test_at_least_seventy_families_build():
    assert len(TINY) >= 70


@pytest.mark.parametrize("family", TINY)
def test_forward_is_finite_and_depends_on_the_input(family: str):
    model = build_tiny(family)
    inputs = tiny_inputs(family, model, batch=2, length=7)
    with torch.no_grad():
        logits = model(**inputs).logits
        other = model(**{**inputs, "input_ids": inputs["input_ids"].flip(-1)}).logits
    assert torch.isfinite(logits).all()
    assert (logits - other).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v4", "nllb_moe"])
def test_the_seed_decides_the_weights(family: str):
    one, same, other = (build_tiny(family, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in TINY if supports_generate(f)])
def test_generate(family: str):
    model = build_tiny(family)
    inputs = tiny_inputs(family, model, batch=1, length=5)
    inputs.pop("decoder_input_ids", None)
    start = 1 if model.config.is_encoder_decoder else 5
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert ids.shape == (1, start + 3)
