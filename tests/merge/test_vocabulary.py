"""Models of different vocabularies: which row every token of the result gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moekit.core.errors import UserError
from moekit.merge.recipe import merge_from_dict
from moekit.merge.run import merge
from tests.models import write_tiny_model

ROWS = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `a` with tokens <x> and <y>, and `b` with <y> and <z>."""
    root = tmp_path_factory.mktemp("vocabulary")
    tiny = write_tiny_model(root / "tiny")
    for number, (name, added) in enumerate(
        [("base", []), ("a", ["<x>", "<y>"]), ("b", ["<y>", "<z>"])]
    ):
        torch.manual_seed(number)
        tokenizer = AutoTokenizer.from_pretrained(tiny)
        model = AutoModelForCausalLM.from_pretrained(tiny)
        tokenizer.add_tokens(added)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def merged(root: Path, out: Path, method: str = "linear", **extra: Any) -> tuple[Any, Tensor]:
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(root / n), "parameters": {"weight": 1.0}} for n in ("a", "b")],
        **extra,
    }
    merge(merge_from_dict(recipe), out)
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(model.state_dict()[ROWS])
    return tokenizer.get_vocab(), model.state_dict()[ROWS]


def row(root: Path, name: str, token: str) -> Tensor:
    number = AutoTokenizer.from_pretrained(root / name).get_vocab()[token]
    return AutoModelForCausalLM.from_pretrained(root / name).state_dict()[ROWS][number]


def test_the_union_has_the_tokens_of_all(models: Path, tmp_path: Path) -> None:
    ids, rows = merged(models, tmp_path / "out", tokenizer_source="union")
    assert {"<x>", "<y>", "<z>"} <= set(ids)
    assert len(rows) == len(ids) == max(ids.values()) + 1
    common = next(token for token in ids if not token.startswith("<"))
    for token in ("<y>", common):
        mean = (row(models, "a", token) + row(models, "b", token)) / 2
        torch.testing.assert_close(rows[ids[token]], mean)
    # A token of one model is taken over by the others before they are averaged.
    torch.testing.assert_close(rows[ids["<x>"]], row(models, "a", "<x>"))
    torch.testing.assert_close(rows[ids["<z>"]], row(models, "b", "<z>"))


def test_task_vectors_on_the_vocabulary_of_the_base(models: Path, tmp_path: Path) -> None:
    base = str(models / "base")
    ids, rows = merged(
        models, tmp_path / "out", "task_arithmetic", base_model=base, tokenizer_source="base"
    )
    assert "<x>" not in ids
    token = next(token for token in ids if not token.startswith("<"))
    one, two, below = (row(models, name, token) for name in ("a", "b", "base"))
    torch.testing.assert_close(rows[ids[token]], one + two - below)


def test_tokens_may_be_given_rows_and_rows_be_padded(models: Path, tmp_path: Path) -> None:
    a = str(models / "a")
    tokens = {
        "<z>": {"source": {"kind": "zero"}, "force": True},
        "<new>": {"source": {"kind": "model_token", "model": a, "token": "<x>"}},
    }
    settings = {"source": "union", "tokens": tokens, "pad_to_multiple_of": 64}
    ids, rows = merged(models, tmp_path / "out", tokenizer=settings)
    assert len(rows) % 64 == 0
    assert len(rows) > len(ids)
    assert not rows[ids["<z>"]].any()
    torch.testing.assert_close(rows[ids["<new>"]], row(models, "a", "<x>"))
    torch.testing.assert_close(rows[-1], rows[: len(ids)].mean(0), atol=1e-6, rtol=0)


def test_vocabularies_that_are_not_named_or_known(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown; there are union, base"):
        merged(models, tmp_path / "out", tokenizer_source="unoin")
    with pytest.raises(UserError, match="say tokenizer_source"):
        merged(models, tmp_path / "out", base_model=str(models / "base"), method="ties")
    assert not (tmp_path / "out").exists()
