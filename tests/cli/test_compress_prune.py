"""`moekit compress prune` and `moekit compress library`."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import moekit as toolkit
from moekit.core.plan import ExpertPlan

TEXT = "the router chooses two experts for every token. der Router wählt zwei Experten. " * 6


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "en.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def stats(moekit, tiny, text, tmp_path):
    done = moekit("profile", tiny, text, "--out", tmp_path / "stats", "--seq-len", 32)
    assert done.code == 0, done
    return tmp_path / "stats"


def test_the_written_model_has_the_experts_that_score_highest(moekit, tiny, stats, tmp_path):
    out = tmp_path / "out"
    done = moekit("compress", "prune", tiny, out, "--ratio", 0.5, "--stats", stats, "--json")
    assert done.code == 0, done
    plan = ExpertPlan.load(out / "plan")
    plain, pruned = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny, out))
    assert pruned.config.num_experts == 2
    ids = torch.arange(20).view(1, -1)
    view = toolkit.MoEView(plain)
    gone = {layer.position: plan.dropped(layer.index) for layer in view}
    with view.ban_experts(gone), torch.no_grad():
        # float32: matrices of other sizes sum in another order.
        torch.testing.assert_close(pruned(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
    assert done.json["numbers"]["tokens"] > 0
    record = json.loads((out / "record.json").read_text())
    assert record["command"] == "compress prune"
    assert record["options"]["method"] == "reap"
    assert "prune: reap" in (out / "README.md").read_text()


def test_statistics_on_the_fly_are_those_of_profile(moekit, tiny, stats, text, tmp_path):
    plans = []
    for name, source in (("a", ("--stats", stats)), ("b", ("--data", text, "--seq-len", 32))):
        path = tmp_path / f"{name}.json"
        done = moekit(
            *("compress", "prune", tiny, "--plan-only", path, "--experts", 3, *source),
            *("--method", "ean"),
        )
        assert done.code == 0, done
        assert not (tmp_path / "out").exists()
        plans.append(ExpertPlan.load(path))
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    "method", ["naee", "eep:start=reap,initial=2,pruning=3,total=4", "naee:how=descent"]
)
def test_searches(moekit, tiny, text, tmp_path, method):
    state = tmp_path / "state.json"
    done = moekit(
        *("compress", "prune", tiny, tmp_path / "out", "--method", method, "--experts", 3),
        *("--data", text, "--seq-len", 32, "--state", state, "--json"),
    )
    assert done.code == 0, done
    assert done.json["numbers"]["within the budget"] is True
    assert state.exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_experts == 3
    text.write_text(TEXT * 2)
    again = moekit(
        *("compress", "prune", tiny, "--plan-only", tmp_path / "p.json", "--method", method),
        *("--experts", 3, "--data", text, "--seq-len", 32, "--state", state),
    )
    assert again.code == 2
    assert "is of a search with text" in again.err


def test_protected_experts(moekit, tiny, stats, text, tmp_path):
    base = ("compress", "prune", tiny, "--experts", 2, "--stats", stats, "--plan-only")
    assert moekit(*base, tmp_path / "free.json").code == 0
    free = ExpertPlan.load(tmp_path / "free.json")
    worst = free.dropped(0)[0]
    assert moekit(*base, tmp_path / "a.json", "--protect", f"0:{worst}").code == 0
    first = ExpertPlan.load(tmp_path / "a.json")
    assert worst not in first.dropped(0)
    # The protection of a plan carries over.
    assert moekit(*base, tmp_path / "b.json", "--protect", tmp_path / "a.json").code == 0
    assert ExpertPlan.load(tmp_path / "b.json").layers == first.layers


def test_super_experts_are_found_and_stay(moekit, tmp_path, text):
    from tests.models import write_tiny_model

    # The check of Super Experts: one expert with outputs far beyond all others'.
    path = write_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path)
    view = toolkit.MoEView(model)
    expert = view[1].get_expert(2)
    expert.down *= 1000
    view[1].set_expert(2, expert)
    model.save_pretrained(path)
    done = moekit(
        *("compress", "prune", path, "--plan-only", tmp_path / "p.json", "--experts", 2),
        *("--data", text, "--seq-len", 32, "--method", "random", "--protect", "super"),
    )
    assert done.code == 0, done
    assert "layer 1, expert 2 makes massive activations" in done.out
    assert ExpertPlan.load(tmp_path / "p.json").action(1, 2).protect


def test_experts_that_the_text_never_reaches_are_named(moekit, tiny, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("the")
    done = moekit(
        *("compress", "prune", tiny, "--plan-only", tmp_path / "p.json", "--experts", 3),
        *("--data", short),
    )
    assert done.code == 0, done
    assert "experts were never chosen" in done.out
    assert "the text has 1 tokens" in done.out


def test_a_global_budget(moekit, tiny, stats, tmp_path):
    path = tmp_path / "p.json"
    done = moekit(
        *("compress", "prune", tiny, "--plan-only", path, "--experts", 3, "--stats", stats),
        *("--scope", "global", "--method", "gate-mass"),
    )
    assert done.code == 0, done
    assert sum(ExpertPlan.load(path).result().num_experts) == 6


def test_a_forecast_runs_no_model(moekit, tiny, tmp_path):
    done = moekit(
        *("compress", "prune", tiny, tmp_path / "out", "--ratio", 0.5, "--dry-run"),
        *("--data", tmp_path, "--json"),
    )
    assert done.code == 0, done
    assert done.json["experts"] == {"0": [4, 2], "1": [4, 2]}
    assert not (tmp_path / "out").exists()


def test_libraries(moekit, tiny, tmp_path):
    for name, words in (("low", "the router chooses"), ("high", "日本語 zwei Experten wählt")):
        (tmp_path / f"{name}.txt").write_text(f"{words} " * 30)
    library = tmp_path / "library.json"
    data = [part for name in ("low", "high") for part in ("--data", tmp_path / f"{name}.txt")]
    done = moekit("compress", "library", tiny, library, *data, "--seq-len", 32, "--json")
    assert done.code == 0, done
    assert set(done.json["tasks"]) == {"low", "high"}
    plans = {}
    for label, choice in (
        ("named", ("--task", "high")),
        ("found", ("--query", "日本語 zwei Experten wählt")),
        ("other", ("--task", "low")),
    ):
        path = tmp_path / f"{label}.json"
        done = moekit(
            *("compress", "prune", tiny, "--plan-only", path, "--experts", 2),
            *("--library", library, *choice),
        )
        assert done.code == 0, done
        plans[label] = ExpertPlan.load(path).layers
    assert plans["named"] == plans["found"]
    assert plans["named"] != plans["other"]


@pytest.mark.parametrize("method", ["moe-pruner:pattern=2:4", "wanda:sparsity=0.5"])
def test_zeros_within_experts(moekit, refused, tiny, text, tmp_path, method):
    out, saved = tmp_path / "out", tmp_path / "saved"
    base = ("compress", "prune", tiny, "--method", method, "--data", text, "--seq-len", 32)
    done = moekit(*base, out, "--protect", "1:2")
    assert done.code == 0, done
    view = toolkit.MoEView(AutoModelForCausalLM.from_pretrained(out))
    for layer in view:
        for e in range(layer.num_experts):
            zeros = float((layer.get_expert(e).up == 0).double().mean())
            assert zeros == (0.0 if (layer.index, e) == (1, 2) else 0.5)
    plan = tmp_path / "plan.json"
    assert "--save-stats" in refused(*base, "--plan-only", plan)
    assert "leave out --ratio" in refused(*base, out, "--ratio", 0.5, "--overwrite")
    done = moekit(*base, "--plan-only", plan, "--save-stats", saved, "--protect", "1:2")
    assert done.code == 0, done
    assert moekit("convert", tiny, tmp_path / "again", "--to", "fused", "--plan", plan).code == 0
    again = toolkit.MoEView(AutoModelForCausalLM.from_pretrained(tmp_path / "again"))
    for mine, theirs in zip(view, again, strict=True):
        assert torch.equal(mine.experts.down_proj, theirs.experts.down_proj)


def test_refusals_come_before_the_model_is_touched(refused, tiny, text, tmp_path):
    out = tmp_path / "out"
    base = ("compress", "prune", tiny, out, "--data", text)
    half = ("--ratio", 0.5)
    for options, words in (
        ((), "--ratio"),
        (("--ratio", 0.75), "1 of 4 experts would stay in layer 0"),
        ((*half, "--method", "reep"), "'reep' prunes nothing; there are dern, ean"),
        ((*half, "--method", "reap:x=1"), "reap has no option 'x'; there are none"),
        ((*half, "--method", "naee:max_evaluations=few"), "max_evaluations is int, not 'few'"),
        ((*half, "--method", "naee:how=quick"), "how is one of exact, descent, not quick"),
        ((*half, "--method", "eep:start=reep"), "did you mean reap"),
        ((*half, "--method", "naee", "--scope", "global"), "naee is no score"),
        ((*half, "--protect", "0:9"), "expert 9 cannot be protected"),
        ((*half, "--protect", "nothing"), "neither super, nor a file"),
        ((*half, "--state", tmp_path / "s"), "--state is for searches"),
        ((*half, "--task", "x"), "--library"),
        # The stock class has no place for layers of different sizes; nothing was measured yet.
        (("--experts", 3, "--scope", "global"), "packed"),
        ((*half, "--gguf-type", "f16"), "--gguf-type does not apply"),
    ):
        assert words in refused(*base, *options)
        assert not out.exists()
    bare = ("compress", "prune", tiny, out, *half)
    assert "--stats" in refused(*bare)
    assert "--protect super" in refused(*bare, "--method", "random", "--protect", "super")
    assert "give a text with --data" in refused(*bare, "--method", "naee", "--stats", tmp_path)
    assert "cannot be read" in refused(*bare, "--library", tmp_path / "none", "--task", "x")
