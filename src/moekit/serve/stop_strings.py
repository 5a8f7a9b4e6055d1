"""Text up to the first stop string, wherever the pieces it comes in are cut."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on and ends before the first stop string.

    The end of the text so far is held back while it may be the beginning of a stop string, so
    that nothing of one gets out. Of several the one that is complete first counts, which is the
    same for any division into pieces. `stopped` is true once one was found.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stopped = False
        self._stops = stops
        self._held = ""

    def add(self, text: str) -> str:
        """The text that may be shown now."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(text.find(stop) + len(stop), stop) for stop in self._stops if stop in text]
        if found:
            end, stop = min(found, key=lambda place: (place[0], -len(place[1])))
            self.stopped = True
            self._held = ""
            return text[: end - len(stop)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was held back: no stop string came of it."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
