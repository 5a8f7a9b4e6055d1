"""Every registered factorisation, from a request to a model that runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from moekit.compress.condense.model_experts import ModelExperts
from moekit.compress.factorize.factorizers import METHODS
from moekit.compress.factorize.plan import FactorizeRequest, factorize_plan, stored_share
from moekit.compress.fitted import rewrite_of
from moekit.compress.live import apply_live
from moekit.core.convert import convert
from moekit.core.errors import UserError
from moekit.core.plan import ExpertPlan
from moekit.core.spec import spec_of
from moekit.core.stats import ExpertStats
from moekit.core.view import MoEView
from moekit.profile import profile
from tests.families.tiny import build_tiny
from tests.models import tiny_config
from tests.profile.common import batches_of

EXPERTS = 8


@dataclass
class Case:
    view: MoEView
    path: Path
    stats: ExpertStats

    def plan(self, request: FactorizeRequest) -> ExpertPlan:
        experts = ModelExperts.of_view(self.view)
        plan = factorize_plan(spec_of(self.view.model), request, experts, self.stats)
        plan.validate(spec_of(self.view.model))
        return plan

    @torch.no_grad()
    def logits(self, plan: ExpertPlan | None = None) -> torch.Tensor:
        ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(4))
        if plan is None:
            return self.view.model(input_ids=ids).logits
        rewrite = rewrite_of(plan, self.path, self.stats)
        with apply_live(self.view, plan, rewrite), torch.no_grad():
            return self.view.model(input_ids=ids).logits


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(tiny_config(num_experts=EXPERTS)).eval()
    path = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(path)
    view = MoEView(model)
    return Case(view, path, profile(view, batches_of(), sets=["default", "full"]))


@pytest.mark.parametrize("measure", [{"rank": 32}, {"ratio": 0.0}, {"energy": 1.0}])
@pytest.mark.parametrize("name", METHODS)
def test_full_rank_is_the_identity(case: Case, name: str, measure: dict[str, float]) -> None:
    plan = case.plan(FactorizeRequest(name, **measure))
    if "energy" in measure:
        # All energy may lie in fewer directions than the width: exact up to rounding.
        assert torch.allclose(case.logits(plan), case.logits(), atol=1e-3)
    else:
        assert torch.equal(case.logits(plan), case.logits())


@pytest.mark.parametrize("name", METHODS)
def test_a_ratio_is_kept_and_harms_more_when_larger(case: Case, name: str) -> None:
    errors = []
    for ratio in (0.15, 0.5):
        request = FactorizeRequest(name, ratio=ratio)
        plan = case.plan(request)
        assert stored_share(spec_of(case.view.model), plan, request) <= 1 - ratio
        errors.append(float((case.logits(plan) - case.logits()).norm()))
    assert 0 < errors[0] < errors[1]


def test_energy_gives_every_layer_its_rank(case: Case) -> None:
    with torch.no_grad():
        for e in range(EXPERTS):
            expert = case.view[1].get_expert(e)
            before = expert.clone()
            for name in ("gate", "up", "down"):
                getattr(expert, name)[5:] = 0
            case.view[1].set_expert(e, expert)
            if e == 0:
                kept = []
            kept.append(before)
    try:
        plan = case.plan(FactorizeRequest("svd", energy=0.999999))
        ranks = [plan.action(layer, 0).rank for layer in (0, 1)]
    finally:
        for e, before in enumerate(kept):
            case.view[1].set_expert(e, before)
    assert ranks == [16, 5]


def test_white_loses_less_of_the_layer(case: Case) -> None:
    """In the norm of the outputs on the inputs that the statistics are of."""
    hidden = {}
    with case.view.observe(lambda call: hidden.setdefault(call.layer.position, call)):
        case.view.model(input_ids=batches_of()[1].ids)
    call = hidden[0]
    before = case.view[0].run_naive(call.hidden, call.ids, call.weights)
    errors = {}
    for name in ("svd", "svd-white"):
        plan = case.plan(FactorizeRequest(name, rank=8))
        with apply_live(case.view, plan, rewrite_of(plan, case.path, case.stats)):
            after = case.view[0].run_naive(call.hidden, call.ids, call.weights)
        errors[name] = float((after - before).norm())
    assert errors["svd-white"] < errors["svd"]


def test_groups_of_one_and_of_all_are_settings(case: Case) -> None:
    one = case.plan(FactorizeRequest("molae", {"group": 1, "down": "private"}, rank=6))
    plain = case.plan(FactorizeRequest("svd", rank=6))
    assert torch.equal(case.logits(one), case.logits(plain))
    everyone = case.plan(FactorizeRequest("molae", {"group": 0}, rank=6))
    basis = case.plan(FactorizeRequest("shared-basis", rank=6))
    assert torch.equal(case.logits(everyone), case.logits(basis))


@pytest.mark.parametrize("name", ["molae", "svd-white"])
def test_written_and_loaded_equals_live(case: Case, name: str, tmp_path: Path) -> None:
    plan = case.plan(FactorizeRequest(name, rank=6))
    convert(case.path, tmp_path / "out", plan=plan, rewrite=rewrite_of(plan, case.path, case.stats))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, case.logits(plan))


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "deepseek_v3", "mixtral"])
def test_families_of_other_storage(family: str, tmp_path: Path) -> None:
    model = build_tiny(family)
    model.save_pretrained(tmp_path)
    view = MoEView(model)
    case = Case(view, tmp_path, profile(view, batches_of(), sets=["default", "full"]))
    for name in ("molae-white", "svd"):
        full = case.plan(FactorizeRequest(name, rank=view[0].router_width))
        assert torch.equal(case.logits(full), case.logits())
        less = case.plan(FactorizeRequest(name, rank=4))
        assert case.logits(less).isfinite().all()
        assert not torch.equal(case.logits(less), case.logits())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give one of --rank, --ratio, --energy"),
        ({"rank": 3, "ratio": 0.5}, "--rank and --ratio"),
        ({"ratio": 1.5}, "from 0 to 1"),
        ({"rank": 3, "options": {"bits": 4}}, "no option 'bits'"),
        ({"rank": 3, "options": {"down": "none"}}, "whole, private, shared"),
        ({"rank": 3, "options": {"down": "private"}}, "group 1"),
        ({"rank": 3, "options": {"group": -1}}, "negative"),
    ],
)
def test_impossible_requests(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FactorizeRequest("mole", **fields)


def test_out_of_reach(case: Case) -> None:
    with pytest.raises(UserError, match="at rank 1 it saves"):
        case.plan(FactorizeRequest("mole", ratio=0.9))
    with pytest.raises(UserError, match="1 to 32"):
        case.plan(FactorizeRequest("svd", rank=33))


def test_white_without_moments_is_refused(case: Case) -> None:
    poor = Case(case.view, case.path, profile(case.view, batches_of()))
    plan = poor.plan(FactorizeRequest("svd-white", rank=3))
    with pytest.raises(UserError, match="profile again"):
        poor.logits(plan)
