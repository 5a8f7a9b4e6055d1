"""Training a byte-level BPE tokenizer that transformers and llama.cpp both read."""

from collections.abc import Iterable, Iterator

from moekit.core.errors import UserError

END_OF_TEXT = "<|endoftext|>"

# The split rule of Qwen2's tokenizer, which llama.cpp knows as the pre-tokenizer "qwen2".
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: dict[str, list[str]], vocab_size: int, bytes_per_domain: int):
    """A byte-level BPE `PreTrainedTokenizerFast` with `vocab_size` entries, end of text last.

    `texts` maps a domain to its documents. Every domain is weighed alike: documents are taken in
    order, and again from the start, until `bytes_per_domain` bytes of each domain were seen.
    No normaliser is set, so that decoding gives back every byte of the text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 257:
        raise UserError(
            f"tokenizer.vocab_size is {vocab_size}, but the bytes and the end-of-text token alone "
            "need 257; choose a larger one."
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_balanced(texts.values(), bytes_per_domain), trainer)
    bpe.add_special_tokens([END_OF_TEXT])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def _balanced(domains: Iterable[list[str]], budget: int) -> Iterator[str]:
    for documents in domains:
        used, index = 0, 0
        while documents and used < budget:
            text = documents[index % len(documents)]
            yield text
            used += len(text.encode())
            index += 1
