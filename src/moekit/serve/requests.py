"""What a client may ask, checked field by field."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from moekit.serve.errors import ApiError

MOST_STOPS = 16
MOST_TOP = 20

# Fields of OpenAI's API that are about its accounts and machines: accepted, without effect.
IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Fields that ask for what this server does not do, unless they have a value that asks for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts(value: Any) -> Any:
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return [value]
    if not isinstance(value, str | list):
        raise ValueError("must be a string, a list of strings, or token ids")
    return _as_list(value)


def _prompt(value: Any) -> Any:
    is_ids = isinstance(value, list) and all(type(item) is int for item in value)
    if not isinstance(value, str) and not is_ids:
        raise ValueError("must be a string or a list of token ids")
    return value


def _text_parts(value: Any) -> Any:
    """The content of a message as one string."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"may have parts of type 'text' only, not {kind!r}")
        if not isinstance(part.get("text"), str):
            raise ValueError("has a text part without text")
    return "".join(part["text"] for part in value)


class Fields(BaseModel):
    """Null means that the default is to be used, and no other fields are allowed."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class StreamOptions(Fields):
    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(Fields):
    """What completions and chats share. Sampling left out is as the model's own config says."""

    model: str
    n: int = Field(1, ge=1, le=128)
    stop: Annotated[list[str], BeforeValidator(_as_list), Field(max_length=MOST_STOPS)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: int | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] = {}
    # Beyond OpenAI's: what other servers of open models take too.
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    ignore_eos: bool = False

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions."""

    prompt: Annotated[
        list[Annotated[str | list[int], BeforeValidator(_prompt)]],
        BeforeValidator(_prompts),
        Field(min_length=1),
    ]
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    echo: bool = False


class Message(Fields):
    """One message of a chat, text only."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_text_parts)] = ""
    name: str | None = None


class ChatRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    chat_template_kwargs: dict[str, Any] = {}


Request = TypeVar("Request", bound=GenerationRequest)


def parse(kind: type[Request], body: bytes) -> Request:
    """The request in a JSON body; raises ApiError 400 that names the first field at fault."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ApiError(400, "The body must be a JSON object")
    _check_unicode(body, values)
    for name in IGNORED & values.keys():
        del values[name]
    for name in UNSUPPORTED.keys() & values.keys():
        value = values.pop(name)
        if value is not None and value not in UNSUPPORTED[name]:
            raise ApiError(400, f"{name} is not supported by this server", param=name)
    try:
        request = kind.model_validate(values)
    except ValidationError as error:
        raise _first(error) from error
    _check(request)
    return request


def _check_unicode(body: bytes, values: Any) -> None:
    # JSON can escape half of a character, which no tokenizer can read.
    if b"\\ud" in body.lower():
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ApiError(400, "The body has text with a lone surrogate") from error


def _check(request: GenerationRequest) -> None:
    if request.stream_options is not None and not request.stream:
        message = "stream_options is only allowed when stream is true"
        raise ApiError(400, message, param="stream_options")
    if "" in request.stop:
        raise ApiError(400, "stop may not hold an empty string", param="stop")
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        message = "top_logprobs is only allowed when logprobs is true"
        raise ApiError(400, message, param="top_logprobs")


def _first(error: ValidationError) -> ApiError:
    found = error.errors(include_url=False)[0]
    param = ".".join(str(part) for part in found["loc"])
    if found["type"] == "extra_forbidden":
        message = f"Unrecognized request argument supplied: {param}"
    elif found["type"] == "missing":
        message = f"You must provide {param}"
    else:
        # pydantic's words: "Input should be ...", "List should have ... after validation, not 0".
        words = found["msg"].removeprefix("Value error, ").replace(" after validation", "")
        message = f"{param} {re.sub('^(Input|Value|List) ', '', words)}"
        if isinstance(found["input"], str | int | float):
            message += f", not {json.dumps(found['input'])[:80]}"
    return ApiError(400, message, param=param)
