"""Sequences in lockstep: who is asked when, errors, and the bits of a sequence alone."""

import threading

import pytest
import torch

from moekit.core.architecture import read_config
from moekit.ops import native
from moekit.runtime.expert_backend import ExpertBackend
from moekit.runtime.graph_runner import GraphRunner
from moekit.runtime.lockstep import in_lockstep, meet
from moekit.runtime.resident import resident_model
from tests.runtime.sources import StoreSource
from tests.runtime.test_expert_backend import packed


def test_calls_at_one_place_are_answered_together():
    asked = []

    def work(calls):
        asked.append(list(calls))
        return [10 * call for call in calls]

    def job(number, places):
        def run():
            return [meet(place, work, number) for place in places]

        return run

    found = in_lockstep([job(1, "ab"), job(2, "abc"), job(3, "b"), job(4, "")])
    assert found == [[10, 10], [20, 20, 20], [30], []]
    assert asked == [[1, 2], [3], [1, 2], [2]]
    assert meet("a", work, 7) == 70


@pytest.mark.parametrize("where", ["job", "work"])
def test_an_error_ends_all_of_them(where):
    left = []

    def work(calls):
        raise ValueError(f"work of {len(calls)}")

    def waits():
        try:
            meet(0, work, None)
        finally:
            left.append(threading.current_thread().name)

    def fails():
        if where == "job":
            raise ValueError("job")
        waits()

    before = threading.active_count()
    with pytest.raises(ValueError, match=where):
        in_lockstep([waits, fails, waits])
    assert threading.active_count() == before
    assert left == ["lockstep"] * len(left) != []


class Counting(StoreSource):
    """Counts how often experts are claimed."""

    claimed = 0

    def begin(self, layer, experts, **options):
        self.claimed += len(experts)
        return super().begin(layer, experts, **options)


# Adapters, a norm after the experts, identity experts, recurrent states, one weight for two layers.
FAMILIES = ("qwen3_moe", "gpt_oss", "jetmoe", "longcat_flash", "jamba", "qwen3_next", "deepseek_v3")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernels", [True, False])
def test_bits_of_a_sequence_do_not_depend_on_the_others(tmp_path, monkeypatch, family, kernels):
    if not kernels:
        monkeypatch.setattr(native, "library", lambda: None)
    _, store = packed(tmp_path, family)
    generator = torch.Generator().manual_seed(1)
    lengths = (5, 3, 9, 1, 1, 2, 4, 30)
    prompts = [torch.randint(3, 120, (n,), generator=generator).tolist() for n in lengths]
    source = Counting(store)
    # A chunk of 12 splits the last prompt, and the sequences of a step into groups.
    model = resident_model(store, read_config(store.path))
    runner = GraphRunner(model, chunk=12)
    runner.attach(ExpertBackend(model, store.layers, source))

    def run(groups):
        found = []
        for group in groups:
            seqs = [runner.new_sequence(48) for _ in group]
            steps = [runner.forward(seqs, [prompts[i] for i in group])]
            for token in (7, 8):
                steps.append(runner.forward(seqs, [[token + i] for i in group]))
            found.append(torch.stack(steps, dim=1))
        return torch.cat(found)

    alone = run([[i] for i in range(len(prompts))])
    claimed, source.claimed = source.claimed, 0
    together = run([range(len(prompts))])
    runner.close()
    assert torch.equal(together, alone)
    assert source.claimed < 0.8 * claimed
