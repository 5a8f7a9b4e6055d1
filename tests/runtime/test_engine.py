"""Engine: transformers' own tokens, the same one by one as in a batch."""

import pytest
import torch

import moekit
from moekit.core.errors import UserError
from tests.models import CONTEXT, write_tiny_model

PROMPTS = [[5, 9, 2], [7], [11, 3, 3, 8, 1, 250]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("engine") / "tiny")


@pytest.fixture(scope="module")
def engine(tiny):
    with moekit.open_engine(tiny) as engine:
        yield engine


def reference(path, prompt, new, **options):
    model = moekit.load(path).model
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=new, **{"do_sample": False, **options})
    return out[0].tolist()


def test_greedy_is_that_of_transformers(tiny, engine):
    assert engine.generate(PROMPTS, 7) == [reference(tiny, prompt, 7) for prompt in PROMPTS]


def test_a_tensor_comes_back_as_one(engine):
    ids = torch.tensor([[0, 0, 5, 9, 2], [4, 7, 7, 1, 6]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    out = engine.generate(ids, 4, attention_mask=mask)
    assert torch.equal(out[:, :5], ids)
    rows = engine.generate([[5, 9, 2], [4, 7, 7, 1, 6]], 4)
    assert out[:, 5:].tolist() == [row[-4:] for row in rows]


def test_stream_gives_what_generate_appends(engine):
    options = {"do_sample": True, "temperature": 0.8, "top_k": 40, "seed": 3}
    for prompt in PROMPTS:
        (row,) = engine.generate([prompt], 9, **options)
        assert [*prompt, *engine.stream(prompt, 9, **options)] == row


def test_draws_depend_on_neither_batch_nor_streams(tiny, engine):
    options = {"do_sample": True, "seed": 5, "min_p": 0.01, "repetition_penalty": 1.2}
    together = engine.generate(PROMPTS, 8, **options)
    with moekit.open_engine(tiny, streams=1) as single:
        assert single.generate(PROMPTS, 8, **options) == together
    assert engine.generate(PROMPTS, 8, **{**options, "seed": 6}) != together


def test_ends_at_an_end_token(engine):
    (row,) = engine.generate([PROMPTS[0]], 8)
    new = row[3:]
    end = new[2]
    (short,) = engine.generate([PROMPTS[0]], 8, eos_token_id=end)
    assert short[3:] == new[: new.index(end) + 1]
    padded = engine.generate(torch.tensor([PROMPTS[0], [1, 2, 3]]), 8, eos_token_id=[end, 999])
    assert padded.shape[0] == 2


def test_chunks_change_no_token(tiny, engine):
    prompt = torch.randint(0, 320, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    before = engine.generate([prompt], 6)
    with moekit.open_engine(tiny) as other:
        other.runner.chunk = 7
        assert other.generate([prompt], 6) == before


def test_truncated_sequence_goes_on_as_if_nothing_had_been(engine):
    runner = engine.runner
    assert runner.can_truncate
    seq = runner.new_sequence(CONTEXT)
    whole = runner.forward([seq], [[5, 9, 2, 7]], all_positions=True)[0]
    runner.forward([seq], [[8, 8]])
    seq.truncate(3)
    assert seq.length == 3
    again = runner.forward([seq], [[7]])
    torch.testing.assert_close(again[0], whole[3], rtol=1e-4, atol=1e-4)  # other GEMM shapes
    runner.drop(seq)


def test_stats_count_tokens(tiny):
    with moekit.open_engine(tiny) as engine:
        assert engine.stats.ms_per_token == 0
        engine.generate(PROMPTS, 5)
        stats = engine.stats
        assert (stats.prefill_tokens, stats.decode_tokens) == (10, 12)
        assert stats.ms_per_token > 0
        assert stats.peak_bytes > 10**8


def test_interrupt_drops_what_was_begun(engine, monkeypatch):
    expected = engine.generate(PROMPTS, 6)
    forward, dropped = engine.runner.forward, []
    calls = iter([False] * 5 + [True])

    def interrupted(*args):
        if next(calls, False):
            raise KeyboardInterrupt
        return forward(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "forward", interrupted)
        patch.setattr(engine.runner, "drop", dropped.append)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPTS, 6)
    assert len(dropped) == len(PROMPTS)
    assert engine.generate(PROMPTS, 6) == expected


def test_stream_that_is_not_read_to_its_end_is_dropped(engine, monkeypatch):
    dropped = []
    monkeypatch.setattr(engine.runner, "drop", dropped.append)
    stream = engine.stream(PROMPTS[0], 20)
    next(stream)
    stream.close()
    assert len(dropped) == 1


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[]], {}, "empty"),
        ([[5, 320]], {}, "token 320"),
        ([[1] * 60], {"max_new_tokens": 5}, "60 tokens"),
        ([[1] * 64], {}, "context is 64"),
        ([[1]], {"max_new_tokens": 0}, "1 or more"),
        ([[1]], {"top_q": 3}, "top_q"),
        ([[1]], {"do_sample": True, "temperature": -1}, "temperature"),
    ],
)
def test_refusals(engine, prompts, options, words):
    with pytest.raises(UserError, match=words):
        engine.generate(prompts, **options)
    with pytest.raises(UserError, match=words):
        engine.stream(prompts[0], **options)  # before the first token is asked for


def test_one_sequence_is_a_list_of_one(engine):
    with pytest.raises(UserError, match="one list of token ids a sequence"):
        engine.generate(PROMPTS[0])


def test_encoder_decoder_is_refused(tmp_path):
    from tests.families.tiny import build_tiny

    build_tiny("switch_transformers").save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="has an encoder"):
        moekit.open_engine(tmp_path / "m")
