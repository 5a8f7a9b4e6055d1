"""Packed token windows drawn from several domains, as a pure function of the window's number.

Every domain's documents form one stream, each document led by the end-of-text token. Window i of
the run belongs to a domain drawn by its weight; it is that domain's next window in an order that
is shuffled anew, and shifted by a random offset, in every epoch. Nothing depends on earlier calls,
so a resumed run sees exactly the windows that an uninterrupted one would.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moekit.core.errors import UserError


@dataclass(frozen=True)
class Domain:
    """The token stream of one domain: `tokens` int32, and the bytes of its text."""

    name: str
    tokens: NDArray[np.int32]
    num_bytes: int


def tokenize_domains(texts: dict[str, list[str]], tokenizer, end_id: int) -> list[Domain]:
    """One `Domain` for each entry of `texts` (domain name to documents)."""
    domains = []
    for name, documents in sorted(texts.items()):
        pieces: list[int] = []
        for start in range(0, len(documents), 256):
            encoded = tokenizer(documents[start : start + 256], add_special_tokens=False)
            for ids in encoded["input_ids"]:
                pieces.append(end_id)
                pieces.extend(ids)
        num_bytes = sum(len(text.encode()) for text in documents)
        domains.append(Domain(name, np.asarray(pieces, dtype=np.int32), num_bytes))
    return domains


def mixing_weights(
    domains: list[Domain], weights: dict[str, float] | None, exponent: float
) -> NDArray[np.float64]:
    """Probabilities over `domains`: `weights` by name, or tokens ** `exponent` where None."""
    if weights:
        unknown = sorted(set(weights) - {domain.name for domain in domains})
        missing = sorted({domain.name for domain in domains} - set(weights))
        if unknown or missing:
            raise UserError(
                f"data.weights: unknown domains {unknown}, domains without a weight {missing}; "
                f"the data has {[domain.name for domain in domains]}."
            )
        raw = np.array([weights[domain.name] for domain in domains], dtype=np.float64)
    else:
        raw = np.array([len(domain.tokens) for domain in domains], dtype=np.float64) ** exponent
    if (raw < 0).any() or raw.sum() <= 0:
        raise UserError("data.weights: weights must not be negative, and one must be above zero.")
    return raw / raw.sum()


class PackedMix:
    """The windows of a run.

    `window(i)` gives `length + 1` token ids (inputs and shifted targets overlap) and the index of
    their domain.
    """

    def __init__(
        self,
        domains: list[Domain],
        weights: NDArray[np.float64],
        length: int,
        seed: int,
    ) -> None:
        for domain in domains:
            if len(domain.tokens) < length + 2:
                raise UserError(
                    f"domain '{domain.name}' has {len(domain.tokens)} tokens, fewer than one "
                    f"window of {length + 1}; lower train.seq_len or leave the domain out."
                )
        self.domains, self.weights, self.length, self.seed = domains, weights, length, seed
        self._of_window = np.zeros(0, dtype=np.int16)
        self._rank_in_domain = np.zeros(0, dtype=np.int64)
        self._orders: dict[tuple[int, int], tuple[int, NDArray[np.int64]]] = {}

    def _extend(self, count: int) -> None:
        # Drawn in fixed blocks, so that the draws do not depend on how far anybody looked ahead.
        block = 4096
        blocks = -(-count // block)
        draws = [
            np.random.default_rng([self.seed, 1, number]).choice(
                len(self.domains), size=block, p=self.weights
            )
            for number in range(blocks)
        ]
        self._of_window = np.concatenate(draws).astype(np.int16)
        rank = np.zeros(len(self._of_window), dtype=np.int64)
        for index in range(len(self.domains)):
            chosen = self._of_window == index
            rank[chosen] = np.arange(int(chosen.sum()))
        self._rank_in_domain = rank

    def _order(self, domain: int, epoch: int) -> tuple[int, NDArray[np.int64]]:
        if (domain, epoch) not in self._orders:
            rng = np.random.default_rng([self.seed, 2, domain, epoch])
            spare = len(self.domains[domain].tokens) - 1
            offset = int(rng.integers(min(self.length, spare - self.length)))
            windows = (spare - offset) // self.length
            self._orders = {key: v for key, v in self._orders.items() if key[0] != domain}
            self._orders[domain, epoch] = offset, rng.permutation(windows)
        return self._orders[domain, epoch]

    def window(self, number: int) -> tuple[NDArray[np.int32], int]:
        """Window `number` (from 0): its `length + 1` token ids and the index of its domain."""
        if number >= len(self._of_window):
            self._extend(max(2 * number, 4096))
        domain = int(self._of_window[number])
        tokens = self.domains[domain].tokens
        # An epoch is the number of windows that fit whatever the offset.
        per_epoch = max(1, (len(tokens) - 1) // self.length - 1)
        epoch, position = divmod(int(self._rank_in_domain[number]), per_epoch)
        offset, order = self._order(domain, epoch)
        start = offset + int(order[position % len(order)]) * self.length
        return tokens[start : start + self.length + 1], domain

    def batch(self, numbers: range) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Windows `numbers` as ids [B, length + 1] and domain indices [B]."""
        parts = [self.window(number) for number in numbers]
        ids = np.stack([part[0] for part in parts]).astype(np.int64)
        return ids, np.array([part[1] for part in parts], dtype=np.int64)


def read_domains(folder: Path, pattern: str) -> dict[str, list[str]]:
    """Documents of every JSONL file in `folder` that matches `pattern`, by domain.

    The domain is the file's name up to its first dot.
    """
    import json

    files = sorted(Path(folder).glob(pattern))
    if not files:
        raise UserError(f"--data {folder}: no file matches '{pattern}'.")
    texts: dict[str, list[str]] = {}
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        f'{file}:{number}: expected a JSON object with "text".'
                    ) from error
                texts.setdefault(file.name.split(".")[0], []).append(text)
    return texts
