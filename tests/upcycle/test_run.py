"""Writing: an interrupted run resumes, another request does not, a false claim writes nothing."""

from __future__ import annotations

import dataclasses

import pytest

from moekit.core.deferred import Deferred
from moekit.core.errors import UserError
from moekit.upcycle import run
from moekit.upcycle.converter import KIND, Job, Made, find_converter, preset
from moekit.upcycle.from_dense import dense_to_moe
from moekit.upcycle.run import Request, upcycle
from moekit.upcycle.start import Start
from tests.upcycle.dense_models import dense_config, write_dense


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_dense(tmp_path_factory.mktemp("dense") / "base", dense_config("llama"))


def interrupt_after(monkeypatch, count):
    """Writing stops after `count` tensors, as by Ctrl-C."""
    read, seen = Deferred.pieces, []

    def pieces(self, *args, **options):
        seen.append(self)
        if len(seen) > count:
            raise KeyboardInterrupt
        return read(self, *args, **options)

    monkeypatch.setattr(Deferred, "pieces", pieces)


def test_an_interrupted_run_goes_on_and_ends_the_same(base, tmp_path, monkeypatch):
    request = Request("drop", str(base), options={"experts": 4})
    upcycle(request, tmp_path / "whole", check=False)
    with monkeypatch.context() as patched:
        interrupt_after(patched, 9)
        with pytest.raises(KeyboardInterrupt):
            upcycle(request, tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()
    other = dataclasses.replace(request, options={"experts": 6})
    with pytest.raises(UserError, match="--restart"):
        upcycle(other, tmp_path / "out", check=False)
    notes: list[str] = []
    result = upcycle(request, tmp_path / "out", check=False, note=notes.append)
    assert result.resumed_bytes > 0
    assert any("Resuming" in line for line in notes)
    first, again = (tmp_path / out / "model.safetensors" for out in ("whole", "out"))
    assert first.read_bytes() == again.read_bytes()


def test_a_claim_that_does_not_hold_writes_nothing(base, tmp_path, monkeypatch):
    def wrong(job: Job) -> Made:
        made = dense_to_moe(job, reinit=0.5)
        return dataclasses.replace(made, start=Start.equal("so it is said."))

    monkeypatch.setattr(run, "find_converter", lambda name, options: wrong)
    with pytest.raises(UserError, match="should compute at step 0 what the source does"):
        upcycle(Request("wrong", str(base)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    result = upcycle(Request("wrong", str(base)), tmp_path / "out", check=False)
    assert result.measured is None


def test_models_that_do_not_fit_in_memory_are_not_measured(base, tmp_path, monkeypatch):
    monkeypatch.setattr("moekit.upcycle.check_start.available_memory", lambda: 1000)
    result = upcycle(Request("sparse", str(base)), tmp_path / "out")
    assert result.measured is None
    assert any("not measured" in line for line in result.notes)


def test_an_existing_output_is_left_alone_unless_it_may_be_replaced(base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="exists"):
        upcycle(Request("sparse", str(base)), tmp_path / "out", check=False)
    upcycle(Request("sparse", str(base)), tmp_path / "out", check=False, overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "words"),
    [({"dtype": "float8"}, "float8"), ({"to": "gguf"}, "fused and per-expert")],
)
def test_formats_that_are_not(base, tmp_path, change, words):
    request = dataclasses.replace(Request("sparse", str(base)), **change)
    with pytest.raises(UserError, match=words):
        upcycle(request, tmp_path / "out")


def test_settings_of_a_kernel_keep_or_fix_its_options():
    drop = find_converter("drop", {"experts": 4})
    bound = {"experts": 4, "reinit": 0.5, "slices": 1}
    assert {name: drop.keywords[name] for name in bound} == bound
    assert find_converter("drop", {"reinit": 0.25}).keywords["reinit"] == 0.25
    with pytest.raises(UserError, match="no option 'slices'"):
        find_converter("drop", {"slices": 2})
    with pytest.raises(ValueError, match=f"no options of {dense_to_moe.__name__}"):
        preset(dense_to_moe, "wrong", title="Wrong", settings={"slice": 1})
    with pytest.raises(UserError, match=f"no {KIND} method is named 'dropp': did you mean drop"):
        find_converter("dropp", {})
