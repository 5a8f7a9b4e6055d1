"""How many tokens a sequence may have."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from moekit.core.errors import UserError

# Tokens of a sequence that memory is planned for, if nobody says.
CONTEXT = 4096


def context_length(
    config: PretrainedConfig, asked: int | None = None, *, default: int | None = CONTEXT
) -> int:
    """`asked` tokens, or else what the model was made for, at most `default` (None: all of it).

    Raises UserError for more than the model was made for.
    """
    text: Any = config.get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None)
    if asked is None:
        return min(longest or CONTEXT, default or longest or CONTEXT)
    if longest is not None and asked > longest:
        raise UserError(f"max_context {asked} is more than the model's {longest} tokens")
    return asked
