"""Training the router of examples, on what the shared model makes of each domain's text.

Shapes: N windows, S tokens a window, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moekit.core.seeds import derive_seed, generator
from moekit.upcycle.converter import Job
from moekit.upcycle.domain_texts import tokenizer_of, windows_of
from moekit.upcycle.model.residue_routers import ExampleRouter

LENGTH, BATCH = 128, 16
# Prefixes that a window of text gives as examples.
PREFIXES = 8
# Two lengths, so that no other axis of an input has both.
PROBES = (5, 7)


@torch.no_grad()
def position_axes(model: Any, names: Container[str]) -> dict[str, int]:
    """The modules with parameters of a dense model, each with the axis of positions in its input.

    A module whose parameters are not among `names`, such as a tied head, is left out.
    """
    found: list[dict[str, tuple[int, ...]]] = []
    for length in PROBES:
        shapes: dict[str, tuple[int, ...]] = {}
        handles = [
            module.register_forward_pre_hook(_note(shapes, path))
            for path, module in model.named_modules()
            if any(f"{path}.{n}" in names for n, _ in module.named_parameters(recurse=False))
        ]
        model(torch.zeros(1, length, dtype=torch.long), use_cache=False)
        for handle in handles:
            handle.remove()
        found.append(shapes)
    short, long = found
    return {
        path: next(axis for axis, size in enumerate(shape) if size != long[path][axis])
        for path, shape in short.items()
    }


def _note(shapes: dict[str, tuple[int, ...]], path: str) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        shapes[path] = tuple(args[0].shape)

    return hook


def train_example_router(
    job: Job,
    model: Any,
    texts: Sequence[Sequence[str]],
    pool: str,
    *,
    epochs: int,
    learning_rate: float,
    examples: int,
) -> tuple[dict[str, Tensor], float]:
    """The tensors of a trained `ExampleRouter`, and its accuracy on a tenth held out.

    Its inputs are what the shared `model` makes of windows of each domain, and the whole domain is
    the label. The last epoch is taken: the published code chooses the best by its test texts.
    """
    tokenizer = tokenizer_of(job.base)
    width = int(job.base.config.get_text_config(decoder=True).hidden_size)
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(job.seed, "example router"))
        router = ExampleRouter(width, len(texts), pool)
        learn, test = [], []
        for label, documents in enumerate(texts):
            windows = windows_of(tokenizer, documents, LENGTH, examples, job.seed)
            means = torch.cat([_means(model, router, part) for part in windows.split(BATCH)])
            held = max(1, len(means) // 10) if len(means) > 1 else 0
            test.append((means[:held], label))
            learn.append((means[held:], label))
        _fit(router, learn, epochs, learning_rate, job.seed)
        accuracy = _accuracy(router.eval(), test)
    return {n: t.detach() for n, t in router.state_dict().items()}, accuracy


@torch.no_grad()
def _means(model: Any, router: ExampleRouter, windows: Tensor) -> Tensor:
    """Pooled states [n, P, D] of windows [n, S], of P prefixes or of the whole."""
    hidden = model.base_model(input_ids=windows, use_cache=False).last_hidden_state
    means = router.pooled(hidden)
    if means.shape[1] == 1:
        return means
    at = torch.linspace(0, means.shape[1] - 1, PREFIXES).round().long()
    return means[:, at]


def _fit(
    router: ExampleRouter,
    examples: Sequence[tuple[Tensor, int]],
    epochs: int,
    learning_rate: float,
    seed: int,
) -> None:
    inputs = torch.cat([means.flatten(0, 1) for means, _ in examples])
    labels = torch.cat(
        [torch.full((means.shape[0] * means.shape[1],), label) for means, label in examples]
    )
    optimizer = torch.optim.Adam(router.parameters(), lr=learning_rate)
    draw = generator(seed, "order of the router's examples")
    router.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs), generator=draw).split(1024):
            # A batch norm needs two examples.
            if len(batch) > 1:
                loss = cross_entropy(router.logits(inputs[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


@torch.no_grad()
def _accuracy(router: ExampleRouter, examples: Sequence[tuple[Tensor, int]]) -> float:
    right = [
        (router.logits(means.flatten(0, 1)).argmax(-1) == label).float()
        for means, label in examples
        if len(means)
    ]
    return float(torch.cat(right).mean()) if right else float("nan")
