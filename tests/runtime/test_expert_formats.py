"""Experts of a packed model, run by the kernels straight from their records."""

import pytest
import torch

from moekit.core.pack import pack
from moekit.core.packed import CodecChoice
from moekit.core.plan import Action, ExpertPlan
from moekit.ops import native
from moekit.ops.codecs import Codec, make_codec
from moekit.runtime.expert_formats import formats_of_layer
from moekit.runtime.pages import page_aligned
from moekit.runtime.store import ExpertStore
from tests.core.test_pack import saved, wide


@pytest.fixture(scope="module")
def pool():
    library = native.library()
    if library is None:
        pytest.skip("no compiler")
    pool = native.Pool(library, 2)
    yield pool
    pool.close()


def record(store, layer, expert):
    buffer = page_aligned(store.nbytes(layer, expert))
    return buffer, store.read_into(buffer, layer, expert)


def check(pool, store, activation, formula, **options):
    for position, layer in enumerate(store.layers):
        formats = formats_of_layer(layer, activation, **options)
        assert formats is not None
        assert len(formats) == layer.num_experts
        for expert in range(layer.num_experts):
            memory, parts = record(store, position, expert)
            weights = {n: parts.codec.decode(m) for n, m in parts.matrices.items()}
            hidden = torch.randn(3, weights["down"].shape[0])
            out, tokens = torch.empty_like(hidden), torch.arange(3, dtype=torch.int32)
            pool.ffn([(formats[expert], memory.data_ptr(), 0, 3)], tokens, hidden, out)
            expected = formula(hidden, weights, parts.vectors)
            # Activations are rounded to bfloat16, twice: 2**-8 of values that are summed.
            assert float((out - expected).norm() / expected.norm()) < 2**-7


def swiglu(x, weights, biases):
    gate, up = x @ weights["gate"].T, x @ weights["up"].T
    return (torch.nn.functional.silu(gate) * up) @ weights["down"].T


def clamped(x, weights, biases):
    biases = {name: bias.float() for name, bias in biases.items()}
    gate = (x @ weights["gate"].T + biases["gate_bias"]).clamp(max=7.0)
    up = (x @ weights["up"].T + biases["up_bias"]).clamp(-7.0, 7.0)
    middle = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return middle @ weights["down"].T + biases["down_bias"]


@pytest.mark.parametrize("codec", ["int4", "int8-zp", "nested4", "ternary", "bf16"])
def test_swiglu(pool, tmp_path, codec):
    pack(saved(wide(), tmp_path / "m"), tmp_path / "packed", codec=codec)
    with ExpertStore.open(tmp_path / "packed") as store:
        check(pool, store, "silu", swiglu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases(pool, tmp_path, dtype):
    pack(saved(wide("gpt_oss", dtype), tmp_path / "m"), tmp_path / "packed", codec="int8")
    with ExpertStore.open(tmp_path / "packed") as store:
        check(pool, store, "clamped_swiglu", clamped, alpha=1.702, limit=7.0)


def test_experts_of_one_codec_share_a_format(pool, tmp_path):
    plan = ExpertPlan({0: {0: Action(bits=8), 2: Action(bits=16)}})
    pack(saved(wide(), tmp_path / "m"), tmp_path / "packed", plan)
    with ExpertStore.open(tmp_path / "packed") as store:
        formats = formats_of_layer(store.layers[0], "silu")
        assert len({id(f) for f in formats}) == 3
        check(pool, store, "silu", swiglu)


def test_codecs_without_kernels(tmp_path, monkeypatch):
    """A codec of a third party: the kernels do not know its class."""

    class Foreign(Codec):
        def __getattr__(self, name):
            return getattr(make_codec("int4"), name)

        layout = encode_rows = decode = error_bound = None

    pack(saved(wide(), tmp_path / "m"), tmp_path / "packed", codec="int4")
    with ExpertStore.open(tmp_path / "packed") as store:
        monkeypatch.setattr(CodecChoice, "make", lambda choice: Foreign())
        assert formats_of_layer(store.layers[0], "silu") is None
