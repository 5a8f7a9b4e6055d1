"""Several sequences through a model that takes one at a time, with their experts computed together.

Each sequence has a thread of its own, but only one of them runs at any time: it goes on until it
needs experts. When all have stopped, those at the same layer get theirs from one call, so that an
expert is fetched and decoded once for all of them; everything else is computed as for a sequence
alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

# What computes the calls of several sequences, and gives the result of each.
Together = Callable[[list[Any]], list[Any]]
_current = threading.local()


def meet(place: object, work: Together, call: Any) -> Any:
    """The result of `call` from `work`, which gets the calls of all sequences at this `place`.

    Outside of `in_lockstep` the call is alone.
    """
    turn: _Turn | None = getattr(_current, "turn", None)
    return work([call])[0] if turn is None else turn.meet(place, work, call)


def in_lockstep(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of `jobs`, which wait for each other at `meet`; raises what the first raises."""
    turns = [_Turn(job) for job in jobs]
    try:
        live = turns
        while live:
            for turn in live:
                turn.go_on()
                if turn.error is not None:
                    raise turn.error
            live = [turn for turn in live if turn.waiting is not None]
            _answer(live)
        return [turn.result for turn in turns]
    finally:
        for turn in turns:
            turn.stop()


def _answer(turns: Sequence[_Turn]) -> None:
    """Compute what the sequences wait for, place by place."""
    places: dict[object, list[_Turn]] = {}
    for turn in turns:
        assert turn.waiting is not None
        places.setdefault(turn.waiting[0], []).append(turn)
    for there in places.values():
        calls = [turn.waiting for turn in there if turn.waiting is not None]
        results = calls[0][1]([call for _, _, call in calls])
        for turn, result in zip(there, results, strict=True):
            turn.answer = result


class _StoppedError(BaseException):
    """Ends the thread of a sequence whose step has failed elsewhere."""


class _Turn:
    """A job on a thread that runs while its owner waits, and waits while its owner runs."""

    def __init__(self, job: Callable[[], Any]) -> None:
        self.waiting: tuple[object, Together, Any] | None = None
        self.answer: Any = None
        self.result: Any = None
        self.error: BaseException | None = None
        self._job = job
        self._stopping = False
        self._mine, self._owners = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name="lockstep", daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Let the job run until it waits again or ends."""
        self.waiting = None
        self._mine.release()
        self._owners.acquire()

    def stop(self) -> None:
        """End the thread, in the middle of its job if need be."""
        self._stopping = True
        self._mine.release()
        self._thread.join()

    def meet(self, place: object, work: Together, call: Any) -> Any:
        """Called by the job: its answer, when all others have come as far."""
        self.waiting = place, work, call
        self._owners.release()
        self._wait()
        answer, self.answer = self.answer, None
        return answer

    def _wait(self) -> None:
        self._mine.acquire()
        if self._stopping:
            raise _StoppedError

    def _run(self) -> None:
        _current.turn = self
        try:
            self._wait()
            self.result = self._job()
        except _StoppedError:
            return
        except BaseException as error:  # raised again by the owner
            self.error = error
        self._owners.release()
