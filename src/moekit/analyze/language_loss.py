"""Whether languages that are routed unlike the reference are also predicted worse."""

from __future__ import annotations

import math

import numpy as np

from moekit.analyze.information import p_value, spearman
from moekit.analyze.language_divergence import language_divergence
from moekit.analyze.losses import token_losses
from moekit.analyze.rerun import samples_of
from moekit.analyze.result import Result
from moekit.core.errors import UserError
from moekit.core.registry import register
from moekit.core.seeds import derive_seed
from moekit.core.trace import RoutingTrace
from moekit.core.view import MoEView


@register(
    "measure",
    "language-loss",
    title="Correlation of routing divergence from the reference language with loss, by layer",
    paper="Multilingual Routing 2510.04694",
    needs=("trace", "weights"),
    limits="The paper correlates with task accuracy; this takes the loss on the same text. A "
    "correlation over few languages says little: p is by exchange of the losses.",
    options={
        "reference": "the domain that the others are compared with",
        "permutations": "random exchanges of losses between languages",
        "min_tokens": "tokens a language must have",
        "max_tokens": "tokens of the trace to run again, in whole samples spread evenly",
        "seed": "seed of the exchanges",
    },
)
def language_loss(
    trace: RoutingTrace,
    view: MoEView,
    *,
    reference: str = "en",
    permutations: int = 1000,
    min_tokens: int = 200,
    max_tokens: int = 2**14,
    seed: int = 0,
) -> Result:
    """Rank-correlate each layer's divergence (`language-divergence`) with the loss by language.

    Loss is in bits a sentence where all languages are parallel, since tokens are not of equal
    content across languages; else in bits a token. `correlation` is that of the middle third of the
    layers, `rows` those of every layer. Raises UserError as `language-divergence` does, and for
    fewer than 4 languages beside the reference, where no correlation could be significant.
    """
    divergence = language_divergence(
        trace, reference=reference, min_tokens=min_tokens, seed=seed, permutations=100
    )
    languages = divergence.detail["languages"]
    if len(languages) < 4:
        raise UserError(
            f"{len(languages)} languages beside {reference!r}: a correlation needs 4 or more"
        )
    parallel = all(divergence.detail["parallel"].values())
    losses = _losses(trace, view, max_tokens, parallel)
    missing = [name for name in languages if name not in losses]
    if missing:
        raise UserError(f"{max_tokens} tokens reach no text of {missing[0]!r}: raise max_tokens")
    values = np.array([losses[name] for name in languages])
    random = np.random.default_rng(derive_seed(seed, "language-loss"))
    shuffled = [random.permutation(values) for _ in range(permutations)]
    depth = np.array([divergence.column(name) for name in languages], dtype=np.float64).T
    third = len(depth) // 3
    rows = [
        (index, *_correlation(layer, values, shuffled))
        for index, layer in zip(divergence.column("layer"), depth, strict=True)
    ]
    middle = _correlation(depth[third : len(depth) - third].mean(0), values, shuffled)
    return Result(
        ("layer", "correlation", "p"),
        rows,
        {
            "reference": reference,
            "languages": len(languages),
            "unit": "bits a sentence" if parallel else "bits a token",
            "correlation": middle[0],
            "p": middle[1],
        },
        {
            "loss": {name: losses[name] for name in [reference, *languages] if name in losses},
            "divergence": dict(zip(languages, depth.mean(0).tolist(), strict=True)),
        },
        divergence.notes,
    )


def _correlation(
    divergence: np.ndarray, losses: np.ndarray, shuffled: list[np.ndarray]
) -> tuple[float, float]:
    found = spearman(divergence, losses)
    null = np.array([spearman(divergence, other) for other in shuffled])
    return found, float(p_value(abs(found), np.abs(null)))


def _losses(
    trace: RoutingTrace, view: MoEView, max_tokens: int, by_sentence: bool
) -> dict[str, float]:
    """Bits by domain, a sentence or a token, over samples of two tokens or more."""
    bits: dict[str, float] = {}
    units: dict[str, int] = {}
    samples = [sample for sample in samples_of(trace, view, max_tokens) if len(sample[0]) > 1]
    for losses, (_, domain) in zip(token_losses(view, samples), samples, strict=True):
        bits[domain] = bits.get(domain, 0.0) + float(losses.sum()) / math.log(2)
        units[domain] = units.get(domain, 0) + (1 if by_sentence else len(losses))
    return {name: bits[name] / units[name] for name in bits}
