"""Models of moekit's own classes in the rest of the house: engine, conversion, what is refused."""

import pytest
import torch

import moekit
from moekit.core.convert import convert
from moekit.core.errors import UserError
from moekit.core.spec import MoESpec
from moekit.upcycle.run import Request, upcycle
from tests.upcycle.dense_models import logits, read, tokens

MADE = {
    "bam": ("code", {}),
    "bam-shared-kv": ("code", {"gate": "one"}),
    "mote": (None, {"experts": 3}),
    "read-me": (None, {"router_steps": 2, "router_width": 16}),
}
WITHOUT_BANKS = {
    "flexmore": ("ffn-code", {"ranks": 4}),
    "branch-train-merge": ("code", {}),
}


def make(models, out, method):
    other, options = (MADE | WITHOUT_BANKS)[method]
    others = () if other is None else (str(models[other]),)
    data = (str(models["texts"]),) if method == "read-me" else ()
    upcycle(Request(method, str(models["base"]), others, options, data=data), out, check=False)
    return out


@pytest.mark.parametrize("method", MADE)
def test_the_engine_generates_what_the_model_does(family_of_models, tmp_path, method):
    path = make(family_of_models, tmp_path / "made", method)
    ids = tokens(batch=1)
    expected = read(path).generate(ids, max_new_tokens=6, do_sample=False)
    with moekit.open_engine(path) as engine:
        assert torch.equal(engine.generate(ids, 6), expected)


@pytest.mark.parametrize("method", ["bam-shared-kv", "read-me", *WITHOUT_BANKS])
def test_a_conversion_keeps_the_function(family_of_models, tmp_path, method):
    path = make(family_of_models, tmp_path / "made", method)
    convert(path, tmp_path / "again", to="fused")
    assert torch.equal(logits(read(path), tokens()), logits(read(tmp_path / "again"), tokens()))


@pytest.mark.parametrize("method", WITHOUT_BANKS)
def test_what_has_no_bank_says_what_it_can(family_of_models, tmp_path, method):
    path = make(family_of_models, tmp_path / "made", method)
    with pytest.raises(UserError, match="moekit eval"):
        MoESpec.from_dir(path)


def test_an_unknown_part_is_named(family_of_models, tmp_path):
    path = make(family_of_models, tmp_path / "made", "mote")
    config = path / "config.json"
    config.write_text(config.read_text().replace('"ternary"', '"quaternary"'))
    with pytest.raises(UserError, match=r"'quaternary', not one of attention-experts"):
        read(path)
