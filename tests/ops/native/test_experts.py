"""Whole experts against the formula in torch, and the weighted sum of their outputs.

E experts, D width, F expert width, T tokens, K choices, P pairs.
"""

import itertools

import pytest
import torch
from torch.nn import functional as F

from moekit.ops import native
from moekit.ops.codecs import make_codec
from moekit.ops.codecs.tiles import tile
from moekit.ops.native.formats import expert_format, matrix_format
from tests.ops.native.activations import seen

WIDTH, INNER, EXPERTS = 128, 96, 5
ALPHA, LIMIT = 1.702, 7.0
FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "identity": lambda x: x,
}


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


class Expert:
    """A random expert, as bytes at an address and as float32 matrices."""

    def __init__(self, seed, codec="int4", activation="silu", gate=True, bias=None):
        self.activation = activation
        self.codec = make_codec(codec)
        shapes = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
        if not gate:
            del shapes["gate"]
        self.matrices, self.biases, formats, places, pieces = {}, {}, {}, {}, []
        size = 0

        def put(array):
            nonlocal size
            raw = array.contiguous().reshape(-1).view(torch.uint8)
            pieces.append(F.pad(raw, (0, -len(raw) % 64)))
            size, start = size + len(pieces[-1]), size
            return start

        for i, (name, shape) in enumerate(shapes.items()):
            encoded = self.codec.encode(random(*shape, seed=10 * seed + i, scale=0.15))
            self.matrices[name] = self.codec.decode(encoded)
            offsets = [
                {key: put(tile(part) if self.codec.tiled else part) for key, part in plane.items()}
                for plane in encoded.planes
            ]
            formats[name] = matrix_format(self.codec, shape, offsets)
            if bias is not None:
                vector = random(shape[0], seed=10 * seed + i + 5).to(bias)
                self.biases[name], places[f"{name}_bias"] = vector.float(), put(vector)
        self.memory = torch.cat(pieces)
        self.format = expert_format(
            formats,
            activation,
            alpha=ALPHA,
            limit=LIMIT,
            biases=places,
            bias_dtype=bias or torch.float32,
        )

    def job(self, first, count):
        return self.format, self.memory.data_ptr(), first, count

    def __call__(self, pool, x):
        """The formula; activations are rounded where the kernels round them."""
        x = seen(pool, self.codec, x)
        up, gate = self.linear("up", x), None
        if "gate" in self.matrices:
            gate = self.linear("gate", x)
        if self.activation == "clamped_swiglu":
            gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
            middle = (up + 1) * gate * torch.sigmoid(ALPHA * gate)
        else:
            function = FUNCTIONS[self.activation]
            middle = function(up) if gate is None else function(gate) * up
        return self.linear("down", seen(pool, self.codec, middle))

    def linear(self, name, x):
        return F.linear(x, self.matrices[name], self.biases.get(name))

    @property
    def codec_is_exact(self):
        return getattr(self.codec, "dtype", None) in (torch.float32, torch.float16)


def run(pool, experts, counts, hidden, tokens):
    """out [P, D] of the pairs in order: counts[0] of them through experts[0], and so on."""
    starts = [0, *itertools.accumulate(counts)]
    jobs = [e.job(first, n) for e, first, n in zip(experts, starts, counts, strict=False)]
    out = torch.full((len(tokens), WIDTH), torch.nan)
    pool.ffn(jobs, tokens, hidden, out)
    return out


def check(pool, experts, seed=0):
    counts = [1, 4, 15, 0, 2][: len(experts)]
    hidden = random(6, WIDTH, seed=seed)
    tokens = torch.arange(sum(counts), dtype=torch.int32) % 6
    out = run(pool, experts, counts, hidden, tokens)
    first = 0
    for expert, count in zip(experts, counts, strict=True):
        expected = expert(pool, hidden[tokens[first : first + count].long()])
        # A middle value on the edge between two bfloat16 numbers may fall to either side: 2**-8 of
        # it, times a weight of down. Few of the F values are, so a tenth of the worst case.
        edge = 2**-8 * 0.1 * float(expert.matrices["down"].abs().max()) * INNER
        slack = 1e-4 if expert.codec_is_exact else edge
        assert torch.allclose(out[first : first + count], expected, rtol=1e-4, atol=slack)
        first += count


@pytest.mark.parametrize("activation", native.ACTIVATIONS)
def test_activations(pool, activation):
    check(pool, [Expert(e, "fp32", activation) for e in range(EXPERTS)])
    check(pool, [Expert(e, "int8", activation, bias=torch.bfloat16) for e in range(EXPERTS)])
    if activation != "clamped_swiglu":
        check(pool, [Expert(e, "fp32", activation, gate=False) for e in range(EXPERTS)])


@pytest.mark.parametrize(
    "codec", ["fp32", "bf16", "fp16", "int8", "int4", "int3-zp", "nested4", "ternary"]
)
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16, torch.float16])
def test_codecs_and_biases(pool, codec, bias):
    check(pool, [Expert(e, codec, bias=bias) for e in range(EXPERTS)])


def test_experts_of_different_codecs(pool):
    codecs = ("int4", "int2-zp", "bf16", "ternary-zp", "nested3")
    check(pool, [Expert(e, codec) for e, codec in enumerate(codecs)])


def test_a_gate_must_exist_for_clamped_swiglu():
    with pytest.raises(ValueError, match="needs a gate"):
        Expert(0, "fp32", "clamped_swiglu", gate=False)


@pytest.mark.parametrize("codec", ["int4", "nested4", "bf16", "fp32"])
def test_grouping_changes_no_bit(kernels, codec):
    """All experts in one call, one call each, single pairs, and any number of threads."""
    experts = [Expert(e, codec) for e in range(EXPERTS)]
    counts, hidden = [3, 14, 0, 1, 6], random(6, WIDTH)
    tokens = torch.arange(sum(counts), dtype=torch.int32) % 6
    starts = [0, *itertools.accumulate(counts)]
    results = []
    for threads in (1, 2, 4):
        pool = native.Pool(kernels, threads)
        results.append(run(pool, experts, counts, hidden, tokens))
        apart, single = torch.zeros_like(results[0]), torch.zeros_like(results[0])
        for expert, first, count in reversed(list(zip(experts, starts, counts, strict=False))):
            pool.ffn([expert.job(first, count)], tokens, hidden, apart)
            for pair in range(first, first + count):
                pool.ffn([expert.job(pair, 1)], tokens, hidden, single)
        results += [apart, single]
        pool.close()
    assert all(torch.equal(result, results[0]) for result in results)


def test_decoding_shares_the_activations_of_a_token(pool):
    experts = [Expert(e) for e in range(4)]
    hidden = random(2, WIDTH)
    tokens = torch.tensor([1, 1, 0, 1], dtype=torch.int32)
    out = run(pool, experts, [1, 1, 1, 1], hidden, tokens)
    for pair, expert in enumerate(experts):
        row = torch.empty(1, WIDTH)
        pool.ffn(
            [expert.job(0, 1)], torch.zeros(1, dtype=torch.int32), hidden[tokens[pair]][None], row
        )
        assert torch.equal(out[pair], row[0])


@pytest.mark.parametrize("tokens", [1, 9, 700])
def test_combine(kernels, tokens):
    choices, pairs = 3, 40
    out_pairs = random(pairs, WIDTH)
    pair_of = torch.randint(-1, pairs, (tokens, choices), dtype=torch.int32)
    weights = torch.rand(tokens, choices)
    expected = torch.zeros(tokens, WIDTH)
    for k in range(choices):
        kept = pair_of[:, k] >= 0
        chosen = out_pairs[pair_of[:, k].clamp(min=0).long()]
        expected += weights[:, k, None] * chosen * kept[:, None]
    results = []
    for threads in (1, 2, 4):
        pool = native.Pool(kernels, threads)
        out = torch.full((tokens, WIDTH), torch.nan)
        pool.combine(out_pairs, pair_of, weights, out)
        results.append(out.clone())
        pool.combine(out_pairs, pair_of, weights, out, accumulate=True)
        # One sum is fused with its product, the other is not.
        assert torch.allclose(out, 2 * expected, rtol=1e-5, atol=1e-5)
        pool.close()
    assert torch.allclose(results[0], expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(result, results[0]) for result in results)


def test_wrong_tensors_are_refused(pool):
    expert, hidden = Expert(0), random(1, WIDTH)
    with pytest.raises(ValueError, match=r"torch\.int32"):
        pool.ffn([expert.job(0, 1)], torch.zeros(1, dtype=torch.int64), hidden, hidden.clone())
    with pytest.raises(ValueError, match=r"torch\.float32"):
        pool.ffn([expert.job(0, 1)], torch.zeros(1, dtype=torch.int32), hidden, hidden.half())
