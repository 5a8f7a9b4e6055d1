"""`moekit compress quantize`."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from moekit.compress import rewrite_of
from moekit.core.convert import convert
from moekit.core.plan import ExpertPlan
from moekit.runtime.unpack import load_packed
from tests.models import tiny_config, tiny_tokenizer

TEXT = "the router chooses two experts for every token. der Router wählt zwei Experten. " * 12


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """A tiny model whose experts have widths of whole groups."""
    from transformers import Qwen3MoeForCausalLM

    path = tmp_path_factory.mktemp("quantize") / "wide"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8}
        config = tiny_config(**sizes, norm_topk_prob=True)
        Qwen3MoeForCausalLM(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "en.txt"
    path.write_text(TEXT)
    return path


def logits_of(model):
    with torch.no_grad():
        return model(torch.arange(20).view(1, -1)).logits


METHODS = [
    "gptq:reach=0.3",
    "awq:solver=gptq",
    *(pytest.param(m, marks=pytest.mark.slow) for m in ("rtn", "autoround:steps=5", "eaquant")),
]


@pytest.mark.parametrize("method", METHODS)
def test_packed_codes_decode_to_what_other_formats_hold(moekit, wide, text, tmp_path, method):
    found = {}
    for to in ("packed", "fused"):
        out = tmp_path / to
        done = moekit(
            *("compress", "quantize", wide, out, "--to", to, "--method", method),
            *("--codec", "int3-zp", "--data", text, "--seq-len", 32, "--json"),
        )
        assert done.code == 0, done
        packed = to == "packed"
        model = load_packed(out, "float32").model if packed else None
        found[to] = model or AutoModelForCausalLM.from_pretrained(out)
    for (name, one), two in zip(
        found["packed"].named_parameters(), found["fused"].parameters(), strict=True
    ):
        assert torch.equal(one, two), name
    plain = AutoModelForCausalLM.from_pretrained(wide)
    assert not torch.equal(logits_of(found["fused"]), logits_of(plain))
    record = json.loads((tmp_path / "packed" / "record.json").read_text())
    assert record["command"] == "compress quantize"
    assert record["options"]["method"] == method
    assert "int3-zp" in (tmp_path / "packed" / "README.md").read_text()


def test_a_mix_of_widths_packs_each_expert_in_its_own(moekit, wide, text, tmp_path):
    out = tmp_path / "out"
    done = moekit(
        *("compress", "quantize", wide, out, "--bits-avg", 2, "--data", text, "--seq-len", 32),
        *("--protect", "1:5", "--json"),
    )
    assert done.code == 0, done
    header = json.loads((out / "packed.json").read_text())
    names = [header["layers"][1]["codecs"][i]["name"] for i in
             header["layers"][1]["codec_of_expert"]]  # fmt: skip
    assert names[5] == "bf16"
    assert {"int3-zp", "int2-zp"} <= set(names) <= {"int3-zp", "int2-zp", "binary", "bf16"}
    row = done.json["numbers"]["layers"][1]
    assert row["experts_at"]["16"] == 1
    assert load_packed(out, "float32").model.config.num_experts == 8


def test_widths_of_a_mix_are_chosen(moekit, wide, text, tmp_path):
    out = tmp_path / "out"
    done = moekit(
        *("compress", "quantize", wide, out, "--bits-avg", 3.5, "--widths", "3,4"),
        *("--data", text, "--seq-len", 32, "--json"),
    )
    assert done.code == 0, done
    for row in done.json["numbers"]["layers"]:
        assert row["experts_at"] == {"3": 4, "4": 4}
    header = json.loads((out / "packed.json").read_text())
    assert {codec["name"] for codec in header["layers"][0]["codecs"]} == {"int3-zp", "int4-zp"}


def test_a_plan_alone_is_applied_later(moekit, wide, text, tmp_path):
    plan = tmp_path / "plan.json"
    shared = ("--method", "awq:solver=gptq", "--data", text, "--seq-len", 32)
    done = moekit(
        *("compress", "quantize", wide, "--plan-only", plan, *shared),
        *("--save-stats", tmp_path / "stats"),
    )
    assert done.code == 0, done
    loaded = ExpertPlan.load(plan)
    assert loaded.fit.method == "awq"
    convert(wide, tmp_path / "later", plan=loaded, rewrite=rewrite_of(loaded, wide))
    done = moekit("compress", "quantize", wide, tmp_path / "now", "--to", "fused", *shared)
    assert done.code == 0, done
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("later", "now"))
    assert torch.equal(logits_of(one), logits_of(two))


def test_experts_with_few_tokens_are_counted_and_told(moekit, wide, text, tmp_path):
    base = ("compress", "quantize", wide, tmp_path / "out", "--data", text, "--seq-len", 32)
    done = moekit(*base, "--method", "gptq:min_tokens=100000")
    assert done.code == 0, done
    assert "gptq on the inputs of all experts" in done.out
    assert "and 8 more" in done.out
    done = moekit(*base, "--overwrite", "--quota", 100000, "--json")
    assert done.code == 0, done
    assert done.json["numbers"]["below quota"] == {"0": list(range(8)), "1": list(range(8))}


def test_a_dry_run_writes_nothing_and_reads_no_text(moekit, wide, tmp_path):
    for extra in ((), ("--bits-avg", 2)):
        done = moekit(
            *("compress", "quantize", wide, tmp_path / "out", "--data", tmp_path / "none.txt"),
            *("--dry-run", "--json", *extra),
        )
        assert done.code == 0, done
        assert done.json["dry_run"] is True
        assert done.json["bytes"] > 0
    assert not (tmp_path / "out").exists()


def test_formats_of_others(moekit, refused, wide, text, tmp_path):
    base = ("compress", "quantize", wide)
    fitted = ("--data", text, "--seq-len", 32)
    done = moekit(*base, tmp_path / "m.gguf", "--to", "gguf", "--gguf-type", "f32", *fitted)
    assert done.code == 0, done
    assert (tmp_path / "m.gguf").stat().st_size > 0
    done = moekit(*base, tmp_path / "ct", "--to", "compressed-tensors", *fitted)
    assert done.code == 0, done
    config = json.loads((tmp_path / "ct" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    # Refused before the text, which does not exist, is read.
    message = refused(
        *(*base, tmp_path / "zp", "--to", "compressed-tensors", "--codec", "int4-zp"),
        *("--data", tmp_path / "none.txt"),
    )
    assert "int4-zp" in message
    assert not (tmp_path / "zp").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "quip"), "'quip' quantizes nothing; there are rtn, gptq, autoround, awq"),
        (("--method", "gptq:dump=1"), "has no option 'dump'"),
        (("--method", "gptq:codec=int4"), "give --codec in place of"),
        (("--codec", "int44"), "no codec method is named 'int44'"),
        (("--group-size", 128), "64 columns"),
        (("--bits-avg", 1, "--data", "x"), "gives 8 bits to the 8 experts"),
        (
            ("--bits-avg", 3.5, "--data", "x"),
            "3.5 is no average of 1, 2, 3 bits; give other --widths",
        ),
        (("--bits-avg", 3, "--widths", "3,3"), "different ones, not 3, 3"),
        (("--bits-avg", 3, "--widths", "3;4"), "3;4 are not numbers of bits"),
        (("--bits-avg", 5, "--widths", "4,5"), "no codec 'int5-zp'"),
        (("--widths", "3,4", "--data", "x"), "give both"),
        (("--allocate", "mc-moe"), "go together"),
        ((), "give either --stats"),
        (("--method", "rtn", "--quota", 5), "--quota is for the text of --data"),
        (("--protect", "0:9", "--method", "rtn"), "layer 0 has no expert 9"),
    ],
)
def test_refusals(refused, wide, tmp_path, arguments, message):
    assert message in refused("compress", "quantize", wide, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_ternary_experts_are_coded_and_come_back_byte_for_byte(moekit, refused, wide, tmp_path):
    packed, coded, back = (tmp_path / name for name in ("packed", "coded", "back"))
    done = moekit(
        *("compress", "quantize", wide, packed, "--method", "rtn", "--codec", "ternary-rows"),
        *("--protect", "0:3"),
    )
    assert done.code == 0, done
    done = moekit("compress", "code", packed, coded, "--json")
    assert done.code == 0, done
    assert done.json["coded_bytes"] < done.json["packed_bytes"]
    done = moekit("compress", "code", coded, back, "--expand")
    assert done.code == 0, done
    files = {path.name for path in packed.iterdir() if path.is_file()}
    assert {path.name for path in back.iterdir() if path.is_file()} == files
    for name in files:
        assert (back / name).read_bytes() == (packed / name).read_bytes(), name
    assert "no coded.json" in refused("compress", "code", packed, tmp_path / "x", "--expand")
    done = moekit("compress", "quantize", wide, tmp_path / "int4", "--method", "rtn")
    message = refused("compress", "code", tmp_path / "int4", tmp_path / "x")
    assert "no experts of the codec ternary-rows" in message
