"""`Engine`: prompts in, tokens out, over a runner that computes logits.

Shapes: B prompts, T tokens of the longest one.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.core.spec import MoESpec
from moekit.runtime.budget import Budget
from moekit.runtime.device.cache import DeviceCache
from moekit.runtime.expert_cache import ExpertCache
from moekit.runtime.runner import Runner, Seq
from moekit.runtime.sampling import Sampler, Sampling, choose_all

DEFAULT_NEW_TOKENS = 128
_DRAWING = ("temperature", "top_k", "top_p", "min_p")


@dataclass
class EngineStats:
    """What an engine has done since it was opened.

    Seconds and tokens of prompts (`prefill_`) and of decoding apart; `bytes_read` are those of
    experts from disk, `bytes_copied` those of experts to a GPU; with one, hits are what it held.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    peak_bytes: int = 0
    bytes_copied: int = 0
    peak_gpu_bytes: int = 0

    @property
    def ms_per_token(self) -> float:
        """Milliseconds of decoding for each generated token; 0 before there is one."""
        return 1000 * self.decode_seconds / self.decode_tokens if self.decode_tokens else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were in memory; 1 where none had to be."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0


@dataclass
class _Row:
    """One prompt on its way: what was generated so far."""

    number: int
    prompt: list[int]
    sampler: Sampler
    tokens: list[int] = field(default_factory=list)
    seq: Seq | None = None


class Engine:
    """A model that generates; made by `moekit.open_engine`.

    `streams` sequences of up to `max_context` tokens are run at once; more prompts wait their
    turn. `budget` and `gpu_budget` say where the memory goes and `cache` holds the experts of a
    packed model (all None for one that transformers has loaded whole); `notes` are what was chosen
    and why. Not to be used from several threads at a time. Use as a context manager, or `close` it.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        spec: MoESpec,
        config: Any,
        generation_config: Any,
        tokenizer: Any = None,
        max_context: int,
        streams: int,
        budget: Budget | None = None,
        cache: ExpertCache | DeviceCache | None = None,
        gpu_budget: Budget | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.runner = runner
        self.budget, self.gpu_budget = budget, gpu_budget
        self.cache = cache
        # Experts of few bit planes, where some fall back to them.
        self.low_bit: ExpertCache | None = None
        self.notes = list(notes)
        self.spec = spec
        self.config = config
        self.generation_config = generation_config
        self.tokenizer = tokenizer
        self.max_context = max_context
        self.streams = streams
        self._stats = EngineStats()
        self._closed = False

    # -- what a caller asks for --

    def generate(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        max_new_tokens: int | None = None,
        *,
        attention_mask: Tensor | None = None,
        do_sample: bool = False,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int = 0,
        **sampling: Any,
    ) -> Tensor | list[list[int]]:
        """Continue prompts; returns them with their continuations, in the form they came in.

        A tensor [B, T], padded where `attention_mask` is 0, gives a tensor padded on the right; a
        list of lists gives a list of lists. `sampling` are fields of `runtime.sampling.Sampling`;
        what is not given is as in the model's generation config with `do_sample`. The draw depends
        on `seed`, the row and the position only. Generation ends at `eos_token_id` (default: the
        model's) or after `max_new_tokens` (default: 128, or what the context holds).

        Raises UserError for empty prompts, unknown tokens, and where prompt and new tokens exceed
        `max_context`; StoreError where an expert cannot be read, and no token follows then.
        """
        prompts = _prompts(input_ids, attention_mask)
        made: list[list[int]] = [[] for _ in prompts]
        chosen = self.sampling(do_sample, seed=seed, **sampling)
        for row, token in self._decode(prompts, max_new_tokens, chosen, eos_token_id):
            made[row].append(token)
        if not isinstance(input_ids, Tensor):
            return [[*prompt, *new] for prompt, new in zip(prompts, made, strict=True)]
        return _padded(input_ids, made, self._pad_token())

    def stream(
        self,
        input_ids: Tensor | Sequence[int],
        max_new_tokens: int | None = None,
        *,
        do_sample: bool = False,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int = 0,
        **sampling: Any,
    ) -> Iterator[int]:
        """Yield the tokens that `generate` appends to one prompt ([T] or [1, T]) as they come."""
        ids = input_ids.flatten().tolist() if isinstance(input_ids, Tensor) else list(input_ids)
        chosen = self.sampling(do_sample, seed=seed, **sampling)
        # Checked now and not at the first token.
        events = self._decode([ids], max_new_tokens, chosen, eos_token_id)
        return (token for _, token in events)

    def sampling(self, do_sample: bool | None, *, seed: int = 0, **options: Any) -> Sampling:
        """Options as a `Sampling`; `do_sample` None is as the model's generation config says.

        Raises UserError for unknown options and values out of range.
        """
        unknown = sorted(set(options) - set(Sampling.__dataclass_fields__))
        if unknown:
            known = ", ".join(Sampling.__dataclass_fields__)
            raise UserError(f"{unknown[0]} is no option of sampling; there are {known}")
        config = self.generation_config
        if do_sample is None:
            do_sample = bool(getattr(config, "do_sample", False))
        values = {k: v for k, v in options.items() if v is not None}
        for name in ("repetition_penalty", *(_DRAWING if do_sample else ())):
            if name not in values and getattr(config, name, None) is not None:
                values[name] = getattr(config, name)
        if not do_sample:
            values["temperature"] = 0.0
        return Sampling(seed=seed, **values)

    @property
    def eos_token_ids(self) -> list[int]:
        """The model's end tokens."""
        return _as_list(getattr(self.generation_config, "eos_token_id", None))

    @property
    def stats(self) -> EngineStats:
        """What was done so far; `peak_bytes` is the most memory the process has held."""
        if self.cache is not None:
            done = self.cache.stats
            self._stats.hits, self._stats.misses = done.hits, done.misses
            if isinstance(self.cache, DeviceCache):
                self._stats.bytes_copied = done.total_bytes
                self._stats.peak_gpu_bytes = self.cache.device.peak_bytes()
                done = self.cache.below.stats
            self._stats.bytes_read = done.total_bytes
        if self.low_bit is not None:
            few = self.low_bit.stats
            self._stats.hits += few.hits
            self._stats.misses += few.misses
            self._stats.bytes_read += few.demand_bytes
        self._stats.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return self._stats

    def close(self) -> None:
        """Give back the memory and close the files. May be called twice."""
        if not self._closed:
            self._closed = True
            self.runner.close()
            if self.cache is not None:
                self.cache.close()
                self.cache.store.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    # -- how it is done --

    def _decode(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int | None,
        sampling: Sampling,
        eos_token_id: int | Sequence[int] | None,
    ) -> Iterator[tuple[int, int]]:
        if self._closed:
            raise RuntimeError("the engine is closed")
        limits = [self._room(prompt, max_new_tokens) for prompt in prompts]
        ends = set(self.eos_token_ids if eos_token_id is None else _as_list(eos_token_id))
        rows = [_Row(i, p, Sampler(sampling, p, i)) for i, p in enumerate(prompts)]
        return self._steps(rows, limits, ends)

    def _steps(
        self, waiting: list[_Row], limits: list[int], ends: set[int]
    ) -> Iterator[tuple[int, int]]:
        active: list[_Row] = []
        try:
            while waiting or active:
                while waiting and len(active) < self.streams:
                    row = waiting.pop(0)
                    active.append(row)
                    yield row.number, self._prefill(row, limits[row.number])
                    active = self._still_open(active, limits, ends)
                if not active:
                    continue
                for row, token in zip(active, self._step(active), strict=True):
                    row.tokens.append(token)
                    yield row.number, token
                active = self._still_open(active, limits, ends)
        finally:
            for row in active:
                self._drop(row)

    def _prefill(self, row: _Row, limit: int) -> int:
        row.seq = self.runner.new_sequence(len(row.prompt) + limit)
        start = time.perf_counter()
        logits = self._logits([row.seq], [row.prompt])
        (token,) = choose_all([row.sampler], logits)
        self._stats.prefill_seconds += time.perf_counter() - start
        self._stats.prefill_tokens += len(row.prompt)
        row.tokens.append(token)
        return token

    def _step(self, rows: Sequence[_Row]) -> list[int]:
        start = time.perf_counter()
        seqs = [row.seq for row in rows if row.seq is not None]
        logits = self._logits(seqs, [row.tokens[-1:] for row in rows])
        tokens = choose_all([row.sampler for row in rows], logits)
        self._stats.decode_seconds += time.perf_counter() - start
        self._stats.decode_tokens += len(rows)
        return tokens

    def _logits(self, seqs: list[Seq], tokens: list[list[int]]) -> Tensor:
        logits = self.runner.forward(seqs, tokens)
        assert isinstance(logits, Tensor)
        return logits

    def _still_open(self, rows: list[_Row], limits: list[int], ends: set[int]) -> list[_Row]:
        done = [r for r in rows if r.tokens[-1] in ends or len(r.tokens) >= limits[r.number]]
        for row in done:
            self._drop(row)
        return [row for row in rows if row not in done]

    def _drop(self, row: _Row) -> None:
        if row.seq is not None:
            self.runner.drop(row.seq)
            row.seq = None

    def _room(self, prompt: Sequence[int], max_new_tokens: int | None) -> int:
        """How many tokens may follow a prompt; raises UserError as `generate` says."""
        if not prompt:
            raise UserError("a prompt is empty: it needs at least one token")
        vocabulary = self.config.get_text_config(decoder=True).vocab_size
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            bad = max(prompt) if max(prompt) >= vocabulary else min(prompt)
            raise UserError(f"token {bad} of a prompt is not in the vocabulary of {vocabulary}")
        room = self.max_context - len(prompt)
        if max_new_tokens is not None and max_new_tokens < 1:
            raise UserError(f"max_new_tokens {max_new_tokens} must be 1 or more")
        if room < 1 or (max_new_tokens or 1) > room:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and max_new_tokens is {max_new_tokens or 1}; "
                f"the context is {self.max_context}: use fewer, or open the engine with a larger "
                "max_context"
            )
        return max_new_tokens or min(DEFAULT_NEW_TOKENS, room)

    def _pad_token(self) -> int:
        pad = getattr(self.generation_config, "pad_token_id", None)
        return pad if pad is not None else (self.eos_token_ids or [0])[0]


def _as_list(value: int | Iterable[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _prompts(
    input_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None
) -> list[list[int]]:
    if not isinstance(input_ids, Tensor):
        if any(isinstance(prompt, int) for prompt in input_ids):
            raise UserError("input_ids are one list of token ids a sequence: [[1, 2, 3]]")
        return [list(prompt) for prompt in input_ids]
    if input_ids.ndim != 2:
        raise UserError(f"input_ids has shape {list(input_ids.shape)}; it must be [B, T]")
    if attention_mask is None:
        return input_ids.tolist()
    return [ids[kept].tolist() for ids, kept in zip(input_ids, attention_mask.bool(), strict=True)]


def _padded(input_ids: Tensor, made: list[list[int]], pad: int) -> Tensor:
    longest = max(map(len, made))
    new = [[*tokens, *[pad] * (longest - len(tokens))] for tokens in made]
    return torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype)], dim=1)
