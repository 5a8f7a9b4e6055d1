"""Predicts the experts of earlier text that routed alike: profiles of a trace, matched to what ran.

A profile is how often each expert is chosen, [L, E]: of all text (popularity), of every sequence
(MoE-Infinity) or of every domain (PreMoe). The one whose compared layers are nearest to what this
text has chosen so far predicts the rest. Only layers that have run are compared; comparing with
those to come, which are still empty, would make the match of a first token arbitrary.

Shapes: P profiles, T tokens, K chosen, E experts, L layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moekit.core.errors import UserError
from moekit.core.registry import register_preset
from moekit.core.trace import RoutingTrace
from moekit.runtime.predict.predictor import Predictor, Scores, chosen_ids, shape_of

# Weight of the mean profile, which orders the experts that the nearest one never used.
MEAN_SHARE = 0.05


class ProfileMatch(Predictor):
    """A profile `of` each "trace", "domain" or "sample", matched by the layers that `compare` says.

    `capacity` bounds the profiles of samples; they are taken evenly.
    """

    learns = True

    def __init__(
        self,
        *,
        of: Literal["trace", "domain", "sample"] = "sample",
        compare: Literal["executed", "first"] = "executed",
        capacity: int = 256,
    ) -> None:
        if capacity < 1:
            raise UserError(f"capacity is {capacity} profiles; it must be 1 or more")
        self.of, self.compare, self.capacity = of, compare, capacity
        self.names: list[str] = []
        self._profiles: NDArray[np.float32] | None = None

    def fit(self, traces: Sequence[RoutingTrace]) -> None:
        num_layers, num_experts, _ = shape_of(traces)
        groups: dict[str, list[tuple[RoutingTrace, int, int]]] = defaultdict(list)
        for number, trace in enumerate(traces):
            for name, start, stop in self._spans(trace, number):
                if stop > start:
                    groups[name].append((trace, start, stop))
        if self.of == "sample":
            every = -(-len(groups) // self.capacity)
            groups = {name: groups[name] for name in list(groups)[::every]}
        self.names = list(groups)
        self._profiles = np.stack(
            [_usage(spans, num_layers, num_experts) for spans in groups.values()]
        )

    def _spans(self, trace: RoutingTrace, number: int) -> Iterator[tuple[str, int, int]]:
        for index, sample in enumerate(trace.samples):
            name = {"trace": "", "domain": sample.domain, "sample": f"{number}.{index}"}[self.of]
            yield name, sample.start, sample.stop

    def state(self) -> dict[str, NDArray]:
        assert self._profiles is not None
        text = "\0".join(self.names).encode()
        return {
            "profiles": self._profiles.astype(np.float16),
            "names": np.frombuffer(text, np.uint8).copy(),
        }

    def restore(self, state: dict[str, NDArray]) -> None:
        profiles = state["profiles"].astype(np.float32)
        if profiles.ndim != 3 or not np.isfinite(profiles).all():
            raise ValueError(f"profiles of shape {profiles.shape}")
        self._profiles = profiles
        self.names = state["names"].tobytes().decode().split("\0")
        if len(self.names) != len(profiles):
            raise ValueError(f"{len(self.names)} names of {len(profiles)} profiles")

    def start(self, num_layers: int, num_experts: int, top_k: int) -> None:
        super().start(num_layers, num_experts, top_k)
        if self._profiles is None:
            raise UserError("profiles are learned: fit the predictor to a trace of the model first")
        self._check_shape(*self._profiles.shape[1:])
        self._lengths = np.linalg.norm(self._profiles, axis=2) + 1e-9
        self._mean = self._profiles.mean(0)
        self._counts = np.zeros((num_layers, num_experts))
        self._products = np.zeros((len(self._profiles), num_layers))

    def observe(self, layer: int, ids: ArrayLike, hidden: ArrayLike | None = None) -> None:
        super().observe(layer, ids, hidden)
        assert self._profiles is not None
        used = self.chosen[layer]
        used = used[used >= 0]
        np.add.at(self._counts[layer], used, 1)
        self._products[:, layer] += self._profiles[:, layer, used].sum(1)

    @property
    def nearest(self) -> int | None:
        """The number of the profile with the highest mean cosine over the compared layers."""
        layers = np.flatnonzero(self._counts.any(1))
        layers = layers[:1] if self.compare == "first" else layers
        if not len(layers):
            return None
        own = np.linalg.norm(self._counts[layers], axis=1)
        cosine = self._products[:, layers] / (self._lengths[:, layers] * own)
        return int(cosine.mean(1).argmax())

    def predict(self, layer: int, ahead: int) -> Scores:
        assert self._profiles is not None
        target = layer + ahead
        usage = self._mean[target]
        number = self.nearest
        if number is not None:
            usage = (1 - MEAN_SHARE) * self._profiles[number, target] + MEAN_SHARE * usage
        seen = next(iter(self.chosen.values()), None)
        tokens = 1 if seen is None else len(seen)
        return (1 - (1 - np.minimum(usage, 1)) ** tokens).astype(np.float32)

    def keep_sets(self, size: int) -> list[NDArray[np.int64]]:
        """For every layer the ids of the `size` experts that the nearest profile uses most.

        PreMoe loads only those for the session; routing to them alone is lossy.
        """
        assert self._profiles is not None
        number = self.nearest
        usage = self._mean if number is None else self._profiles[number] + MEAN_SHARE * self._mean
        return [np.sort(np.argsort(-row, kind="stable")[:size]) for row in usage]


def _usage(
    spans: list[tuple[RoutingTrace, int, int]], num_layers: int, num_experts: int
) -> NDArray[np.float32]:
    counts = np.zeros((num_layers, num_experts))
    for trace, start, stop in spans:
        for position in range(num_layers):
            ids = chosen_ids(trace, position, start, stop)
            counts[position] += np.bincount(ids[ids >= 0], minlength=num_experts)
    tokens = sum(stop - start for _, start, stop in spans)
    return (counts / tokens).astype(np.float32)


register_preset(
    ProfileMatch,
    "popularity",
    kind="predictor",
    title="The experts that a trace used most, whatever the text",
    needs=("trace",),
    lossless=True,
    settings={"of": "trace"},
)
register_preset(
    ProfileMatch,
    "moe-infinity",
    kind="predictor",
    title="The experts of the most alike of earlier sequences, by all layers that ran",
    paper="MoE-Infinity 2401.14361",
    needs=("trace",),
    lossless=True,
    limits="Compares the layers that ran; the released code blanks those, so that nothing is left "
    "to match on a first token. Sequences that run together are matched as one.",
    settings={"of": "sample"},
)
register_preset(
    ProfileMatch,
    "premoe",
    kind="predictor",
    title="The experts of the nearest task, by the first MoE layer",
    paper="PreMoe 2505.17639",
    needs=("trace",),
    lossless=True,
    limits="A task is a domain of the trace; its key counts choices, where the paper adds up "
    "logits. `keep_sets`, which restricts the routing to a task's experts, is lossy.",
    settings={"of": "domain", "compare": "first"},
)
