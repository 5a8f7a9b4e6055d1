"""Prompts as token ids, and how many tokens may follow them."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any

from jinja2 import TemplateError

from moekit.core.errors import UserError
from moekit.runtime.detokenize import decode
from moekit.runtime.generate import encode_prompt
from moekit.serve.errors import ApiError
from moekit.serve.requests import ChatRequest, CompletionRequest


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, how many tokens are to follow, and the text where that is to be continued."""

    ids: list[int]
    new_tokens: int
    text: str | None = None  # None: what follows is a text of its own

    @property
    def before(self) -> list[int]:
        """The last tokens of a text that is continued."""
        return [] if self.text is None else self.ids[-8:]


def chat_prompt(tokenizer: Any, request: ChatRequest, context: int) -> Prompt:
    """The messages in the model's own template; raises ApiError 400 where it has none."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ApiError(
            400,
            "This model has no chat template, so it cannot chat: use /v1/completions",
            param="messages",
        )
    # What the tokenizer itself takes is not the client's to set: a template of its own, say.
    own = request.chat_template_kwargs.keys() & signature(tokenizer.apply_chat_template).parameters
    if own:
        message = f"chat_template_kwargs may not have {min(own)}"
        raise ApiError(400, message, param="chat_template_kwargs")
    messages = [_message(message.model_dump(exclude_none=True)) for message in request.messages]
    try:
        ids = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            return_dict=True,
            **request.chat_template_kwargs,
        )["input_ids"]
    except (TemplateError, TypeError, ValueError) as error:
        message = f"The model's chat template refuses these messages: {error}"
        raise ApiError(400, message, param="messages") from error
    asked = request.max_completion_tokens or request.max_tokens
    return Prompt(ids, room(len(ids), asked, context, "messages"))


def completion_prompts(
    tokenizer: Any, request: CompletionRequest, context: int, vocab_size: int
) -> list[Prompt]:
    """Each prompt's tokens; raises ApiError 400 for unknown ids and too long prompts."""
    asked = request.max_tokens if "max_tokens" in request.model_fields_set else None
    found = []
    for prompt in request.prompt:
        if isinstance(prompt, str):
            try:
                ids = encode_prompt(tokenizer, prompt, chat=False)["input_ids"][0].tolist()
            except UserError as error:
                raise ApiError(400, str(error), param="prompt") from error
            text = prompt
        else:
            _check_ids(prompt, vocab_size)
            ids, text = prompt, decode(tokenizer, prompt)
        new_tokens = room(len(ids), asked, context, "prompt")
        if asked is None:
            new_tokens = min(new_tokens, request.max_tokens)
        found.append(Prompt(ids, new_tokens, text))
    return found


def room(prompt_tokens: int, asked: int | None, context: int, where: str) -> int:
    """How many tokens to generate: as asked, or what the context holds.

    Raises ApiError 400 with the numbers where prompt and new tokens exceed the context.
    """
    if prompt_tokens + (1 if asked is None else asked) <= context:
        return context - prompt_tokens if asked is None else asked
    if asked is None or prompt_tokens >= context:
        numbers = f"your {where} has {prompt_tokens} tokens"
    else:
        numbers = (
            f"you requested {prompt_tokens + asked} tokens "
            f"({prompt_tokens} in the {where}, {asked} in the completion)"
        )
    raise ApiError(
        400,
        f"This model's maximum context length is {context} tokens, but {numbers}. "
        f"Shorten the {where} or the completion.",
        param=where,
        code="context_length_exceeded",
    )


def _message(message: dict[str, Any]) -> dict[str, Any]:
    # Templates know the older name of this role.
    if message["role"] == "developer":
        message["role"] = "system"
    return message


def _check_ids(ids: list[int], vocab_size: int) -> None:
    if not ids:
        raise ApiError(400, "A prompt of token ids may not be empty", param="prompt")
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        message = f"Token {wrong} is not in the vocabulary of {vocab_size} tokens"
        raise ApiError(400, message, param="prompt")
