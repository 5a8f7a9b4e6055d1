"""GGUF files: read back, against the model they come from."""

import copy
import json
import os

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from moekit.core.errors import UserError
from moekit.core.plan import Action, ExpertPlan
from moekit.core.record import RunRecord
from moekit.export import gguf as module
from moekit.export.gguf import convert_gguf
from moekit.export.gguf_families import FAMILIES
from moekit.export.gguf_types import FILE_TYPES, encode, encoding
from tests.families.tiny import TINY, build_tiny

from .gguf_check import VARIANTS, YARN, own_logits, save, tokenizer


@pytest.fixture(autouse=True)
def quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def values(path):
    """Tensors by name, decoded to f32, with their formats; and all keys."""
    reader = gguf.GGUFReader(path)
    tensors = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist())
        for t in reader.tensors
    }
    kinds = {t.name: t.tensor_type.name.lower() for t in reader.tensors}
    return tensors, kinds, {name: field.contents() for name, field in reader.fields.items()}


def half(tensor):
    return tensor.detach().to(torch.float16).float().numpy()


def test_every_family_has_a_variant():
    assert {family for family, _ in VARIANTS.values()} == set(FAMILIES)


@pytest.mark.parametrize("variant", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoeshared"])
def test_tensors_are_the_models_rounded_once(tmp_path, variant):
    model = save(variant, tmp_path / "model")
    result = convert_gguf(tmp_path / "model", tmp_path / "out.gguf")
    tensors, kinds, keys = values(tmp_path / "out.gguf")
    state = model.state_dict()
    assert np.array_equal(tensors["token_embd.weight"], half(state["model.embed_tokens.weight"]))
    banks = [name for name in state if name.endswith(".experts.down_proj")]
    assert len(banks) == 3
    for layer, name in enumerate(sorted(banks)):
        down, both = state[name], state[name.replace("down_proj", "gate_up_proj")]
        if variant == "gpt_oss":
            down, both = down.mT, both.mT
            gate, up = both[:, ::2], both[:, 1::2]
        else:
            gate, up = both.chunk(2, dim=1)
        for kind, expected in (("gate", gate), ("up", up), ("down", down)):
            found = f"blk.{layer}.ffn_{kind}_exps.weight"
            assert np.array_equal(tensors[found], half(expected))
            assert kinds[found] == "f16"
        assert kinds[f"blk.{layer}.ffn_gate_inp.weight"] == "f32"
    query, given = state["model.layers.1.self_attn.q_proj.weight"], tensors["blk.1.attn_q.weight"]
    if "q_proj" in FAMILIES[VARIANTS[variant][0]].pairs:
        # Rows 0 and 8 of a head of 16 turn together; llama.cpp wants them beside each other.
        query = query[[head * 16 + i // 2 + i % 2 * 8 for head in range(4) for i in range(16)]]
    assert np.array_equal(given, half(query))
    assert result.tensors == len(tensors)
    arch = keys["general.architecture"]
    assert keys[f"{arch}.expert_count"] == 8
    assert keys[f"{arch}.expert_used_count"] == 2
    assert RunRecord.load(tmp_path / "out.gguf.record.json").metrics["bytes"] == result.bytes
    assert sorted(os.listdir(tmp_path)) == ["model", "out.gguf", "out.gguf.record.json"]


@pytest.mark.parametrize("variant", ["qwen3_moe", "minimax_m2"])
def test_transformers_reads_it_back(tmp_path, variant):
    model = save(variant, tmp_path / "model")
    convert_gguf(tmp_path / "model", tmp_path / "out.gguf", gguf_type="f32")
    # transformers does not take this width from the file.
    width = getattr(model.config, "moe_intermediate_size", None)
    widths = {} if width is None else {"moe_intermediate_size": width}
    back = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="out.gguf", dtype=torch.float32, **widths
    )
    ids = list(range(3, 40))
    assert np.allclose(own_logits(model, ids), own_logits(back, ids), atol=1e-5)


@pytest.mark.parametrize("variant", [*VARIANTS])
def test_every_variant_is_written(tmp_path, variant):
    save(variant, tmp_path / "model")
    result = convert_gguf(tmp_path / "model", tmp_path / "out.gguf", gguf_type="q8_0")
    _, kinds, keys = values(tmp_path / "out.gguf")
    assert result.types == {k: list(kinds.values()).count(k) for k in sorted(set(kinds.values()))}
    assert kinds["blk.1.ffn_down_exps.weight"] == "q8_0"
    assert "output.weight" in kinds or "tie_word_embeddings" in VARIANTS[variant][1]
    assert keys["tokenizer.ggml.pre"] == "qwen2"


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_each_format_keeps_its_bound(tmp_path, kind):
    numbers = torch.randn(6, 4, 64, generator=torch.Generator().manual_seed(1))
    to = encoding(kind)
    data = encode("x", numbers, to)
    assert data.nbytes == to.nbytes((6, 4, 64))
    back = gguf.quants.dequantize(
        np.frombuffer(data.tobytes(), np.uint8).reshape(6, 4, -1),
        gguf.GGMLQuantizationType[kind.upper()],
    ).reshape(6, 4, 64)
    blocks = numbers.numpy().reshape(-1, 32)
    largest = np.abs(blocks).max(1, keepdims=True)
    spread = blocks.max(1, keepdims=True) - blocks.min(1, keepdims=True)
    # Half a step where the grid covers the block, a whole one at its open end (q4_0 and q5_0 have
    # one step less on one side), and the step itself is rounded to f16.
    rounded = largest * 2**-11
    bounds = {
        "f32": 0 * largest,
        "f16": np.abs(blocks) * 2**-11 + 2**-25,
        "bf16": np.abs(blocks) * 2**-8,
        "q8_0": largest / 127 / 2 + rounded,
        "q5_1": spread / 31 / 2 + 3 * rounded,
        "q5_0": largest / 16 + rounded,
        "q4_1": spread / 15 / 2 + 3 * rounded,
        "q4_0": largest / 8 + rounded,
        # The largest values of a block are rounded to 4 or 6 of its units, or down to 6 from 8.
        "mxfp4": largest / 4,
    }
    assert (np.abs(back.reshape(-1, 32) - blocks) <= bounds[kind]).all()


def test_small_formats_spare_the_vocabulary(tmp_path):
    save("qwen3_moe", tmp_path / "model")
    convert_gguf(tmp_path / "model", tmp_path / "a.gguf", gguf_type="q4_0")
    convert_gguf(tmp_path / "model", tmp_path / "b.gguf", gguf_type="mxfp4")
    small, experts_only = values(tmp_path / "a.gguf")[1], values(tmp_path / "b.gguf")[1]
    assert small["output.weight"] == small["token_embd.weight"] == "q8_0"
    assert small["blk.0.attn_q.weight"] == small["blk.0.ffn_up_exps.weight"] == "q4_0"
    assert experts_only["blk.0.attn_q.weight"] == "q8_0"
    assert experts_only["blk.0.ffn_up_exps.weight"] == "mxfp4"


def test_rows_without_whole_blocks_stay_in_f16(tmp_path):
    config = TINY["olmoe"]()
    build_tiny("olmoe", config=config).save_pretrained(tmp_path / "model")
    result = convert_gguf(tmp_path / "model", tmp_path / "out.gguf", gguf_type="q8_0")
    kinds = values(tmp_path / "out.gguf")[1]
    assert kinds["blk.0.ffn_down_exps.weight"] == "f16"
    assert kinds["blk.0.ffn_up_exps.weight"] == "q8_0"
    assert any("3 tensors are in f16" in note for note in result.notes)
    assert any("no tokenizer" in note for note in result.notes)


def test_plan_drops_experts(tmp_path):
    model = save("qwen3_moe", tmp_path / "model")
    plan = ExpertPlan({layer: {2: Action(drop=True)} for layer in range(3)})
    result = convert_gguf(tmp_path / "model", tmp_path / "out.gguf", plan)
    tensors, _, keys = values(tmp_path / "out.gguf")
    assert keys["qwen3moe.expert_count"] == 7
    assert result.experts == {0: (8, 7), 1: (8, 7), 2: (8, 7)}
    kept = model.state_dict()["model.layers.0.mlp.experts.down_proj"][[0, 1, 3, 4, 5, 6, 7]]
    assert np.array_equal(tensors["blk.0.ffn_down_exps.weight"], half(kept))


def test_never_more_than_a_piece_at_a_time(tmp_path, monkeypatch):
    save("mixtral", tmp_path / "model")
    monkeypatch.setattr(module, "PIECE_BYTES", 1)
    sizes = []
    monkeypatch.setattr(
        module, "encode", lambda n, piece, to: (sizes.append(piece.shape), encode(n, piece, to))[1]
    )
    convert_gguf(tmp_path / "model", tmp_path / "out.gguf")
    assert all(shape[0] == 1 for shape in sizes)
    assert (1, 96, 64) in sizes  # one expert


def test_vocabulary(tmp_path):
    save("qwen3_moe", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    convert_gguf(tmp_path / "model", tmp_path / "out.gguf")
    keys = values(tmp_path / "out.gguf")[2]
    content = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    end = next(t["id"] for t in content["added_tokens"])
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert all(tokens[number] == token for token, number in vocab.items())
    assert len(tokens) == 320 > len(vocab)
    assert tokens[-1] == "[PAD319]"
    assert kinds[-1] == gguf.TokenType.UNUSED
    assert kinds[end] == gguf.TokenType.CONTROL
    assert keys["tokenizer.ggml.eos_token_id"] == end
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.ggml.merges"][0] == " ".join(content["model"]["merges"][0])
    assert keys["tokenizer.chat_template"] == "{{ messages }}"


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "gpt-4o", "qwen35", "gpt-2"])
def test_split_rules_are_recognised(tmp_path, pre):
    save("qwen3_moe", tmp_path / "model")
    tokenizer(pre).save_pretrained(tmp_path / "model")
    convert_gguf(tmp_path / "model", tmp_path / "out.gguf")
    assert values(tmp_path / "out.gguf")[2]["tokenizer.ggml.pre"] == pre


def test_unknown_split_rule(tmp_path):
    save("qwen3_moe", tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\w+"}
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="give --gguf-pre NAME"):
        convert_gguf(tmp_path / "model", tmp_path / "out.gguf")
    convert_gguf(tmp_path / "model", tmp_path / "out.gguf", pre="gpt-2")
    assert values(tmp_path / "out.gguf")[2]["tokenizer.ggml.pre"] == "gpt-2"


def test_a_tokenizer_that_adds_tokens(tmp_path):
    save("qwen3_moe", tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    end = content["added_tokens"][0]["id"]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "<|end|>", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [end], "tokens": ["<|end|>"]}},
    }
    file.write_text(json.dumps(content))
    assert Tokenizer.from_file(str(file)).encode("a").ids[-1] == end
    convert_gguf(tmp_path / "model", tmp_path / "out.gguf")
    keys = values(tmp_path / "out.gguf")[2]
    assert keys["tokenizer.ggml.add_eos_token"] is True
    assert keys["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("jamba", {}, "GGUF of 'jamba' is not supported; known are deepseek_v2, "),
        ("qwen3_moe", {}, r"experts are in layers \[1, 2\]"),
        ("qwen3_moe", {"mlp_only_layers": [], "norm_topk_prob": False}, "normalised weights"),
        ("mixtral", {"sliding_window": 16}, "sliding window"),
        ("mixtral", {"sliding_window": None, "hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ("deepseek_v2", {}, "ranks groups by their best expert"),
        ("deepseek_v3", {"q_lora_rank": None}, "q_lora_rank is None in a model of 3 layers"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave is False"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 3}, "every other layer"),
    ],
)
def test_what_llama_cpp_does_not_compute(tmp_path, family, fields, message):
    config = TINY[family]()
    fields = {**config.to_dict(), **fields}
    config = type(config).from_dict(copy.deepcopy(fields))
    build_tiny(family, config=config).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        convert_gguf(tmp_path / "model", tmp_path / "out.gguf")
    assert os.listdir(tmp_path) == ["model"]


def test_numbers_beyond_f16(tmp_path):
    model = save("qwen3_moe", tmp_path / "model")
    with torch.no_grad():
        model.lm_head.weight[3, 4] = 1e5
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"output.weight holds 1e\+05.*--gguf-type bf16"):
        convert_gguf(tmp_path / "model", tmp_path / "out.gguf")
    assert os.listdir(tmp_path) == ["model"]
    convert_gguf(tmp_path / "model", tmp_path / "out.gguf", gguf_type="bf16")


def test_requests(tmp_path, monkeypatch):
    save("qwen3_moe", tmp_path / "model")
    source, out = tmp_path / "model", tmp_path / "out.gguf"
    with pytest.raises(UserError, match="'q4_k' is unknown; there are f32, f16"):
        convert_gguf(source, out, gguf_type="q4_k")
    with pytest.raises(UserError, match="is a directory"):
        convert_gguf(source, tmp_path)
    out.write_text("a note")
    with pytest.raises(UserError, match="--overwrite"):
        convert_gguf(source, out)
    with pytest.raises(UserError, match="is no GGUF file"):
        convert_gguf(source, out, overwrite=True)
    out.unlink()
    convert_gguf(source, out)
    before = out.stat().st_size
    convert_gguf(source, out, gguf_type="q8_0", overwrite=True)
    assert out.stat().st_size < before
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"moekit\[gguf\]"):
        convert_gguf(source, tmp_path / "other.gguf")


def test_interruption_leaves_nothing(tmp_path):
    save("qwen3_moe", tmp_path / "model")
    seen = []

    def stop(done, total):
        seen.append(os.path.exists(tmp_path / "out.gguf.partial"))
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_gguf(tmp_path / "model", tmp_path / "out.gguf", progress=stop)
    assert all(seen)
    assert os.listdir(tmp_path) == ["model"]


def test_published_gpt_oss_is_written_with_a_note(tmp_path):
    config = TINY["gpt_oss"]()
    config.rope_parameters = {**YARN, "truncate": False}
    build_tiny("gpt_oss", config=config).save_pretrained(tmp_path / "model")
    notes = []
    convert_gguf(tmp_path / "model", tmp_path / "out.gguf", note=notes.append)
    assert any("rounds YaRN's bounds" in line for line in notes)
    config.rope_parameters["truncate"] = True
    build_tiny("gpt_oss", config=config).save_pretrained(tmp_path / "rounded")
    other = []
    convert_gguf(tmp_path / "rounded", tmp_path / "rounded.gguf", note=other.append)
    assert not any("YaRN" in line for line in other)
    assert values(tmp_path / "out.gguf")[2] == {
        **values(tmp_path / "rounded.gguf")[2],
        "general.name": "model",
    }
