"""A run made ready: data read, tokenizer trained or loaded, model built, folder claimed."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekit.core.errors import UserError
from moekit.evaluate.text import Sample

from .data import PackedMix, mixing_weights, read_domains, tokenize_domains
from .distributed import World
from .model import build_model, model_config, planned_vocab
from .recipe import Recipe
from .shard import shard
from .state import find_checkpoint
from .tokenizer import END_OF_TEXT, train_tokenizer

# Fields that change nothing about what a step computes; a resumed run may differ in them.
_FREE = (
    "log_every",
    "report_to",
    "eval_every",
    "eval_bytes",
    "checkpoint_every",
    "eval_context",
    "probe_at",
    "probe_bytes",
    "probe_logits",
)


@dataclass
class Run:
    """A run in progress: everything the loop needs, built from a recipe and a data folder."""

    recipe: Recipe
    folder: Path
    world: World
    tokenizer: Any
    model: Any
    mix: PackedMix
    valid: list[Sample]
    say: Callable[[str], None]
    advance: Callable[[int, int], None]


def prepare(
    recipe: Recipe,
    data: Path,
    folder: Path,
    world: World,
    say: Callable[[str], None],
    advance: Callable[[int, int], None],
) -> Run:
    """Read the data, train or load the tokenizer and build the model.

    `say` gets lines for people and `advance` (steps done, steps in all) after every step. The main
    process does the work that leaves files in `folder`; the others wait and read them.
    """
    # Before minutes go into a tokenizer.
    model_config(recipe, planned_vocab(recipe), 0)
    texts = read_domains(data, recipe.data.train)
    held_out = read_domains(data, recipe.data.valid) if recipe.data.valid else {}
    saved = folder / "tokenizer"
    if world.is_main:
        _claim(folder, recipe, say)
        if not saved.is_dir():
            say("training the tokenizer" if recipe.tokenizer.path is None else "tokenizer")
            _tokenizer(recipe, texts).save_pretrained(saved)
    world.barrier()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(saved)
    domains = tokenize_domains(texts, tokenizer, tokenizer.eos_token_id)
    weights = mixing_weights(domains, recipe.data.weights, recipe.data.exponent)
    mix = PackedMix(domains, weights, recipe.train.seq_len, recipe.train.seed)
    say(f"{sum(len(domain.tokens) for domain in domains):,} tokens in {len(domains)} domains")
    model = build_model(recipe, len(tokenizer), tokenizer.eos_token_id).to(world.device)
    if recipe.train.shard and world.size > 1:
        shard(model, world)
    valid = [Sample(text, name) for name, docs in sorted(held_out.items()) for text in docs]
    return Run(recipe, folder, world, tokenizer, model, mix, valid, say, advance)


def _tokenizer(recipe: Recipe, texts: dict[str, list[str]]):
    if recipe.tokenizer.path is None:
        return train_tokenizer(
            texts, recipe.tokenizer.vocab_size, recipe.tokenizer.bytes_per_domain
        )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer.path)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer.path {recipe.tokenizer.path}: no end-of-text token such as {END_OF_TEXT}."
        )
    return tokenizer


def _claim(folder: Path, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Make `folder` this recipe's, or check that the unfinished run in it is of the same recipe."""
    note = folder / "recipe.json"
    if not note.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(recipe.to_dict(), indent=1))
        return
    before, now = json.loads(note.read_text()), json.loads(json.dumps(recipe.to_dict()))
    checkpoint = find_checkpoint(folder / "checkpoint")
    for settings in (before, now):
        for name in _FREE:
            settings["train"].pop(name, None)
    if before["train"]["tokens"] != now["train"]["tokens"] and checkpoint is not None:
        tokens = json.loads((checkpoint / "state.json").read_text())["tokens"]
        plateau = (1 - recipe.optim.decay) * min(before["train"]["tokens"], recipe.train.tokens)
        if tokens > plateau:
            raise UserError(
                f"{folder} has seen {tokens:,} tokens, past the plateau of {plateau:,.0f}; its "
                "train.tokens can no longer change. Delete it to start over."
            )
    before["train"].pop("tokens"), now["train"].pop("tokens")
    if before != now:
        raise UserError(
            f"{folder} holds an unfinished run of a different recipe; delete it to start over, or "
            "use its recipe to resume."
        )
    note.write_text(json.dumps(recipe.to_dict(), indent=1))
    if checkpoint is not None:
        say(f"resuming the run in {folder} (delete it to start over)")
