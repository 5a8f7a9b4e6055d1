"""The tokenizer inside a GGUF file, from `tokenizer.json`: byte-level BPE.

llama.cpp does not read the rule that splits text before BPE, it knows a list of them by name. The
rule in `tokenizer.json` is compared with those; one that is not among them is refused, because the
model would silently see other tokens than it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from moekit.core.checkpoint import read_json
from moekit.core.errors import UserError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
SPECIAL = ("bos", "eos", "unk", "pad")

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(digits: str) -> str:
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{_TAIL}"


_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    rf"{_CONTRACTIONS}?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    rf"{_CONTRACTIONS}?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# (split rule, whether a whole word in the vocabulary skips the merges) -> name in llama.cpp.
# The rule is the tuple of regular expressions that run one after the other; "gpt2" stands for the
# one inside the byte-level step, "digits" for single digits.
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_words(r"\p{N}"),), False): "qwen2",
    ((_words(r"\p{N}{1,3}"),), True): "llama-bpe",
    ((_words(r"\p{N}{1,3}"),), False): "chatglm-bpe",
    ((_GPT4O,), False): "gpt-4o",
    ((_QWEN35,), False): "qwen35",
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",
}


@dataclass
class Vocabulary:
    """Tokens by id with their types (`gguf.TokenType`), merges, special ids, and what else counts.

    `pre` is llama.cpp's name of the split rule. `add_bos` and `add_eos` say whether the tokenizer
    itself puts those around a text.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def read_vocabulary(
    directory: Path, config: PretrainedConfig, pre: str | None = None
) -> Vocabulary | None:
    """The vocabulary of a model's directory, None where it has no tokenizer.

    `pre` names llama.cpp's split rule instead of finding it. Raises `UserError` for anything but
    byte-level BPE, an unknown split rule, and more tokens than the model has embeddings.
    """
    file = directory / TOKENIZER_FILE
    settings = _json_or_empty(directory / CONFIG_FILE)
    if not file.is_file():
        if settings or any(directory.glob("*.model")) or (directory / "vocab.json").is_file():
            raise UserError(
                f"{directory} has a tokenizer but no {TOKENIZER_FILE}; open it with AutoTokenizer "
                "and save it with save_pretrained first."
            )
        return None
    content = read_json(file)
    model = content.get("model", {})
    steps = _steps(content.get("pre_tokenizer"))
    if model.get("type") != "BPE" or not any(step.get("type") == "ByteLevel" for step in steps):
        raise UserError(
            f"{file} holds a {model.get('type')} tokenizer with steps "
            f"{[step.get('type') for step in steps]}; only byte-level BPE can be written as GGUF."
        )
    rule = (_rule(steps), bool(model.get("ignore_merges")))
    name = pre or PRE_TOKENIZERS.get(rule)
    if name is None:
        raise UserError(
            f"{file} splits text by a rule that is not known to be among llama.cpp's: "
            f"{' then '.join(rule[0])!r:.300}. If it has it under a name, give --gguf-pre NAME."
        )
    tokens, types = _tokens(content, config.vocab_size, file)
    around = _around(file)
    special = _special(settings, config, tokens)
    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=[m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])],
        pre=name,
        special=special,
        add_bos="bos" in special and special["bos"] in around[0],
        add_eos="eos" in special and special["eos"] in around[1],
        chat_template=_template(directory, settings),
    )


def add_vocabulary(writer: Any, vocabulary: Vocabulary | None) -> None:
    """Write the vocabulary, or that there is none: such a model runs on token ids only."""
    if vocabulary is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _json_or_empty(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _steps(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if not step:
        return []
    return list(step["pretokenizers"]) if step.get("type") == "Sequence" else [step]


def _rule(steps: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The split rule in the form of the keys of `PRE_TOKENIZERS`."""
    rule = []
    for step in steps:
        if step["type"] == "Split" and step.get("behavior") == "Isolated" and not step["invert"]:
            pattern = step["pattern"]
            rule.append(pattern.get("Regex", json.dumps(pattern)))
        elif step["type"] == "Digits" and step.get("individual_digits"):
            rule.append("digits")
        elif step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            rule += ["gpt2"] if step.get("use_regex", True) else []
        else:
            rule.append(json.dumps(step))
    return tuple(rule)


def _tokens(content: Mapping[str, Any], vocab_size: int, file: Path) -> tuple[list[str], list[int]]:
    import gguf

    kinds = gguf.TokenType
    known = {number: (token, kinds.NORMAL) for token, number in content["model"]["vocab"].items()}
    for added in content.get("added_tokens", []):
        kind = kinds.CONTROL if added.get("special") else kinds.USER_DEFINED
        known[added["id"]] = (added["content"], kind)
    if max(known) >= vocab_size:
        raise UserError(
            f"{file} has the token id {max(known)}, the model only {vocab_size} embeddings."
        )
    # A model may have more embeddings than tokens; llama.cpp wants a name for each.
    filled = [known.get(n, (f"[PAD{n}]", kinds.UNUSED)) for n in range(vocab_size)]
    return [token for token, _ in filled], [int(kind) for _, kind in filled]


def _special(
    settings: Mapping[str, Any], config: PretrainedConfig, tokens: list[str]
) -> dict[str, int]:
    numbers = {token: number for number, token in enumerate(tokens)}
    found = {}
    for name in SPECIAL:
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        number = numbers.get(token) if isinstance(token, str) else None
        if number is None:
            number = getattr(config, f"{name}_token_id", None)
            # Several ends are the chat's business; the first is the one of plain text.
            number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and 0 <= number < len(tokens):
            found[name] = number
    return found


def _around(file: Path) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    before = next(i for i in range(len(whole) + 1) if whole[i : i + len(plain)] == plain)
    return whole[:before], whole[before + len(plain) :]


def _template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    file = directory / TEMPLATE_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    return template if isinstance(template, str) else None
