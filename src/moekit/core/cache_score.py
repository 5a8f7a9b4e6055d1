"""One score decides which experts an expert cache keeps; the known policies are settings of it.

The lowest score is evicted. Score = frequency term, or a static profile, or knowledge of the
future; ties go to the less recently used expert, so all terms off is LRU. Policies see routing
only, never tensors. Shapes: N streams (a pool of slots each), E experts of a stream, K chosen,
G experts that gain from a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moekit.core.errors import UserError
from moekit.core.method_text import parse_method
from moekit.core.registry import Option, register_preset, registry

# A score is primary * CLOCK + time of last use: exact in float64 up to 8e6 uses and 1e9 accesses.
CLOCK = 2.0**30
# Above every time of last use; a score keeps single accesses apart beside it.
FIRST = 2.0**40
# Below the logarithm of any count, and still finite: differences of two are 0.
NEVER = -1e300

Future = Literal["none", "window", "next use"]


@dataclass(frozen=True, kw_only=True)
class CacheScore:
    """What a cache policy scores an expert by.

    `frequency` counts uses, each worth half as much after `half_life` tokens (None: for ever).
    With `near` the router's scores count instead of uses: those of the near * K best experts of a
    token. `refresh` lets a new count replace the old only every so many tokens, and only where they
    differ by more than the factor 1 + `hysteresis`. `distance` divides the count by the layers
    until the expert's next turn, plus one. `shallow` is the share of the layers, from the first on,
    whose experts stay before all others. `profile` ranks by given counts instead: the best are
    loaded before the first token, and an expert that was passed through goes first. `future` knows
    the trace: "window" counts the uses in the `window` tokens from the current one, "next use" is
    Belady's optimum.
    """

    frequency: bool = False
    half_life: float | None = None
    near: float = 0.0
    refresh: int = 0
    hysteresis: float = 0.0
    distance: bool = False
    shallow: float = 0.0
    profile: bool = False
    future: Future = "none"
    window: int = 0

    def __post_init__(self) -> None:
        if self.half_life is not None and not self.half_life > 0:
            raise UserError(f"half_life is {self.half_life} tokens; it must be above 0")
        if not 0 <= self.shallow <= 1:
            raise UserError(f"shallow is {self.shallow}; it is a share of the layers, 0 to 1")
        if min(self.near, self.refresh, self.hysteresis) < 0:
            raise UserError("near, refresh and hysteresis of a cache score are 0 or more")
        if (self.future == "window") != (self.window > 0):
            raise UserError(f"future {self.future!r} does not go with a window of {self.window}")
        if self.profile + self.frequency + (self.future != "none") > 1:
            raise UserError("a cache score is by frequency, by profile or by future: choose one")
        if self.shallow and (self.profile or self.future != "none"):
            raise UserError("shallow goes with recency or an aged frequency")
        if self.shallow and self.frequency and not self.half_life:
            raise UserError("shallow with frequency needs a half_life")
        of_counts = self.near or self.refresh or self.hysteresis or self.distance
        if of_counts and not (self.frequency and self.half_life):
            raise UserError(
                "near, refresh and distance of a cache score need frequency and a half_life"
            )


class ScoreState:
    """The scores of the experts of N streams, updated by every use; for scores without future.

    A stream of `layers` layers has E / layers experts of each, one layer after another. `profile`
    [N, E] is needed by a score that has one. `keys` [N, E + 1] are the scores; the last column
    takes what is written for places without an expert.
    """

    def __init__(
        self,
        score: CacheScore,
        num_streams: int,
        num_experts: int,
        profile: NDArray[np.float64] | None = None,
        *,
        layers: int = 1,
    ):
        if score.profile and profile is None:
            raise UserError("a static hot set needs a profile: counts by layer and expert")
        self.score = score
        # An expert without a use, prefetched say, is below all others.
        never = NEVER if score.half_life else 0.0
        self.keys = np.full((num_streams, num_experts + 1), never)
        if score.profile and profile is not None:
            self.keys[:, :num_experts] = profile
        self._mass = np.full(self.keys.shape, never)
        self._rows = np.arange(num_streams)[:, None]
        self._clock = 0
        self._decay = math.log(2) / score.half_life if score.half_life else 0.0
        self._refreshed, self._next_refresh = 0.0, 0.0
        self._offsets = _offsets(score, num_experts, layers)

    def use(
        self,
        time: float,
        ids: NDArray[np.intp],
        *,
        counts: NDArray[np.floating] | None = None,
        gains: tuple[NDArray[np.intp], NDArray[np.floating]] | None = None,
    ) -> NDArray[np.float64]:
        """The scores [N, K] of the experts ids [N, K], used in this order by token number `time`.

        The ids of one row differ, except that unused places hold the number of experts. `counts`
        [N, K] says how many tokens used each, 1 by default. `gains` are experts [N, G] and their
        router scores [N, G], for a score of those; without them a use counts 1. The caller writes
        the scores that are returned into `keys`; scores of other experts are changed there.
        """
        score = self.score
        clock = self._clock
        self._clock += ids.shape[1]
        if score.profile:
            return self.keys[self._rows, ids]
        if not score.frequency:
            return np.arange(clock, self._clock, dtype=np.float64)[None].repeat(len(ids), axis=0)
        if not score.half_life:
            mass = self._mass[self._rows, ids] + (1 if counts is None else counts)
            self._mass[self._rows, ids] = mass
            return mass * CLOCK + np.arange(clock, self._clock)
        gaining, amounts = gains if score.near and gains is not None else (ids, counts)
        # Growing the new instead of shrinking the old keeps untouched scores comparable; the
        # logarithm keeps them finite.
        grown = time * self._decay + (0.0 if amounts is None else np.log(amounts))
        mass = np.logaddexp(self._mass[self._rows, gaining], grown)
        self._mass[self._rows, gaining] = mass
        if score.refresh:
            if time >= self._next_refresh:
                self._refresh(time)
            return self.keys[self._rows, ids]
        if gaining is not ids:
            self.keys[self._rows, gaining] = mass
            return self._mass[self._rows, ids]
        return mass

    def present(self, layer: int = 0) -> NDArray[np.float64]:
        """The scores [N, E + 1] to compare while the experts of `layer` are used."""
        return self.keys if self._offsets is None else self.keys + self._offsets[layer]

    def _refresh(self, time: float) -> None:
        # Kept scores go on at the rate they had: only then is a difference a change of rate.
        steady = self.keys + (time - self._refreshed) * self._decay
        moved = np.abs(self._mass - steady) > math.log1p(self.score.hysteresis)
        self.keys[:] = np.where(moved, self._mass, steady)
        # Twice as far each time up to the interval, so that a cold start learns at once.
        self._refreshed = time
        self._next_refresh = min(time + self.score.refresh, 2 * time + 1)


def _offsets(score: CacheScore, num_experts: int, layers: int) -> NDArray[np.float64] | None:
    """What is added to the scores while a layer is served, [layers, E + 1]."""
    if not score.distance and not score.shallow:
        return None
    layer = np.arange(num_experts + 1) // (num_experts // layers)
    added = np.zeros((layers, num_experts + 1))
    if score.distance:
        turns = (layer[None, :] - np.arange(layers)[:, None] - 1) % layers + 1
        added -= np.log1p(turns)
    if score.shallow:
        added += np.where(layer < math.ceil(score.shallow * layers), FIRST, 0.0)
    return added


def policy(text: str) -> CacheScore:
    """The score of a registered cache policy, as "mrs" or with options, "mrs:near=3".

    Raises UserError with the nearest names if there is none, and for options it does not have.
    """
    name, options = parse_method(text)
    found = registry.find(name, kind="policy")
    known = [option.name for option in found.options]
    for option, value in options.items():
        # A policy of another package says itself what it takes.
        if option not in known and found.target == _TARGET:
            raise UserError(
                f"policy {name} has no option {option!r}; it has {', '.join(known) or 'none'}"
            )
        if not isinstance(value, int | float):
            raise UserError(f"policy {name}: {option}={value!r} is no number")
    try:
        return found.load()(**options)
    except TypeError as error:
        raise UserError(f"policy {name}: {error}") from None


_TARGET = f"{CacheScore.__module__}:{CacheScore.__qualname__}"
_OPTIONS = {
    "half_life": "tokens after which a use counts half",
    "near": "router scores count, of the best so many times top_k experts of a token",
    "refresh": "tokens between two renewals of the set",
    "hysteresis": "relative change of a count that is taken over at a renewal",
    "shallow": "share of the layers, from the first on, whose experts stay",
}


def _preset(name: str, *options: str, settings: dict[str, Any], **fields: Any) -> None:
    register_preset(
        CacheScore,
        name,
        kind="policy",
        needs=("trace",),
        lossless=True,
        settings=settings,
        options=tuple(Option(o, "float", _OPTIONS[o], settings[o]) for o in options),
        **fields,
    )


_preset(
    "lru",
    title="Evict the least recently used expert",
    settings={},
)
_preset(
    "lfu",
    title="Evict the least frequently used expert",
    settings={"frequency": True},
)
_preset(
    "lfu-aged",
    "half_life",
    title="Evict the least frequently used expert, uses halving in worth every 128 tokens",
    settings={"frequency": True, "half_life": 128.0},
)
_preset(
    "mrs",
    "half_life",
    "near",
    title="Evict the expert of the lowest recent router score (minus recent score)",
    paper="HybriMoE 2504.05897",
    limits="Where no router scores are given a use counts 1.",
    settings={"frequency": True, "half_life": 1.0, "near": 2.0},
)
_preset(
    "shallow-first",
    "shallow",
    title="Keep the experts of the first eighth of the layers, evict the others by last use",
    paper="Fate 2502.12224",
    limits="For slots that layers share. Least recently used instead of the paper's ARC.",
    settings={"shallow": 0.125},
)
_preset(
    "edgemoe",
    "half_life",
    title="Evict by frequency over the number of layers until the expert's next turn",
    paper="EdgeMoE 2308.14352",
    limits="For slots that layers share. The formula is inferred from the description.",
    settings={"frequency": True, "half_life": 128.0, "distance": True},
)
_preset(
    "refreshed-set",
    "half_life",
    "refresh",
    "hysteresis",
    title="A hot set learned from running counts, renewed every 128 tokens with hysteresis",
    settings={"frequency": True, "half_life": 512.0, "refresh": 128, "hysteresis": 0.25},
)
_preset(
    "auto",
    "half_life",
    title="The default: frequency, halving every 32 tokens, over layers until the next turn",
    settings={"frequency": True, "half_life": 32.0, "distance": True},
)
_preset(
    "hot-set",
    title="Keep the experts that a profile used most; others leave first",
    limits="As good as the profile resembles the traffic.",
    settings={"profile": True},
)
_preset(
    "belady",
    title="Belady's optimum: evict the expert whose next use is furthest",
    limits="Knows the future: for simulation only.",
    settings={"future": "next use"},
)
