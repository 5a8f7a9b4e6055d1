import random
import threading
import time

import pytest
import torch

from moekit.runtime.sampling import Sampling
from moekit.serve.job import Closing, NewToken, QueueFull
from moekit.serve.scheduler import PATIENCE, share

from .fake import VOCAB, FakeRunner, expected, job, logits_after, scheduling


def prompts(count: int, longest: int = 60) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]


@pytest.mark.parametrize("can_truncate", [True, False])
@pytest.mark.parametrize("can_chunk", [True, False])
def test_32_streams_at_once_each_get_their_own_text(can_truncate, can_chunk):
    runner = FakeRunner(can_truncate=can_truncate, can_chunk=can_chunk)
    wanted, jobs = [], []
    for number, prompt in enumerate(prompts(48)):
        sampling = Sampling(seed=number, temperature=number % 3, top_p=0.9)
        wanted.append(expected(prompt, 10 + number, sampling))
        jobs.append(job(prompt, 10 + number, sampling))
    with scheduling(runner, streams=32) as scheduler:
        for made, _ in jobs:
            scheduler.submit([made])
        assert [listener.wait() for _, listener in jobs] == ["length"] * 48
    assert [listener.tokens for _, listener in jobs] == wanted
    assert max(map(len, runner.steps)) == 32
    if not can_chunk:
        assert sorted(n for step in runner.steps for n in step if n > 1) == sorted(
            len(made.prompt) - made.reused_tokens
            for made, _ in jobs
            if len(made.prompt) - made.reused_tokens > 1
        )


def test_same_seed_same_text_whatever_else_runs():
    sampling = Sampling(seed=7)
    alone, wanted = job([1, 2, 3], 30, sampling)
    with scheduling(FakeRunner()) as scheduler:
        scheduler.submit([alone])
        wanted.wait()
    crowd = [job(prompt, 20) for prompt in prompts(20)]
    again, listener = job([1, 2, 3], 30, sampling)
    with scheduling(FakeRunner()) as scheduler:
        for made, _ in crowd[:10]:
            scheduler.submit([made])
        scheduler.submit([again])
        for made, _ in crowd[10:]:
            scheduler.submit([made])
        listener.wait()
    assert listener.tokens == wanted.tokens


def test_a_prompt_is_fed_in_chunks_while_others_decode():
    runner = FakeRunner(gated=True)
    short, decoding = job([1], 100)
    long, prefilling = job([2] * 200, 1)
    with scheduling(runner, chunk=16) as scheduler:
        scheduler.submit([short])
        runner.allow(1)
        assert isinstance(decoding.next(), NewToken)
        runner.arrived.acquire()
        scheduler.submit([long])
        runner.open_gate()
        assert prefilling.wait() == "length"
        assert decoding.wait() == "length"
    chunks = [step for step in runner.steps if len(step) == 2]
    assert sum(step[1] for step in chunks) == 200
    assert all(sum(step) <= 16 and step[0] == 1 for step in chunks)
    # While nobody decodes, a step is four times as large.
    lone = FakeRunner()
    with scheduling(lone, chunk=16) as scheduler:
        made, listener = job([2] * 200, 1)
        scheduler.submit([made])
        listener.wait()
    assert lone.steps == [[64], [64], [64], [8]]


def test_a_short_prompt_is_not_behind_a_long_one():
    runner = FakeRunner(gated=True)
    long, prefilling = job([2] * 200, 1)
    short, quick = job([3] * 10, 1)
    with scheduling(runner, chunk=16) as scheduler:
        scheduler.submit([long])
        runner.arrived.acquire()  # its first step has begun
        scheduler.submit([short])
        runner.allow(2)
        assert quick.wait() == "length"
        assert runner.steps == [[64], [54, 10]]
        runner.open_gate()
        prefilling.wait()


@pytest.mark.parametrize(
    ("lengths", "total", "given"),
    [
        ([1, 1, 1], 2, [1, 1, 1]),
        ([100], 16, [16]),
        ([5], 16, [5]),
        ([100, 100], 16, [11, 5]),
        ([100, 3], 16, [13, 3]),
        ([1, 100, 100, 1], 40, [1, 28, 10, 1]),
    ],
)
def test_share_of_a_step(lengths, total, given):
    assert share(lengths, total) == given


def test_share_wastes_nothing_and_starves_nobody():
    rng = random.Random(0)
    for _ in range(300):
        lengths = [rng.choice([1, 1, rng.randint(1, 300)]) for _ in range(rng.randint(1, 40))]
        total = rng.randint(1, 300)
        given = share(lengths, total)
        assert all(1 <= part <= length for part, length in zip(given, lengths, strict=True))
        assert sum(given) == max(len(lengths), min(total, sum(lengths)))


def test_queue_takes_all_jobs_of_a_request_or_none():
    runner = FakeRunner(gated=True)
    running = [job([1], 5) for _ in range(2)]
    with scheduling(runner, streams=2, queue=3) as scheduler:
        for made, _ in running:
            scheduler.submit([made])
        runner.arrived.acquire()
        waiting = [job([2], 5) for _ in range(2)]
        scheduler.submit([made for made, _ in waiting])
        with pytest.raises(QueueFull, match="2 sequences are waiting"):
            scheduler.submit([job([3], 5)[0] for _ in range(2)])
        last, listener = job([3], 5)
        scheduler.submit([last])
        with pytest.raises(QueueFull):
            scheduler.submit([job([3], 5)[0]])
        assert (scheduler.running, scheduler.queued) == (2, 3)
        runner.open_gate()
        assert {other.wait() for _, other in [*running, *waiting]} == {"length"}
        assert listener.wait() == "length"
        assert (scheduler.running, scheduler.queued) == (0, 0)


def test_a_large_request_does_not_keep_others_out():
    """One slot each goes to the requests that have the fewest running."""
    runner = FakeRunner(gated=True)
    order: list[str] = []
    blocker, _ = job([1], 1)
    many = [job([2], 1, group="many") for _ in range(3)]
    single, alone = job([3], 1, group="single")
    for name, (made, listener) in {
        "a": many[0],
        "b": many[1],
        "c": many[2],
        "single": (single, alone),
    }.items():
        made.on_event = lambda event, name=name, put=listener.events.put: (
            order.append(name) if isinstance(event, NewToken) else None,
            put(event),
        )
    with scheduling(runner, streams=2) as scheduler:
        scheduler.submit([blocker])
        runner.arrived.acquire()
        scheduler.submit([made for made, _ in many])
        scheduler.submit([single])
        runner.open_gate()
        for _, listener in [*many, (single, alone)]:
            listener.wait()
    assert order.index("single") <= 1


def test_cancelled_jobs_leave_their_slots_and_the_queue():
    runner = FakeRunner(gated=True)
    endless, listener = job([1], 200)
    waiting, unheard = job([2], 5)
    following, served = job([3], 5)
    with scheduling(runner, streams=1) as scheduler:
        scheduler.submit([endless])
        scheduler.submit([waiting])
        scheduler.submit([following])
        runner.allow(1)
        listener.next()
        scheduler.cancel([endless, waiting])
        runner.open_gate()
        assert served.wait() == "length"
        assert scheduler.statistics.sequences["cancelled"] == 1
    assert unheard.events.empty()
    assert len(runner.steps) <= 2 + 5  # what ran when it was cancelled, and the third job
    assert served.tokens == expected([3], 5, Sampling(seed=1))


@pytest.mark.parametrize("can_truncate", [True, False])
def test_prefix_is_reused_and_changes_nothing(can_truncate):
    runner = FakeRunner(can_truncate=can_truncate)
    first = [5] * 40
    sampling = Sampling(seed=3)
    with scheduling(runner, streams=2) as scheduler:

        def run(prompt):
            made, listener = job(prompt, 8, sampling)
            scheduler.submit([made])
            listener.wait()
            assert listener.tokens == expected(prompt, 8, sampling)
            return made.reused_tokens, listener.tokens

        reused, answer = run(first)
        assert reused == 0
        # The last token chosen was never fed.
        reused, _ = run([*first, *answer, 9, 9])
        assert reused == 47
        reused, _ = run([*first, 1, 2])
        assert reused == (40 if can_truncate else 0)
        # At least one token must be fed.
        reused, _ = run([*first, 1, 2])
        assert reused == (41 if can_truncate else 0)


def test_a_few_common_tokens_do_not_cost_another_conversation_its_prefix():
    runner = FakeRunner()
    talk = [7, *range(40)]
    with scheduling(runner, streams=2) as scheduler:
        for prompt in (talk, [7, 60, 61, 62, 63, 60, 61, 62]):
            made, listener = job(prompt, 2)
            scheduler.submit([made])
            listener.wait()
            assert made.reused_tokens == 0
        made, listener = job([*talk, 50], 2)
        scheduler.submit([made])
        listener.wait()
        assert made.reused_tokens >= len(talk)


def test_prefixes_can_be_left_alone():
    with scheduling(FakeRunner(), streams=1, reuse_prefixes=False) as scheduler:
        for _ in range(2):
            made, listener = job([1] * 20, 2)
            scheduler.submit([made])
            listener.wait()
            assert made.reused_tokens == 0


def test_end_token_ends():
    sampling = Sampling(seed=2)
    wanted = expected([4, 4], 30, sampling)
    end = wanted[5]
    with scheduling(FakeRunner()) as scheduler:
        made, listener = job([4, 4], 30, sampling, end_tokens=frozenset({end}))
        scheduler.submit([made])
        assert listener.wait() == "stop"
    assert listener.tokens == wanted[: wanted.index(end) + 1]


def test_logprobs_of_tokens_and_of_the_prompt():
    runner = FakeRunner()
    prompt = [random.Random(1).randrange(VOCAB) for _ in range(50)]
    with scheduling(runner) as scheduler:
        scheduler._score_chunk = 7
        made, listener = job(prompt, 6, top_logprobs=VOCAB, score_prompt=True)
        empty, ended = job(prompt, 0, top_logprobs=0, score_prompt=True)
        for one in (made, empty):
            scheduler.submit([one])
        assert listener.wait() == ended.wait() == "length"
    history = list(prompt)
    assert listener.tokens == expected(prompt, 6, Sampling(seed=1))
    for found in listener.logprobs:
        logs = logits_after(history).log_softmax(0)
        assert found.logprob == pytest.approx(float(logs[found.token]), abs=1e-5)
        assert torch.tensor([p for _, p in found.top]).exp().sum() == pytest.approx(1, abs=1e-5)
        history.append(found.token)
    assert [found.token for found in made.prompt_logprobs] == prompt[1:]
    for place, found in enumerate(made.prompt_logprobs):
        logs = logits_after(prompt[: place + 1]).log_softmax(0)
        assert found.logprob == pytest.approx(float(logs[prompt[place + 1]]), abs=1e-5)
    assert len(empty.prompt_logprobs) == 49
    assert ended.tokens == []


def test_an_error_ends_the_step_and_not_the_server(capfd):
    runner = FakeRunner()
    runner.fail_on = 13
    with scheduling(runner) as scheduler:
        made, listener = job([1, 13, 2], 5)
        scheduler.submit([made])
        error = listener.wait()
        assert isinstance(error, OSError)
        assert "expert of token 13" in str(error)
        assert listener.tokens == []
        made, listener = job([1, 12, 2], 5, Sampling(temperature=0, logit_bias={13: -100}))
        scheduler.submit([made])
        assert listener.wait() == "length"
        assert scheduler.statistics.sequences == {"error": 1, "length": 1}
    assert "cannot read the expert" in capfd.readouterr().err


def test_logits_that_are_not_finite_end_only_their_own_sequence():
    runner = FakeRunner(gated=True)
    runner.broken = 13
    sampling = Sampling(seed=1, logit_bias={13: -100})
    bad, failed = job([1, 13], 5, sampling)
    good, fine = job([1, 12], 5, sampling)
    with scheduling(runner) as scheduler:
        scheduler.submit([bad, good])
        runner.open_gate()
        assert isinstance(failed.wait(), FloatingPointError)
        assert fine.wait() == "length"
    assert fine.tokens == expected([1, 12], 5, sampling)


def test_close_lets_jobs_finish_or_cuts_them():
    runner = FakeRunner()
    with scheduling(runner) as scheduler:
        made, listener = job([1], 50)
        scheduler.submit([made])
        scheduler.close(patience=60)
        assert listener.wait() == "length"
        with pytest.raises(Closing):
            scheduler.submit([job([1], 1)[0]])
    runner = FakeRunner(gated=True)
    with scheduling(runner, streams=1) as scheduler:
        running, cut = job([1], 200)
        waiting, unserved = job([1], 200)
        scheduler.submit([running])
        scheduler.submit([waiting])
        runner.arrived.acquire()
        closing = threading.Thread(target=scheduler.close, args=(0,))
        closing.start()
        while not scheduler._cut:
            time.sleep(0.001)
        runner.allow(1)
        closing.join()
        assert isinstance(cut.wait(), Closing)
        assert isinstance(unserved.wait(), Closing)
    assert len(runner.steps) == 1


def test_jobs_that_need_the_same_experts_run_together():
    runner = FakeRunner(gated=True)
    running, listening = job([7, 9], 200)
    queued = [job([n, 8 + n % 2], 2) for n in (2, 4, 3, 6, 5)]
    with scheduling(runner, streams=2, alike_first=True) as scheduler:
        scheduler.submit([running])
        runner.allow(1)
        listening.next()
        scheduler.submit([made for made, _ in queued])
        runner.open_gate()
        assert {listener.wait() for _, listener in queued} == {"length"}
    # Beside the one that runs with a 9 the others with a 9, 3 and 5, go first.
    assert [made.passed_over for made, _ in queued[:2]] == [2, 2]
    assert all(made.passed_over <= 1 for made, _ in queued[2:])
    for made, listener in queued:
        assert listener.tokens == expected(made.prompt, 2, Sampling(seed=1))


def test_nobody_is_passed_over_for_ever():
    runner = FakeRunner(gated=True)
    beside, _ = job([1, 7], 200)
    lonely, served = job([2, 3], 1)
    crowd = [job([1, 7], 1) for n in range(1, 30)]
    with scheduling(runner, streams=2, alike_first=True) as scheduler:
        scheduler.submit([beside])
        runner.allow(1)
        scheduler.submit([lonely, *[made for made, _ in crowd]])
        runner.open_gate()
        assert served.wait() == "length"
        scheduler.cancel([beside])
    assert lonely.passed_over == PATIENCE
