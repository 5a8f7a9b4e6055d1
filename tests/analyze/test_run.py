import json

import numpy as np
import pytest

from moekit.analyze import Result, analyze, measures, open_traces
from moekit.core.errors import UserError

from .traces import make_trace, random_ids


def text(seed=0, samples=8, length=60, names=("en", "de"), **options):
    tokens = np.random.default_rng(seed).integers(0, 30, samples * length)
    domains = [names[i % len(names)] for i in range(samples)]
    ids = random_ids(samples * length, 8, 2, layers=3, seed=seed)
    lengths = [length] * samples
    return make_trace(ids, 8, lengths=lengths, domains=domains, tokens=tokens, **options)


def test_all_that_apply_and_why_others_do_not():
    analysis = analyze(text(), settings={"srp": {"segments": "4,16"}})
    assert {method.name for method in measures()} == {*analysis.results, *analysis.left_out}
    assert set(analysis.left_out) >= {
        "training-phases",
        "routing-drift",
        "cognitive-experts",
        "behaviour-audit",
        "next-gate",
        "proxy-metrics",
    }
    assert analysis.left_out["next-gate"] == "needs the model: give --model"
    assert "--set cognitive-experts.markers=" in analysis.left_out["cognitive-experts"]
    content = json.loads(json.dumps(analysis.to_dict(), allow_nan=False))
    assert content["measures"]["srp"]["table"][0].keys() >= {"layer", "m=4", "m=16"}
    for result in analysis.results.values():
        assert all(len(row) == len(result.columns) for row in result.rows)


def test_a_trace_in_chunks_gives_the_same():
    """Nothing depends on how the trace is stored."""
    whole, cut = (analyze(text(chunk=chunk)).to_dict() for chunk in (None, 37))
    assert whole == cut


def test_what_is_asked_for_must_run():
    with pytest.raises(UserError, match="did you mean load"):
        analyze(text(), ["laod"])
    with pytest.raises(UserError, match="specialisation: the trace has one domain"):
        analyze(text(names=("en",)), ["specialisation"])
    with pytest.raises(UserError, match="load: no option 'x'; options: none"):
        analyze(text(), settings={"load": {"x": 1}})
    with pytest.raises(UserError, match="next-gate: needs the model"):
        analyze(text(), ["next-gate"])
    with pytest.raises(UserError, match="behaviour-audit: needs positive and negative"):
        analyze(text(), ["behaviour-audit"])
    with pytest.raises(UserError, match="trace is empty"):
        analyze(make_trace(np.empty((0, 1, 2), dtype=int), 4))
    with pytest.raises(UserError, match="no trace to analyse"):
        analyze([])


def test_several_traces_are_one_text():
    both = [text(names=("en",)), text(seed=1, names=("de", "en"))]
    found = analyze(both, ["load", "specialisation"]).results
    assert found["load"].summary["tokens"] == 960
    assert found["specialisation"].detail["domains"] == ["en", "de"]
    alone = [analyze(trace, ["load"]).results["load"] for trace in both]
    counts = sum(np.array(result.detail["counts"]) for result in alone)
    assert np.array_equal(found["load"].detail["counts"], counts)


def test_probes_are_a_course_in_order_of_step():
    probes = [text(step=step) for step in (300, 100, 200)]
    found = analyze(probes, ["routing-drift", "load"]).results
    assert found["routing-drift"].column("step") == [100, 200, 300]
    assert found["load"].summary["tokens"] == 480


def test_opening_traces(tmp_path):
    for step in (1, 2):
        text(seed=step, step=step).save(tmp_path / "run" / "probes" / f"step-{step}")
    (tmp_path / "run" / "probes" / "step-3.partial").mkdir()
    for path in (tmp_path / "run", tmp_path / "run" / "probes"):
        assert [t.header.metadata["step"] for t in open_traces([path])] == [1, 2]
    with pytest.raises(UserError, match="is no trace and holds none"):
        open_traces([tmp_path])
    make_trace(random_ids(20, 4, 1), 4, model_type="other").save(tmp_path / "other")
    with pytest.raises(UserError, match="different models: synthetic with 3 MoE layers of 8"):
        open_traces([tmp_path / "run", tmp_path / "other"])


def test_results_in_plain_types():
    result = Result(("a",), [(np.float32(0.5),)], {"x": float("nan")}, {"y": np.arange(2)})
    assert result.to_dict() == {
        "summary": {"x": None},
        "table": [{"a": 0.5}],
        "detail": {"y": [0, 1]},
        "notes": [],
    }
