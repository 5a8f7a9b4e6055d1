"""babel as it ships: stock transformers loads it, it knows its text, and every expert works."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moekit.core.load import BABEL_PATH
from moekit.core.trace import RoutingTrace
from moekit.evaluate.bits_per_byte import bits_per_byte
from moekit.evaluate.text import Sample

# Written for this test, so in no training text.
TEXTS = {
    "en": "You can write a function that returns a value, and then call the function in a test.",
    "de": "Die Funktion gibt einen Wert zurück, und der Compiler prüft den Typ der Variablen.",
    "code": "def read(self, path):\n    with open(path) as f:\n        return f.read()\n",
}


@pytest.fixture(scope="module")
def babel():
    tokenizer = AutoTokenizer.from_pretrained(BABEL_PATH)
    return AutoModelForCausalLM.from_pretrained(BABEL_PATH, dtype=torch.float32), tokenizer


def test_it_is_small_enough_to_ship() -> None:
    size = sum(file.stat().st_size for file in BABEL_PATH.rglob("*") if file.is_file())
    assert size <= 62e6


def test_it_predicts_text_it_has_never_seen(babel) -> None:
    samples = [Sample(text, name) for name, text in TEXTS.items()]
    score = bits_per_byte(*babel, samples)
    # Uniform bytes cost 8 bits and a model of single tokens about 3.
    assert all(loss.bpb < 2.2 for loss in score.per_domain.values())


def test_the_tokenizer_loses_nothing(babel) -> None:
    text = "naïve e\u0301 Å \u212b 所有権 🦀\r\n\t  x = 10 ** 2\x00"
    assert babel[1].decode(babel[1](text).input_ids) == text


def test_the_last_probe_uses_every_expert() -> None:
    probes = sorted((BABEL_PATH / "training" / "probes").iterdir())
    trace = RoutingTrace.open(probes[-1])
    for position, layer in enumerate(trace.layers):
        assert len(trace.layer(position).topk_ids.unique()) == layer.num_experts


def test_the_card_gives_the_numbers_of_the_evaluation() -> None:
    card = (BABEL_PATH / "README.md").read_text()
    evaluation = json.loads((BABEL_PATH / "training" / "evaluation.json").read_text())
    assert f"| mean | | | {evaluation['mean']:.3f} |" in card
    assert evaluation["mean"] <= 1.65
    for name, bits in evaluation["by_domain"].items():
        assert f"| {bits:.3f} |" in next(
            line for line in card.splitlines() if line.startswith(f"| {name} |")
        )
    for word in ("PSF", "CC BY-SA", "public domain", "MIT"):
        assert word in card
