"""Places for sequences in the KV budget, each keeping its last sequence for prefixes to reuse."""

from __future__ import annotations

from collections.abc import Sequence

from moekit.runtime.runner import Runner, Seq
from moekit.serve.job import Job


class Slot:
    """Room for one sequence.

    `tokens` are those whose keys and values are in the cache; `pending` are to be fed next: what
    is left of the prompt, later the token chosen last.
    """

    def __init__(self) -> None:
        self.seq: Seq | None = None
        self.tokens: list[int] = []
        self.pending: list[int] = []
        self.last_used = 0

    def feed(self, count: int) -> list[int]:
        """Move the next tokens from pending to the cache's."""
        fed, self.pending = self.pending[:count], self.pending[count:]
        self.tokens += fed
        return fed


class Slots:
    """A fixed number of slots of `capacity` tokens each, on one runner.

    `running` are the slots that have a job, in the order they got it; `free` the others.
    """

    def __init__(self, runner: Runner, count: int, capacity: int, *, reuse: bool = True) -> None:
        self._runner = runner
        self._capacity = capacity
        self._reuse = reuse
        self._clock = 0
        self.running: dict[Slot, Job] = {}
        self.free = [Slot() for _ in range(count)]

    def take(self, job: Job) -> Slot:
        """Give a free slot to a job, one that holds a prefix of its prompt if there is one."""
        slot, reusable = self._choose(job)
        if slot.seq is not None and reusable != len(slot.tokens):
            if self._runner.can_truncate:
                slot.seq.truncate(reusable)
            else:
                self.forget(slot)
        if slot.seq is None:
            slot.seq = self._runner.new_sequence(self._capacity)
        slot.tokens = slot.tokens[:reusable]
        slot.pending = list(job.prompt[reusable:])
        job.reused_tokens = reusable
        self.free.remove(slot)
        self.running[slot] = job
        return slot

    def release(self, slot: Slot) -> None:
        """Take the job from a slot; its keys and values stay until the slot is needed."""
        del self.running[slot]
        slot.pending = []
        self._clock += 1
        slot.last_used = self._clock
        self.free.append(slot)

    def forget(self, slot: Slot) -> None:
        """Drop the sequence of a slot."""
        if slot.seq is not None:
            self._runner.drop(slot.seq)
        slot.seq = None
        slot.tokens = []

    def _choose(self, job: Job) -> tuple[Slot, int]:
        found = {slot: self._reusable(slot, job) for slot in self.free}
        best = max(found, key=lambda slot: (found[slot], -slot.last_used))
        # A few tokens in common (a BOS, the head of a template) are not worth a long text that
        # someone may come back to: then the slot unused for longest is taken.
        if 2 * found[best] < min(len(best.tokens), len(job.prompt)):
            best = min(found, key=lambda slot: slot.last_used)
        return best, found[best]

    def _reusable(self, slot: Slot, job: Job) -> int:
        """How many tokens of the prompt the slot holds; at least the last one must be fed."""
        if not self._reuse or job.score_prompt:
            return 0
        common = common_prefix(slot.tokens, job.prompt[:-1])
        if not self._runner.can_truncate and common < len(slot.tokens):
            return 0
        return common


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of leading tokens that two sequences share."""
    count = min(len(first), len(second))
    if first[:count] == second[:count]:
        return count
    return next(i for i in range(count) if first[i] != second[i])
