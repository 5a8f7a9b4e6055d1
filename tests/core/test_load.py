import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from moekit.core import load as loading
from moekit.core.errors import UserError
from moekit.core.load import load, load_model, load_tokenizer, resolve_model
from tests.models import write_tiny_model


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tiny(original, tmp_path):
    """A copy to damage."""
    return shutil.copytree(original, tmp_path / "tiny")


def edit_config(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(path, edit):
    weights = load_file(path / "model.safetensors")
    edit(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def test_loads_model_tokenizer_and_spec(original):
    loaded = load(original)
    assert (loaded.spec.num_experts, loaded.spec.top_k) == (4, 2)
    assert not loaded.model.training
    ids = loaded.tokenizer("zwei Experten", return_tensors="pt")
    assert loaded.model(**ids).logits.isfinite().all()


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_by_name_or_object(original, dtype):
    model, tokenizer = load_model(original, dtype)
    assert model.dtype == torch.bfloat16
    assert tokenizer.eos_token == "<|end|>"


def test_stored_dtype_is_kept(tiny):
    model, _ = load_model(tiny, "bfloat16")
    model.save_pretrained(tiny)
    assert load(tiny).model.dtype == torch.bfloat16


def test_a_model_without_tokenizer(tiny):
    for file in tiny.glob("tokenizer*"):
        file.unlink()
    assert load(tiny).tokenizer is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "nowhere: no such directory; .* babel"),
        ("./no/where", "no such directory"),
        ("a b/c", "no such directory"),
    ],
)
def test_a_wrong_path_is_refused(name, words):
    with pytest.raises(UserError, match=words):
        resolve_model(name)


def test_a_file_is_refused(tiny):
    with pytest.raises(UserError, match="is a file: give the directory"):
        resolve_model(tiny / "config.json")


def test_a_path_below_a_directory_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        resolve_model("runs/best")
    assert resolve_model("owner/name") == "owner/name"


def test_missing_babel_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "BABEL_PATH", tmp_path / "babel")
    with pytest.raises(UserError, match="babel is missing"):
        resolve_model("babel")


def test_the_hub_offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="owner/name is neither a local directory nor"):
        load("owner/name")


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        load(tmp_path)


def test_a_config_without_weights(tiny):
    (tiny / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load(tiny)


def test_pickled_weights_are_never_read(tiny):
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        load(tiny)


def test_a_truncated_shard(tiny):
    file = tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        load(tiny)


def test_a_broken_config(tiny):
    (tiny / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match="not valid JSON"):
        load(tiny)


def test_an_unknown_family(tiny):
    edit_config(tiny, model_type="qwen33_moe")
    with pytest.raises(UserError, match=r"qwen33_moe.*qwen3_moe"):
        load(tiny)


def test_a_dense_model(tmp_path):
    LlamaConfig(hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"llama.*no MoE layers"):
        load(tmp_path)


def test_a_missing_tensor_is_not_made_up(tiny):
    edit_weights(tiny, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(UserError, match=r"1 tensors .*model\.norm\.weight is missing"):
        load(tiny)


def test_a_missing_expert_is_not_made_up(tiny):
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    edit_weights(tiny, lambda weights: weights.pop(name))
    with pytest.raises(UserError, match=r"down_proj has shape \[3, 32, 16\].*\[4, 32, 16\]"):
        load(tiny)


def test_a_broken_tokenizer(tiny):
    (tiny / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tiny)
