"""Every method and every pair of grouping and fuser, from statistics to a model that runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from moekit.compress.condense.condense import Recipe, condense_plan, spread_over_layers
from moekit.compress.condense.methods import METHODS, recipe_of
from moekit.compress.condense.model_experts import ModelExperts, experts_of
from moekit.compress.fitted import rewrite_of
from moekit.compress.live import apply_live
from moekit.core.convert import convert
from moekit.core.errors import UserError
from moekit.core.new_experts import select_neurons
from moekit.core.plan import ExpertPlan
from moekit.core.registry import registry
from moekit.core.spec import spec_of
from moekit.core.stats import ExpertStats
from moekit.core.view import MoEView
from moekit.profile import profile
from tests.families.tiny import TINY, build_tiny
from tests.models import tiny_config
from tests.profile.common import batches_of

SETS = ["default", "outputs", "inputs", "fisher"]
GROUPINGS = [method.name for method in registry.methods(kind="grouping")]
FUSERS = [m.name for m in registry.methods(kind="fuser") if "compress.condense" in m.target]
EXPERTS = 6


@dataclass
class Case:
    """A loaded model, where it lies, and its statistics."""

    view: MoEView
    path: Path
    stats: ExpertStats

    @classmethod
    def of(cls, model: Any, path: Path, sets: list[str] = SETS) -> Case:
        model.save_pretrained(path)
        view = MoEView(model)
        return cls(view, path, profile(view, batches_of(), sets=sets))

    @property
    def spec(self) -> Any:
        return spec_of(self.view.model)

    def plan(self, recipe: Recipe, keep: int, **options: Any) -> ExpertPlan:
        counts = {layer.index: keep for layer in self.view}
        experts = ModelExperts.of_view(self.view)
        plan = condense_plan(self.spec, self.stats, experts, counts, recipe, **options)
        plan.validate(self.spec)
        return plan

    def logits(self, plan: ExpertPlan | None = None) -> torch.Tensor:
        if plan is None:
            return logits_of(self.view.model)
        with apply_live(self.view, plan, rewrite_of(plan, self.path, self.stats)):
            return logits_of(self.view.model)


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(4))
    return model(input_ids=ids, use_cache=False).logits


def tiny() -> Qwen3MoeForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen3MoeForCausalLM(tiny_config(num_experts=EXPERTS)).eval()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.of(tiny(), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Experts 1, 3 and 5 are those before them with their neurons in another order."""
    model = tiny()
    for layer in MoEView(model):
        for e in range(0, EXPERTS, 2):
            expert = layer.get_expert(e)
            order = torch.randperm(16, generator=torch.Generator().manual_seed(e))
            layer.set_expert(e + 1, select_neurons(expert, order))
    return Case.of(model, tmp_path_factory.mktemp("twins"))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "mc-smoe"])
def test_ratio_0_is_the_identity(case: Case, name: str) -> None:
    plan = case.plan(recipe_of(name), EXPERTS)
    assert not plan.layers
    assert torch.equal(case.logits(plan), case.logits())


def test_ratio_0_of_mc_smoe_is_the_identity_with_the_whole_residue(case: Case) -> None:
    plan = case.plan(recipe_of("mc-smoe", fuser_options={"keep": 1.0}), EXPERTS)
    assert torch.equal(case.logits(plan), case.logits())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_as_many_as_asked(case: Case, name: str) -> None:
    plan = case.plan(recipe_of(name), 3)
    assert [len(plan.survivors(layer, EXPERTS)) for layer in (0, 1)] == [3, 3]
    logits = case.logits(plan)
    assert logits.isfinite().all()
    assert not torch.equal(logits, case.logits())
    # The context leaves the model as it was.
    assert torch.equal(case.logits(), logits_of(case.view.model))


# Every grouping and every fuser once in the fast suite, every pair in the whole one.
PAIRS = [
    pytest.param(grouping, fuser, marks=() if place % len(FUSERS) == number else pytest.mark.slow)
    for place, grouping in enumerate(GROUPINGS)
    for number, fuser in enumerate(FUSERS)
]


@pytest.mark.parametrize(("grouping", "fuser"), PAIRS)
def test_groupings_and_fusers_combine_freely(case: Case, grouping: str, fuser: str) -> None:
    plan = case.plan(Recipe(grouping, fuser, align="weights"), 4)
    assert case.logits(plan).isfinite().all()


LOSSLESS: dict[str, dict[str, Any]] = {
    "average": {},
    "fisher": {},
    "subspace": {"keep": 1.0},
    "zip": {},
    "least-squares": {},
    "low-rank-sparse": {"keep": 1.0},
    "recombine": {},
}


@pytest.mark.parametrize("align", ["weights", "activations"])
@pytest.mark.parametrize("fuser", FUSERS)
def test_permuted_twins_merge_without_loss(twins: Case, fuser: str, align: str) -> None:
    """Also where a token chose both: their gates add up."""
    recipe = Recipe(
        fuser=fuser,
        align=align,
        shares="uniform",
        fuser_options=LOSSLESS[fuser],
        grouping_options={"feature": "output"},
    )
    plan = twins.plan(recipe, EXPERTS // 2)
    assert [sorted(g) for g in plan.groups(0).values()] == [[0, 1], [2, 3], [4, 5]]
    # Weights are rounded to float32 once; logits are near 10.
    assert torch.allclose(twins.logits(plan), twins.logits(), atol=2e-4)


def test_permuted_twins_merged_without_alignment_lose(twins: Case) -> None:
    recipe = Recipe(shares="uniform", grouping_options={"feature": "output"})
    plan = twins.plan(recipe, EXPERTS // 2)
    assert (twins.logits(plan) - twins.logits()).abs().max() > 0.1


def test_dern_without_like_neurons_is_pruning(case: Case) -> None:
    recipe = recipe_of("dern", fuser_options={"tau": 1.1})
    plan = case.plan(recipe, 3)
    pruned = ExpertPlan(plan.layers, plan.model)
    assert plan.fit is not None
    assert torch.equal(case.logits(plan), case.logits(pruned))


def test_dern_with_dropped_copies_keeps_the_function(twins: Case) -> None:
    plan = twins.plan(recipe_of("dern"), 4)
    loss = (twins.logits(plan) - twins.logits()).norm()
    dropped = plan.dropped(0)
    # A survivor whose twin was dropped computes what it did; only the router lost a row.
    with apply_live(twins.view, plan, rewrite_of(plan, twins.path, twins.stats)):
        for gone in dropped:
            kept = gone ^ 1
            if kept in dropped:
                continue
            hidden = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
            now = twins.view[0].run_expert(kept, hidden)
            before = twins.view[0].run_expert(gone, hidden)
            assert torch.allclose(now, before, atol=1e-3, rtol=1e-3)
    assert loss.isfinite()


def test_one_threshold_over_the_layers(case: Case) -> None:
    """The 8 largest shares of load stay, wherever they are."""
    keep = spread_over_layers(case.spec, case.stats, {0: 4, 1: 4}, "frequency")
    loads = [case.stats.counts(p).double() for p in (0, 1)]
    shares = [load / load.sum() for load in loads]
    least = torch.cat(shares).sort(descending=True).values[7]
    assert keep == {p: int((share >= least).sum()) for p, share in enumerate(shares)}


def test_protected_experts_stay_alone(case: Case) -> None:
    plan = case.plan(recipe_of("hc-smoe"), 3, protect={0: [1, 4]})
    assert sorted(plan.groups(0)[0]) == [0, 2, 3, 5]
    assert all(plan.action(0, e).protect for e in (1, 4))
    with pytest.raises(UserError, match="3 protected"):
        case.plan(recipe_of("hc-smoe"), 3, protect={0: [1, 2, 4]})


@pytest.mark.parametrize("name", ["m-smoe", "dern", "pleas"])
def test_written_and_loaded_equals_live(case: Case, name: str, tmp_path: Path) -> None:
    plan = case.plan(recipe_of(name, **({} if name == "dern" else {"router": "mean"})), 4)
    convert(case.path, tmp_path / "out", plan=plan, rewrite=rewrite_of(plan, case.path, case.stats))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert loaded.config.num_experts == 4
    # Banned experts and missing ones are summed in another order.
    assert torch.allclose(logits_of(loaded), case.logits(plan), atol=1e-4)


def test_experts_of_a_checkpoint_give_the_same_plan(case: Case) -> None:
    recipe, counts = recipe_of("reap-merge"), {0: 3, 1: 3}
    with experts_of(case.path) as experts:
        plan = condense_plan(case.spec, case.stats, experts, counts, recipe)
    assert plan == case.plan(recipe, 3)


def test_router_groups_keep_as_many_each(tmp_path: Path) -> None:
    """deepseek_v3 chooses groups of experts first, so slices must leave each group as many."""
    config = TINY["deepseek_v3"]()
    config.n_group, config.topk_group = 2, 1
    model = build_tiny("deepseek_v3", config=config)
    case = Case.of(model, tmp_path / "model", ["default"])
    for router in ("mean", "slice", "alias"):
        recipe = Recipe("dominant", align="weights", router=router)
        plan = case.plan(recipe, 4)
        index = case.view[0].index
        if router != "alias":
            assert [e // 4 for e in plan.survivors(index, 8)] == [0, 0, 1, 1]
        assert case.logits(plan).isfinite().all()


def test_fusers_of_other_rooms_are_refused() -> None:
    with pytest.raises(UserError, match="eep"):
        Recipe(fuser="eep")


FAMILIES = ["gpt_oss", "mixtral", "nemotron_h", "qwen2_moe", "granitemoe"]


CASES = [(family, "alias") for family in FAMILIES]
# nemotron_h's tiny router needs both experts of each of its groups.
CASES += [(family, "mean") for family in FAMILIES if family != "nemotron_h"]


@pytest.mark.parametrize(("family", "router"), CASES)
def test_families_of_other_routing_and_storage(family: str, router: str, tmp_path: Path) -> None:
    case = Case.of(build_tiny(family), tmp_path / family, ["default", "inputs"])
    count = case.view[0].num_experts
    recipe = Recipe(
        "dominant",
        "least-squares",
        align="weights",
        router=router,
    )
    unchanged = case.plan(recipe, count)
    assert torch.equal(case.logits(unchanged), case.logits())
    plan = case.plan(recipe, count // 2)
    assert case.logits(plan).isfinite().all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grouping": "hierarchic"}, "did you mean hierarchical"),
        ({"fuser": "fishy"}, "fuser"),
        ({"shares": "votes"}, "saliency"),
        ({"align": "colour"}, "none, weights, activations"),
        ({"router": "merge"}, "alias, mean, slice"),
    ],
)
def test_unknown_names_are_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe(**fields)


@pytest.mark.parametrize("name", METHODS)
def test_missing_statistics_are_named(case: Case, name: str) -> None:
    recipe = recipe_of(name)
    bare = profile(case.view, batches_of())
    if recipe.sets() == ["default"]:
        return
    poor = Case(case.view, case.path, bare)
    with pytest.raises(UserError, match="profile again"):
        poor.logits(poor.plan(recipe, 3))


def test_options_of_another_grouping_are_not_inherited() -> None:
    assert recipe_of("sub-moe").grouping_options == {"feature": "output-cosine"}
    assert recipe_of("sub-moe", grouping="random").grouping_options == {}
    assert recipe_of("sub-moe", grouping_options={"linkage": "single"}).grouping_options == {
        "feature": "output-cosine",
        "linkage": "single",
    }
