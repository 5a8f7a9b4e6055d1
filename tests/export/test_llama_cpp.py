"""GGUF files in llama.cpp, where llama-cpp-python is installed: the logits of transformers."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer
from transformers.utils import logging

from moekit.core.convert import convert
from moekit.core.plan import Action, ExpertPlan
from moekit.core.spec import spec_of
from moekit.export.gguf import convert_gguf

from .gguf_check import VARIANTS, build, llama_logits, own_logits, save

pytest.importorskip("llama_cpp")

IDS = [int(i) for i in np.random.default_rng(0).integers(3, 300, 96)]
# Two programs that sum in fp32 in another order; the largest gap seen is 2.3e-5 on logits of
# about 1. A wrong rule (another rotary embedding, weights that are not normalised) moves them by
# 0.1 and more.
SUMMATION = 2e-4


@pytest.fixture(autouse=True)
def quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_the_logits_of_transformers(tmp_path, variant):
    model = save(variant, tmp_path / "model")
    convert_gguf(tmp_path / "model", tmp_path / "out.gguf", gguf_type="f32")
    found = llama_logits(tmp_path / "out.gguf", IDS)
    assert np.abs(found - own_logits(model, IDS)).max() < SUMMATION


def test_exact_bounds_of_yarn_are_what_llama_cpp_lacks(tmp_path):
    """What the note on `truncate: false` says: nothing else in such a model differs."""
    model = save("gpt_oss", tmp_path / "model")
    convert_gguf(tmp_path / "model", tmp_path / "out.gguf", gguf_type="f32")
    exact = build("gpt_oss")
    exact.load_state_dict(model.state_dict())
    exact.config.rope_parameters["truncate"] = False
    rotary = exact.model.rotary_emb
    exact.model.rotary_emb = type(rotary)(exact.config)
    gap = np.abs(own_logits(exact, IDS) - own_logits(model, IDS)).max()
    found = llama_logits(tmp_path / "out.gguf", IDS)
    assert gap > 100 * SUMMATION
    assert np.abs(found - own_logits(exact, IDS)).max() > gap - SUMMATION


@pytest.mark.parametrize(
    ("kind", "relative"),
    [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 6e-2), ("q4_0", 0.6), ("mxfp4", 0.4)],
)
def test_number_formats_are_read_as_written(tmp_path, kind, relative):
    """Within about twice the gap seen, which the rounding of weights and activations makes.

    Noise would give 1.4; random weights, unlike trained ones, amplify every rounding.
    """
    model = save("qwen3_moe", tmp_path / "model")
    convert_gguf(tmp_path / "model", tmp_path / "out.gguf", gguf_type=kind)
    own = own_logits(model, IDS)
    found = llama_logits(tmp_path / "out.gguf", IDS)
    # The median, because a token near a tie may be sent to another expert.
    errors = np.linalg.norm(found - own, axis=1) / np.linalg.norm(own, axis=1)
    assert np.median(errors) < relative


def test_tokens_of_a_text(tmp_path):
    from llama_cpp import Llama

    save("qwen3_moe", tmp_path / "model")
    convert_gguf(tmp_path / "model", tmp_path / "out.gguf")
    own = AutoTokenizer.from_pretrained(tmp_path / "model")
    llama = Llama(str(tmp_path / "out.gguf"), vocab_only=True, verbose=False)
    vocabulary = json.loads((tmp_path / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    for text in ("Hello  world, it's 1234!", "  naïve\n\n\tdef f(x): return x", *vocabulary):
        assert llama.tokenize(text.encode(), add_bos=False, special=True) == own.encode(text), text
    llama.close()


@pytest.mark.parametrize("variant", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_a_pruned_and_folded_model(tmp_path, variant):
    """A plan that folds experts: llama.cpp computes what transformers does."""
    model = save(variant, tmp_path / "model")
    layers = {}
    for layer in spec_of(model).per_layer:
        size = layer.num_experts // layer.num_groups
        layers[layer.layer_index] = {
            first + place: action
            for first in range(0, layer.num_experts, size)
            for place, action in enumerate(
                (Action(group=first, weight=0.5), Action(group=first, weight=0.5))
            )
        }
    plan = ExpertPlan(layers, routers=dict.fromkeys(layers, "mean"))
    result = convert_gguf(tmp_path / "model", tmp_path / "out.gguf", plan, gguf_type="f32")
    assert all(after < before for before, after in result.experts.values())
    convert(tmp_path / "model", tmp_path / "small", "fused", plan)
    small = type(model).from_pretrained(tmp_path / "small")
    found = llama_logits(tmp_path / "out.gguf", IDS)
    assert np.abs(found - own_logits(small, IDS)).max() < SUMMATION
