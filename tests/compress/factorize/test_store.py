"""Factors as written and run equal the experts that they stand for, in fewer bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moekit
from moekit.compress.condense.model_experts import ModelExperts
from moekit.compress.factorize.plan import FactorizeRequest, factorize_plan, stored_share
from moekit.compress.factorize.store import load_factored, write_factored
from moekit.compress.fitted import rewrite_of
from moekit.compress.live import apply_live
from moekit.core.errors import UserError
from moekit.core.spec import spec_of
from moekit.core.view import MoEView
from moekit.profile import profile
from tests.families.tiny import build_tiny
from tests.models import write_tiny_model
from tests.profile.common import batches_of

IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", ["svd", "svd-white", "mole", "molae", "shared-basis-white"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h", "mixtral"])
def test_factors_compute_what_expanded_experts_do(family: str, name: str, tmp_path: Path) -> None:
    model: Any = build_tiny(family)
    model.save_pretrained(tmp_path / "model")
    view = MoEView(model)
    spec = spec_of(model)
    stats = profile(view, batches_of(), sets=["default", "full"])
    options = {"group": 2} if name in ("mole", "molae") else {}
    request = FactorizeRequest(name, options, rank=4)
    plan = factorize_plan(spec, request, ModelExperts.of_view(view), stats)
    rewrite: Any = rewrite_of(plan, tmp_path / "model", stats)
    write_factored(tmp_path / "model", tmp_path / "out", plan, rewrite)
    loaded = load_factored(tmp_path / "out", "float32")
    with apply_live(view, plan, rewrite):
        expected = logits(model)
    # Two products in place of one: rounding of float32 activations.
    assert torch.allclose(logits(loaded.model), expected, atol=2e-4, rtol=1e-4)


def test_bytes_are_those_that_were_promised(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    loaded = moekit.load(source)
    request = FactorizeRequest("molae", {"group": 2}, ratio=0.4)
    plan = factorize_plan(loaded.spec, request)
    rewrite: Any = rewrite_of(plan, source)
    size = write_factored(source, tmp_path / "out", plan, rewrite)
    routed = 4 * sum(s.num_experts * s.params_per_expert for s in loaded.spec.per_layer)
    rest = 4 * sum(p.numel() for p in loaded.model.parameters()) - routed
    assert size == rest + round(stored_share(loaded.spec, plan, request) * routed)
    assert load_factored(tmp_path / "out").tokenizer is not None


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    plan = factorize_plan(moekit.load(source).spec, FactorizeRequest("svd", rank=5))
    rewrite: Any = rewrite_of(plan, source)
    whole = write_factored(source, tmp_path / "whole", plan, rewrite)
    calls = 0

    def stop(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_factored(source, tmp_path / "out", plan, rewrite, progress=stop)
    assert not (tmp_path / "out").exists()
    assert write_factored(source, tmp_path / "out", plan, rewrite) == whole
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_refusals(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    with pytest.raises(UserError, match="no factored model"):
        load_factored(source)
    plan = factorize_plan(moekit.load(source).spec, FactorizeRequest("svd", rank=5))
    rewrite: Any = rewrite_of(plan, source)
    write_factored(source, tmp_path / "out", plan, rewrite)
    with pytest.raises(UserError, match="holds factors"):
        moekit.load(tmp_path / "out")
