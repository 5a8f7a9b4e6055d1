import json

import numpy as np
import pytest
import torch

from moekit.core.load import load
from moekit.core.record import RunRecord
from moekit.core.trace import RoutingTrace
from moekit.core.view import MoEView
from tests.analyze.traces import make_trace, random_ids


@pytest.fixture(scope="module")
def trace(tiny, tmp_path_factory):
    """A trace of the tiny model on random tokens in two domains."""
    path = tmp_path_factory.mktemp("traces") / "trace"
    view = MoEView(load(tiny).model)
    from moekit.core.collect import collect, pad_batches
    from moekit.core.trace_writer import TraceWriter

    generator = torch.Generator().manual_seed(0)
    samples = [
        (torch.randint(0, 100, (50,), generator=generator).tolist(), "en" if i % 2 else "de")
        for i in range(10)
    ]
    collect(view, pad_batches(samples, 5), [TraceWriter(path)])
    return path


def test_tables_and_what_does_not_apply(moekit, trace):
    done = moekit("analyze", trace)
    assert done.code == 0, done.err
    assert "500 tokens in 1 traces, 2 MoE layers of qwen3_moe, 2 domains" in done.out
    assert "load: Load by expert" in done.out
    assert "(Switch Transformers 2101.03961)" in done.out
    assert "not applicable" in done.out
    assert "needs the model: give --model" in done.out


def test_json_and_out_hold_the_same_numbers(moekit, trace, tmp_path):
    out = tmp_path / "analysis"
    done = moekit(
        "analyze", trace, "-m", "load,srp", "--set", "srp.segments=4,8", "--json", "--out", out
    )
    assert done.code == 0, done.err
    assert json.loads((out / "analysis.json").read_text()) == done.json
    assert list(done.json["measures"]) == ["load", "srp"]
    table = done.json["measures"]["load"]["table"]
    opened = RoutingTrace.open(trace)
    for layer, row in enumerate(table):
        counts = np.bincount(opened.layer(layer).topk_ids.flatten(), minlength=4)
        assert row["imbalance"] == pytest.approx(counts.max() / counts.mean())
    assert list(done.json["measures"]["srp"]["table"][0])[1:3] == ["m=4", "m=8"]
    record = RunRecord.load(out)
    assert record.command == "analyze"
    assert [file.name for file in record.inputs] == [str(trace / "trace.json")]
    assert not out.with_name("analysis.partial").exists()


def test_the_model_is_run_again(moekit, trace, tiny):
    done = moekit("analyze", trace, "--model", tiny, "-m", "next-gate,proxy-metrics", "--json")
    assert done.code == 0, done.err
    assert done.json["measures"]["next-gate"]["summary"]["tokens"] == 500


def test_probes_of_a_training_run(moekit, tmp_path):
    for step in range(5):
        probe = make_trace(random_ids(60, 4, 1, seed=step), 4, step=step)
        probe.save(tmp_path / "run" / "probes" / f"step-{step:06d}")
    done = moekit("analyze", tmp_path / "run", "-m", "training-phases", "--json")
    assert done.code == 0, done.err
    assert [row["step"] for row in done.json["measures"]["training-phases"]["table"]] == [*range(5)]


def test_what_cannot_be_analysed(refused, trace, tiny, tmp_path):
    empty = tmp_path / "empty"
    make_trace(np.empty((0, 1, 2), dtype=int), 4).save(empty)
    other = tmp_path / "other"
    make_trace(random_ids(30, 4, 2, layers=2), 4, model_type="olmoe").save(other)
    idle = tmp_path / "idle"
    make_trace(np.full((30, 2, 2), -1), 4).save(idle)
    one = tmp_path / "one"
    make_trace(random_ids(300, 4, 2), 4, domains=["en"]).save(one)
    few = tmp_path / "few"
    make_trace(
        random_ids(320, 4, 2), 4, lengths=[150, 150, 10, 10], domains=["en", "en", "fr", "fr"]
    ).save(few)
    for args, words in (
        ((tmp_path / "nothing",), "is no trace"),
        ((tmp_path / "few" / "trace.json",), "is no trace"),
        ((empty,), "the trace is empty: it has no tokens"),
        ((idle,), "no expert was chosen in any layer in the 30 tokens"),
        ((trace, other), "the traces are of different models: qwen3_moe"),
        ((other, "--model", tiny), "of a olmoe model, the model given is qwen3_moe"),
        ((one, "-m", "specialisation"), "the trace has one domain (en)"),
        ((few, "-m", "specialisation"), "domain 'fr' has 20 tokens in 2 samples: too little"),
        ((few, "-m", "language-divergence"), "domain 'fr' has 20 tokens"),
        ((trace, "-m", "loud"), "did you mean load?"),
        ((trace, "-m", "next-gate"), "next-gate: needs the model: give --model"),
        ((trace, "-m", "training-phases"), "needs the probe traces of a training run"),
        ((trace, "--set", "srp"), "is not MEASURE.OPTION=VALUE"),
        ((trace, "--set", "srp.length=3"), "no option 'length'; options: segments"),
        ((trace, "--set", "srp.segments=four"), "segments is 'four'; it must be numbers above 0"),
        ((trace, "--set", "srp.bootstrap=many"), "bootstrap is 'many'; it must be of type int"),
        ((trace, "--set", "specialisation.permutations=0"), "permutations is 0; it must be 1"),
        ((trace, "-m", "cognitive-experts"), "needs markers (--set cognitive-experts.markers="),
        ((trace, "--set", "cognitive-experts.markers=[999]"), "markers [999] do not occur"),
        ((trace, "--out", tmp_path), "exists already"),
    ):
        assert words in refused("analyze", *args)


def test_one_sample_is_analysed_as_far_as_it_goes(moekit, tmp_path):
    make_trace(random_ids(3, 4, 2, layers=2), 4).save(tmp_path / "short")
    done = moekit("analyze", tmp_path / "short", "--json")
    assert done.code == 0, done.err
    assert "load" in done.json["measures"]
    assert "3 tokens are too few" in done.json["left_out"]["layer-prediction"]
    assert "none of the 3 tokens" in done.json["left_out"]["token-identity"]


def test_routing_that_another_server_recorded(moekit, tiny, tmp_path):
    np.save(tmp_path / "chat.npy", random_ids(200, 4, 2, layers=2))
    done = moekit("analyze", tmp_path / "chat.npy", "-m", "load,srp", "--model", tiny, "--json")
    assert done.code == 0, done.err
    assert done.json["tokens"] == [200]
    assert done.json["model_type"] == "qwen3_moe"
    assert done.json["measures"]["load"]["table"][0]["imbalance"] < 1.3
    done = moekit("analyze", tmp_path / "chat.npy", "-m", "load")
    assert done.code == 2
    assert "chat.npy does not tell its model: give --model" in done.err
    np.save(tmp_path / "chat.npy", random_ids(200, 8, 2, layers=2))
    done = moekit("analyze", tmp_path / "chat.npy", "-m", "load", "--model", tiny)
    assert done.code == 2
    assert "whose experts are 0 to 3" in done.err


def test_measures_of_the_model(moekit, trace, tiny):
    names = "super-experts,redundancy,coupling,causal-importance"
    done = moekit("analyze", trace, "-m", names, "--model", tiny, "--json")
    assert done.code == 0, done.err
    found = {name: row["summary"] for name, row in done.json["measures"].items()}
    assert found["super-experts"]["super_experts"] == 0
    assert found["redundancy"]["near_duplicates"] == 0
    assert found["coupling"]["layers"] == 2
    # Two layers and four experts in each.
    assert found["causal-importance"]["ablations"] == 10
    done = moekit("analyze", trace, "-m", "coupling")
    assert done.code == 2
    assert "coupling: needs the model: give --model" in done.err
