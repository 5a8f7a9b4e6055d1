"""The trainer as a user runs it: it learns, resumes exactly, and agrees over processes."""

import dataclasses
import json
import signal
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moekit.core.trace import RoutingTrace
from moekit.train.metrics import router_metrics
from moekit.train.recipe import load_recipe
from tests.interrupts import INTERRUPTED

from .conftest import command, losses, run, write_recipe

ON_CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, texts):
    """One uninterrupted run, with probes and an evaluation on the way."""
    folder = tmp_path_factory.mktemp("run")
    path = write_recipe(
        folder,
        optim={"lr": 0.01, "embedding_lr": 0.03, "decay": 0.4},
        train={
            **{"tokens": 24 * 4 * 32, "eval_every": 10, "checkpoint_every": 5},
            **{"probe_at": [0, 24], "probe_bytes": 300},
        },
    )
    done = run(path, texts, folder / "out", "--json")
    assert done.returncode == 0, done.stderr
    return path, folder / "out", json.loads(done.stdout)


def test_it_learns_and_reports(finished) -> None:
    _, out, report = finished
    steps = losses(out)
    assert len(steps) == 24
    # ln 384 = 5.95 at the start; an untrained or wrongly stepped model stays there.
    assert steps[0] == pytest.approx(5.95, abs=0.15)
    assert sum(steps[-4:]) / 4 < steps[0] - 0.7
    assert set(report["valid"]["by_domain"]) == {"code", "prose"}
    entry = json.loads((out / "training" / "log.jsonl").read_text().splitlines()[-1])
    assert len(entry["routers"]["imbalance"]) == 2
    assert not out.with_name("out.partial").exists()


def test_the_result_loads_in_stock_transformers(finished) -> None:
    _, out, _ = finished
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.config.model_type == "qwen3_moe"
    text = "def f(x):\n    return x\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert "| mean |" in (out / "README.md").read_text()
    assert "moekit" not in (out / "config.json").read_text()


def test_probes_are_traces_of_the_same_text(finished) -> None:
    _, out, _ = finished
    first, last = (
        RoutingTrace.open(out / "training" / "probes" / f"step-{step:06d}") for step in (0, 24)
    )
    assert torch.equal(first.tokens, last.tokens)
    assert not torch.equal(first.layer(0).topk_ids, last.layer(0).topk_ids)
    # What the congestion coefficient rests on where it can.
    logits = last.layer(0).logits
    assert logits is not None
    assert torch.equal(
        logits.topk(last.layers[0].top_k).indices.sort().values,
        last.layer(0).topk_ids.sort().values.long(),
    )


def test_an_interrupted_run_resumes_to_the_same_weights(finished, texts, tmp_path) -> None:
    path, reference, _ = finished
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(path, texts, out), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 7/"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.communicate(timeout=120)[1]
    assert process.returncode in INTERRUPTED
    assert "resumes" in rest
    assert not out.exists()
    done = run(path, texts, out)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    assert losses(out) == losses(reference)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, reference))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_died_after_its_last_step_is_only_finished(
    recipe, texts, tmp_path, moekit, monkeypatch
) -> None:
    path, out = recipe(train={"checkpoint_every": 100}), tmp_path / "out"
    arguments = ["train", path, "--data", texts, "--out", out, *ON_CPU]

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("moekit.train.finish.model_card", full)
        done = moekit(*arguments)
    assert done.code == 2
    assert "no space left" in done.err
    assert not out.exists()
    done = moekit(*arguments, "--json")
    assert done.code == 0, done.err
    assert "measuring" not in done.err
    assert done.json["last"]["step"] == 8
    assert len(losses(out)) == 8


def test_a_killed_run_resumes_too(finished, texts, tmp_path) -> None:
    path, reference, _ = finished
    out = tmp_path / "out"
    process = subprocess.Popen(command(path, texts, out), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 8/"):
            process.kill()
            break
    process.communicate(timeout=60)
    assert run(path, texts, out).returncode == 0
    assert losses(out) == losses(reference)


def test_two_processes_give_the_losses_of_one(finished, texts, tmp_path) -> None:
    path, reference, _ = finished
    done = run(path, texts, tmp_path / "out", processes=2)
    assert done.returncode == 0, done.stderr
    # The same windows in the same micro-batches; sums in another order, so the last digits drift.
    assert losses(tmp_path / "out")[:8] == pytest.approx(losses(reference)[:8], abs=2e-3)


def test_a_dense_model_trains_with_adamw(recipe, texts, tmp_path, moekit) -> None:
    path = recipe(model=None, optim={"name": "adamw", "lr": 0.02, "embedding_lr": 0.05})
    done = moekit("train", path, "--data", texts, "--out", tmp_path / "out", *ON_CPU)
    assert done.code == 0, done.err
    steps = losses(tmp_path / "out")
    assert steps[-1] < steps[0] - 0.3
    assert "routers" not in (tmp_path / "out" / "training" / "log.jsonl").read_text()


def test_dry_run_forecasts_and_writes_nothing(recipe, texts, tmp_path, moekit) -> None:
    out = tmp_path / "out"
    done = moekit("train", recipe(), "--data", texts, "--out", out, "--dry-run", "--json")
    assert done.code == 0, done.err
    assert done.json["steps"] == 8
    assert done.json["active_parameters"] < done.json["parameters"]
    assert list(tmp_path.glob("out*")) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.num_experts_per_tok=9", "9 exceeds the 8 experts"),
        ("model.moe_intermediate_size=20", "20 is not a multiple of 8"),
        ("model.model_type=qwen3_mo", "qwen3_moe"),
        ("train.seq_len=64000", "max_position_embeddings 64"),
        ("balance.rule=bias", "no correction bias"),
        ("tokenizer.vocab_size=100", "need 257"),
        ("data.train='*.nothing'", "no file matches"),
        ("data.train=*.nothing", "put quotes around"),
        ("data.weights={code: 1}", "without a weight"),
    ],
)
def test_bad_recipes_are_refused(recipe, texts, tmp_path, moekit, change, message) -> None:
    out = tmp_path / "out"
    done = moekit("train", recipe(), "--data", texts, "--out", out, "--set", change, *ON_CPU)
    assert done.code == 2, done.err
    assert message in done.err
    assert not out.exists()


def test_another_recipe_does_not_resume_a_run(recipe, texts, tmp_path, moekit) -> None:
    out = tmp_path / "out"
    (tmp_path / "out.partial").mkdir()
    other = dataclasses.asdict(load_recipe(recipe(), ["train.seed=5"]))
    (tmp_path / "out.partial" / "recipe.json").write_text(json.dumps(other))
    arguments = ["train", recipe(), "--data", texts, "--out", out, *ON_CPU]
    done = moekit(*arguments)
    assert done.code == 2
    assert "different recipe" in done.err
    assert moekit(*arguments, "--restart").code == 0


def test_a_damaged_checkpoint_is_refused(recipe, texts, tmp_path, moekit) -> None:
    path = recipe()
    checkpoint = tmp_path / "out.partial" / "checkpoint"
    checkpoint.mkdir(parents=True)
    settings = dataclasses.asdict(load_recipe(path))
    (checkpoint.parent / "recipe.json").write_text(json.dumps(settings))
    (checkpoint / "state.json").write_text('{"step": 3, "tokens": 384}')
    (checkpoint / "weights.safetensors").write_bytes(b"cut short")
    done = moekit("train", path, "--data", texts, "--out", tmp_path / "out", *ON_CPU)
    assert done.code == 2, done.err
    assert "cannot be read" in done.err


def test_router_metrics_of_a_known_load() -> None:
    metrics = router_metrics([torch.tensor([4.0, 4, 4, 4]), torch.tensor([16.0, 0, 0, 0])])
    assert metrics["imbalance"] == [1.0, 4.0]
    assert metrics["entropy"] == [1.0, 0.0]
    assert metrics["dead"] == 3
