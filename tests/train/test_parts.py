"""Starting from a model, learning from a teacher, and parts that do not learn."""

import json
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from moekit.core.errors import UserError
from moekit.train.distill import distillation_loss, preference_loss
from moekit.train.forecast import saved_bytes
from moekit.train.freeze import freeze, parts_of
from moekit.train.metrics import router_metrics
from moekit.train.recipe import PARTS, recipe_from_dict
from tests.families.tiny import build_tiny
from tests.train.test_balance import tiny_model

ON_CPU = ("--device", "cpu", "--threads", "1")


def test_distillation_is_zero_for_a_twin_and_its_gradient_that_of_cross_entropy() -> None:
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(5, 7, generator=draw, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(5, 9, generator=draw, dtype=torch.float64)
    loss = distillation_loss(student, student.detach())
    assert loss.item() == pytest.approx(0, abs=1e-7)
    assert float(torch.autograd.grad(loss, student)[0].abs().max()) < 1e-7
    taught = teacher[:, :7].float().softmax(-1)
    entropy = torch.nn.functional.cross_entropy(student.float(), taught)
    ours, theirs = (
        torch.autograd.grad(loss, student)[0]
        for loss in (distillation_loss(student, teacher), entropy)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_what_is_masked_changes_nothing() -> None:
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 7, generator=draw) for _ in range(2))
    mask = torch.tensor([False, False, True, True, True, True])
    whole = distillation_loss(student, teacher, mask=mask)
    torch.testing.assert_close(whole, distillation_loss(student[2:], teacher[2:]))


@pytest.mark.parametrize(("pairs", "agreed"), [("dpo", 0.6931472), ("kto", 0.5)])
def test_preferences_start_at_the_teacher_and_fall_with_the_margin(pairs, agreed) -> None:
    chosen, rejected = torch.tensor([-3.0, -4.0]), torch.tensor([-2.0, -6.0])
    same = preference_loss(chosen, rejected, chosen, rejected, pairs=pairs)
    assert float(same) == pytest.approx(agreed)
    better = preference_loss(chosen + 1, rejected - 1, chosen, rejected, pairs=pairs)
    assert better < same


@pytest.mark.parametrize("model", ["moekit", "qwen2_moe"])
def test_parts_are_disjoint_and_frozen_as_told(model) -> None:
    made = tiny_model() if model == "moekit" else build_tiny(model)
    parts = parts_of(made)
    ids = [id(param) for group in parts.values() for param in group]
    assert len(ids) == len(set(ids))
    assert all(parts[part] for part in PARTS if part != "shared" or model == "qwen2_moe")
    frozen = freeze(made, ["routers", "experts"])
    still = {id(param) for param in made.parameters() if param.requires_grad}
    assert frozen == sum(p.numel() for part in ("routers", "experts") for p in parts[part])
    assert not still & {id(p) for part in ("routers", "experts") for p in parts[part]}
    assert still & {id(p) for p in parts["attention"]}
    made.requires_grad_(False)
    with pytest.raises(UserError, match="nothing to learn"):
        freeze(made, [])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"train": {"freeze": ["router"]}}, "routers"),
        ({"train": {"freeze_routers_at": 2.0}}, "fraction"),
        ({"model": {"model_type": "x", "path": "y"}}, "both"),
    ],
)
def test_wrong_settings_are_refused(raw, message) -> None:
    with pytest.raises(UserError, match=message):
        recipe_from_dict({"name": "x", "model": {"model_type": "qwen3_moe"}, **raw})


def test_a_model_goes_on_with_a_teacher_and_frozen_experts(recipe, texts, tmp_path, moekit) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    done = moekit("train", recipe(), "--data", texts, "--out", first, *ON_CPU)
    assert done.code == 0, done.err
    going_on = recipe(
        train={"freeze": ["experts"], "freeze_routers_at": 0.5, "tokens": 4 * 4 * 32},
        distill={"teacher": str(first), "end": 0.5},
    )
    # The model's own settings are read from its path.
    raw = yaml.safe_load(going_on.read_text()) | {"model": {"path": str(first)}}
    raw.pop("tokenizer")
    going_on.write_text(yaml.safe_dump(raw))
    done = moekit("train", going_on, "--data", texts, "--out", second, *ON_CPU, "--json")
    assert done.code == 0, done.err
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("experts" in name for name in changed)
    assert any("attn" in name for name in changed)
    # It starts where the other ended, not at ln 384.
    log = (second / "training" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[0])["loss"] < 5.9


class Recorder:
    """Stands in for a tracker's package."""

    def __init__(self) -> None:
        self.seen: list = []

    def init(self, **settings) -> None:
        self.seen.append(settings)

    def log(self, numbers, step) -> None:
        self.seen.append((step, numbers))

    def finish(self) -> None:
        self.seen.append("end")


def test_trackers_get_every_entry_by_layer(recipe, texts, tmp_path, moekit, monkeypatch) -> None:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "trackio", recorder)
    path = recipe(train={"report_to": ["trackio"], "tokens": 2 * 4 * 32})
    done = moekit("train", path, "--data", texts, "--out", tmp_path / "out", *ON_CPU)
    assert done.code == 0, done.err
    settings, (first, numbers), (second, _), end = recorder.seen
    assert settings["name"] == "tiny"
    assert (first, second, end) == (1, 2, "end")
    assert {"loss", "grad_norm", "routers/imbalance/layer_1", "routers/dead"} <= set(numbers)
    # Two experts a token, and none lost without a capacity.
    assert numbers["routers/experts_per_token/layer_0"] == 2
    assert not any("dropped" in name for name in numbers)


def test_a_tracker_that_is_not_installed_is_told(
    recipe, texts, tmp_path, moekit, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    path = recipe(train={"report_to": ["trackio"]})
    done = moekit("train", path, "--data", texts, "--out", tmp_path / "out", *ON_CPU)
    assert done.code == 2
    assert "moekit[track]" in done.err


def test_dropped_pairs_and_experts_a_token_are_counted_by_layer() -> None:
    counts = [torch.tensor([6.0, 2.0]), torch.tensor([4.0, 4.0])]
    metrics = router_metrics(counts, [torch.tensor(2.0), torch.tensor(0.0)], 4)
    assert metrics["dropped"] == [0.2, 0.0]
    assert metrics["experts_per_token"] == [2.0, 2.0]


def test_what_a_backward_pass_keeps_is_counted_while_it_is_kept() -> None:
    layer = torch.nn.Linear(8, 8, bias=False)
    rows = torch.randn(4, 8)
    with saved_bytes(layer) as saved:
        for _ in range(2):
            # exp keeps its result, the product its input; the second keeps what the first did.
            out = layer(layer(rows).exp())
            assert saved.now == 2 * rows.nbytes
            out.sum().backward()
            del out
            assert saved.now == 0
    assert saved.most == 2 * rows.nbytes
