"""Models that become one share one vocabulary."""

from __future__ import annotations

from collections.abc import Iterable

from moekit.core.errors import UserError
from moekit.core.load import load_tokenizer
from moekit.core.source_model import SourceModel


def check_tokenizers(base: SourceModel, others: Iterable[SourceModel]) -> None:
    """Raise `UserError` where a model has other token ids than `base`; one without a tokenizer is
    taken to have the base's."""
    own = _vocabulary(base)
    for other in others:
        size = other.config.get_text_config(decoder=True).vocab_size
        expected = base.config.get_text_config(decoder=True).vocab_size
        theirs = _vocabulary(other)
        if size != expected:
            raise UserError(
                f"{other.name} has a vocabulary of {size} and {base.name} one of {expected}; bring "
                "both on one vocabulary first (moekit merge with tokenizer_source)."
            )
        if own is not None and theirs is not None and own != theirs:
            different = sorted(set(own.items()) ^ set(theirs.items()))
            raise UserError(
                f"{other.name} and {base.name} have different tokenizers: {len(different)} entries "
                f"differ, the first is {different[0][0]!r}. Experts must read the same tokens."
            )


def _vocabulary(source: SourceModel) -> dict[str, int] | None:
    tokenizer = load_tokenizer(source.directory)
    return None if tokenizer is None else dict(tokenizer.get_vocab())
