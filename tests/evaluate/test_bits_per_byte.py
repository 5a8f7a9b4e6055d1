import math

import pytest
import torch
from torch.nn import functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moekit.core.errors import UserError
from moekit.evaluate.bits_per_byte import bits_per_byte
from moekit.evaluate.text import Sample

VOCAB = 258


class ByteTokenizer:
    """One token a byte; 256 is EOS and 257 unknown."""

    bos_token_id = None
    eos_token_id: int | None = 256
    unk_token_id = 257

    def __call__(self, text, add_special_tokens, verbose):
        assert add_special_tokens is False
        return {"input_ids": list(text.encode())}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.4,
    )
    return Qwen3MoeForCausalLM(config).eval()


def naive_nats(model, ids, context, stride):
    """Each target on its own: found in the first window that reaches it, one forward a target."""
    total = 0.0
    for target in range(1, len(ids)):
        begin = 0
        while begin + context < target:
            begin += stride
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[begin:target]])).logits[0, -1]
        total += F.cross_entropy(logits.double(), torch.tensor(ids[target])).item()
    return total


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 5), (16, 1), (64, 64)])
def test_equals_one_forward_per_token(model, context, stride):
    text = "Straße: 17 > 12, naïve?\n" * 2
    result = bits_per_byte(
        model, ByteTokenizer(), [Sample(text, "d")], context=context, stride=stride, batch_size=3
    )
    expected = naive_nats(model, [256, *text.encode()], context, stride)
    loss = result.per_domain["d"]
    assert loss.tokens == loss.bytes == len(text.encode())
    # fp32 forward passes of different shapes agree to about 1e-6 of each token's loss.
    assert loss.nats == pytest.approx(expected, rel=1e-5)
    assert loss.bpb == pytest.approx(expected / math.log(2) / len(text.encode()), rel=1e-5)
    assert loss.perplexity == pytest.approx(math.exp(expected / loss.tokens), rel=1e-4)


def test_batch_size_and_order_only_round(model):
    samples = [Sample("x" * n + "é", f"d{n % 2}") for n in (3, 40, 90, 1, 17)]
    options = {"context": 32, "stride": 8}
    one = bits_per_byte(model, ByteTokenizer(), samples, batch_size=1, **options)
    many = bits_per_byte(model, ByteTokenizer(), samples, batch_size=7, **options)
    swapped = bits_per_byte(model, ByteTokenizer(), samples[::-1], batch_size=2, **options)
    for other in (many, swapped):
        for domain, loss in one.per_domain.items():
            assert other.per_domain[domain].nats == pytest.approx(loss.nats, rel=1e-5)
    assert many == bits_per_byte(model, ByteTokenizer(), samples, batch_size=7, **options)


def test_mean_is_over_domains_and_total_over_bytes(model):
    samples = [Sample("aaaa", "short"), Sample("some longer text, twice. " * 3, "long")]
    result = bits_per_byte(model, ByteTokenizer(), samples, context=32, stride=16)
    short, long = result.per_domain["short"], result.per_domain["long"]
    assert result.mean == pytest.approx((short.bpb + long.bpb) / 2)
    assert result.total.bytes == 4 + 75
    assert result.total.bpb == pytest.approx((4 * short.bpb + 75 * long.bpb) / 79)
    assert result.mean != pytest.approx(result.total.bpb, rel=1e-3)
    assert result.to_dict()["per_domain"]["short"]["bytes"] == 4


def test_without_prefix_the_first_token_costs_a_uniform_guess(model):
    tokenizer = ByteTokenizer()
    tokenizer.eos_token_id = None
    loss = bits_per_byte(model, tokenizer, [Sample("q", "d")], context=8, stride=8).total
    assert loss.nats == pytest.approx(math.log(VOCAB))
    assert loss.tokens == 1


def test_limit_cuts_each_domain_at_a_character(model):
    samples = [Sample("ab", "a"), Sample("cdéf", "a"), Sample("xyz", "b")]
    result = bits_per_byte(
        model, ByteTokenizer(), samples, context=8, stride=8, max_bytes_per_domain=5
    )
    assert {name: loss.bytes for name, loss in result.per_domain.items()} == {"a": 4, "b": 3}


def test_leaves_training_mode_and_gradients_alone(model):
    model.train()
    try:
        bits_per_byte(model, ByteTokenizer(), [Sample("abc", "d")], context=8, stride=8)
        assert model.training
        out = model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]]))
        out.loss.backward()
    finally:
        model.zero_grad()
        model.eval()


def test_autocast_changes_only_rounding(model):
    samples = [Sample("The quick brown fox.", "d")]
    exact = bits_per_byte(model, ByteTokenizer(), samples, context=16, stride=8)
    rounded = bits_per_byte(
        model, ByteTokenizer(), samples, context=16, stride=8, autocast=torch.bfloat16
    )
    assert rounded.mean != exact.mean
    # bf16 keeps 8 bits of mantissa; a random model's logits move by a few percent at most.
    assert rounded.mean == pytest.approx(exact.mean, rel=0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": 65, "stride": 8}, "65.*64"),
        ({"context": 8, "stride": 9}, "9.*8"),
        ({"context": 8, "stride": 0}, "stride 0"),
        ({"context": 8, "stride": 8, "batch_size": 0}, "batch size 0"),
    ],
)
def test_impossible_windows_are_refused(model, options, words):
    with pytest.raises(UserError, match=words):
        bits_per_byte(model, ByteTokenizer(), [Sample("abc", "d")], **options)


def test_no_text_is_refused(model):
    with pytest.raises(UserError, match="no text"):
        bits_per_byte(model, ByteTokenizer(), [], context=8, stride=8)
