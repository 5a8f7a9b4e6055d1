"""Opening a packed model within a memory limit: resident part, expert cache, runner."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from transformers import GenerationConfig, PretrainedConfig

from moekit.core.architecture import read_config
from moekit.core.cache_score import CacheScore
from moekit.core.errors import UserError
from moekit.core.load import load_tokenizer
from moekit.core.machine import available_memory, charged_memory
from moekit.core.skeleton import config_dtype
from moekit.core.spec import MoESpec
from moekit.core.view import MoEView
from moekit.ops.codecs import make_codec
from moekit.ops.native import library
from moekit.runtime.budget import PROGRAM_GROWTH, Budget, Needs, leaves_on_disk, plan_budget
from moekit.runtime.choose_policy import choose_policy
from moekit.runtime.claim import Claim
from moekit.runtime.context import context_length
from moekit.runtime.decoder_shape import supports
from moekit.runtime.device.device import open_device
from moekit.runtime.engine import Engine
from moekit.runtime.expert_backend import ExpertBackend
from moekit.runtime.expert_cache import ExpertCache, online_policy, record_sizes
from moekit.runtime.graph_runner import GraphRunner
from moekit.runtime.known_routing import open_trace, usage
from moekit.runtime.low_bit import LowBitExperts
from moekit.runtime.native_runner import NativeRunner
from moekit.runtime.predict.gates import Gate, gates_of
from moekit.runtime.predict.predictor import Predictor
from moekit.runtime.prefetch import Filling, Prefetching
from moekit.runtime.recent_scores import RecentScores
from moekit.runtime.resident import resident_model
from moekit.runtime.runner import Runner
from moekit.runtime.schedule.fallback import PlaneFallback
from moekit.runtime.schedule.sharing import SharedExperts
from moekit.runtime.store import ExpertStore
from moekit.runtime.watchers import AUTO, in_turn, native_gates, watchers

if TYPE_CHECKING:
    from moekit.runtime.device.opening import DeviceOpening

# The end of the name of what may stay on disk.
EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True)
class Request:
    """What `open_engine` was asked for; `limit` None is what this machine has left. With
    `chooses_policy` the policy is found on a short trace of the model's own making."""

    limit: int | None
    expert_cache: int | None
    threads: int
    policy: str | CacheScore
    predictor: str | Predictor
    prefetch: bool
    resident_codec: str | None
    dtype: str | None
    runner: str
    max_context: int | None
    streams: int | None
    slots_per_layer: bool = False
    trace: str | Path | None = None
    sharing: SharedExperts | None = None
    fallback: PlaneFallback | None = None
    chooses_policy: bool = False
    device: str | None = None
    gpu_memory: int | None = None
    scheduler: str = "on-demand"


def open_packed(directory: Path, request: Request, notes: list[str]) -> Engine:
    """Open the packed model in `directory`; raises as `open_engine` does."""
    engine = _open(directory, request, notes)
    if not request.chooses_policy or engine.budget is None or engine.budget.complete:
        return engine
    try:
        chosen = choose_policy(engine)
    except BaseException:
        engine.close()
        raise
    if chosen is None:
        return engine
    if chosen.name != request.policy:
        engine.close()
        engine = _open(directory, replace(request, policy=chosen.name), notes)
    engine.notes.append(chosen.reason)
    return engine


def _open(directory: Path, request: Request, notes: list[str]) -> Engine:
    device = None if request.device is None else open_device(request.device)
    charged = charged_memory()
    available = charged + available_memory()
    with ExitStack() as stack:
        store = stack.enter_context(ExpertStore.open(directory))
        config = read_config(directory)
        spec = MoESpec.from_config(config)
        opening = _Opening(store, config, spec, request, charged + PROGRAM_GROWTH, available, notes)
        if device is not None:
            # Needs Triton, which is not everywhere.
            from moekit.runtime.device.opening import DeviceOpening

            return _on_device(directory, DeviceOpening(opening, device), stack)
        opening.check_early()
        tokenizer = load_tokenizer(directory)
        make: Callable[[ExitStack], tuple[Runner, Budget, ExpertCache]] = (
            opening.native if opening.takes_native() else opening.graph
        )
        runner, budget, cache = make(stack)
        if opening.ranks is not None:
            cache.preload(opening.ranks)
        engine = Engine(
            runner,
            spec=spec,
            config=config,
            generation_config=_generation_config(directory, config),
            tokenizer=tokenizer,
            max_context=budget.needs.max_context,
            streams=budget.needs.streams,
            budget=budget,
            cache=cache,
            notes=notes,
        )
        engine.low_bit = opening.low_bit
        stack.pop_all()
    return engine


def _on_device(directory: Path, made: DeviceOpening, stack: ExitStack) -> Engine:
    opened, opening = made.open(stack), made.opening
    engine = Engine(
        opened.runner,
        spec=opening.spec,
        config=opening.config,
        generation_config=_generation_config(directory, opening.config),
        tokenizer=load_tokenizer(directory),
        max_context=opening.context,
        streams=opening.streams,
        budget=opened.budget,
        gpu_budget=opened.gpu_budget,
        cache=opened.cache,
        notes=opening.notes,
    )
    stack.pop_all()
    return engine


class _Opening:
    """One model on its way to a runner and a cache."""

    def __init__(
        self,
        store: ExpertStore,
        config: PretrainedConfig,
        spec: MoESpec,
        request: Request,
        program: int,
        available: int,
        notes: list[str],
    ) -> None:
        self.store, self.config, self.spec, self.request = store, config, spec, request
        self.program, self.available = program, available
        self.sizes = record_sizes(store)
        self.notes = notes
        self.low_bit: ExpertCache | None = None
        self.ranks: NDArray[np.float64] | None = None
        self.trace = None
        if request.trace is not None:
            self.trace = open_trace(request.trace, [x.num_experts for x in store.layers])
        self.context = context_length(config, request.max_context)
        self.streams = request.streams or (1 if request.limit is not None else 8)
        self.dtype = None if request.dtype is None else getattr(torch, request.dtype)

    def check_early(self) -> None:
        """Refuse what cannot fit before anything is read."""
        stored, wanted = self.store.header.encoded, self.request.resident_codec
        if stored is not None and wanted not in (None, stored.codec.name):
            raise UserError(
                f"the resident part of {self.store.path} is stored in {stored.codec.name}: leave "
                f"out resident_codec, or convert the model again with --resident-codec {wanted}"
            )
        if stored is not None or wanted is None:
            infos = self.store.resident_info()
            least = sum(x.nbytes for n, x in infos.items() if not n.endswith(EMBEDDING))
            self._budget(least, 0, 0)

    def _experts_stay_on_disk(self) -> bool:
        """Whether some will, as far as can be told before the resident part is read."""
        stored = sum(info.nbytes for info in self.store.resident_info().values())
        asked = self.request
        return leaves_on_disk(
            asked.limit, self.program + stored, self.sizes, self.available, asked.expert_cache
        )

    def _budget(self, resident: int, kv_cache: int, scratch: int) -> Budget:
        needs = Needs(self.program, resident, kv_cache, scratch, self.streams, self.context)
        return plan_budget(
            self.request.limit,
            needs,
            self.sizes,
            self.spec.top_k,
            self.available,
            self.request.expert_cache,
        )

    def _cache(self, budget: Budget, stack: ExitStack) -> ExpertCache:
        given = self.request.policy
        score = given if isinstance(given, CacheScore) else online_policy(given)
        nbytes, rule = budget.expert_cache, self.request.fallback
        if rule is not None and not budget.complete:
            nbytes -= int(rule.share * nbytes)
        ranks = None
        if score.profile:
            if self.trace is None:
                raise UserError(
                    f"policy {given} keeps what was used most: give a trace of the model "
                    "(`moekit trace`)"
                )
            ranks = usage(self.trace)
        made = stack.enter_context(
            ExpertCache(
                self.store,
                nbytes,
                policy=score,
                per_layer=self.request.slots_per_layer,
                profile=ranks,
            )
        )
        self.ranks = ranks
        return made

    def takes_native(self) -> bool:
        """Whether the native runner is asked for, or runs this model; a note says why not."""
        if self.request.runner != AUTO:
            return self.request.runner == "native"
        reason = supports(self.config) if library() is not None else "no C++ compiler"
        if reason is not None:
            self.notes.append(f"graph runner: {reason}")
        return reason is None

    # -- the graph runner --

    def graph(self, stack: ExitStack) -> tuple[Runner, Budget, ExpertCache]:
        """The family's own modules."""
        if self.request.sharing is not None or self.request.fallback is not None:
            raise UserError(
                "share_experts and low_bit_fallback need the native runner, which does not run "
                "this model"
            )
        if self.request.resident_codec is not None and self.store.header.encoded is None:
            raise UserError("resident_codec needs the native runner, which does not run this model")
        model = resident_model(self.store, self.config, self.dtype)
        runner = GraphRunner(model)
        held = (t for t in (*model.parameters(), *model.buffers()) if not t.is_meta)
        tensors = {t.data_ptr(): t.nbytes for t in held}
        kv_cache = self.streams * runner.cache_size.nbytes(self.context)
        largest = max(layer.params_per_expert for layer in self.spec.per_layer)
        scratch = runner.scratch_bytes(self.context, self.streams, largest)
        budget = self._budget(sum(tensors.values()), kv_cache, scratch)
        cache = self._cache(budget, stack)
        view = MoEView(model)
        runner.attach(ExpertBackend(model, self.store.layers, cache))
        for watcher in self._watchers(cache, budget, lambda: gates_of(view)):
            runner.attach(view.observe(watcher.seam))
        return runner, budget, cache

    # -- the native runner --

    def native(self, stack: ExitStack) -> tuple[Runner, Budget, ExpertCache]:
        """The common shapes in native code."""
        encoder = self.request.resident_codec
        stored = self.dtype or config_dtype(self.config)
        runner = NativeRunner(
            self.store,
            experts=_NoExperts(self.sizes.shape),
            codec=None if encoder is None else make_codec(encoder),
            dtype=self.dtype,
            kv_dtype=torch.bfloat16 if stored == torch.bfloat16 else None,
            threads=self.request.threads,
            # A token needs one row, whose read is short beside those of its experts.
            embedding_on_disk=self._experts_stay_on_disk(),
        )
        stack.callback(runner.close)
        kv_cache = self.streams * runner.kv_bytes_per_token * self.context
        vocabulary = self.config.get_text_config(decoder=True).vocab_size
        scratch = runner.scratch_bytes + 12 * vocabulary * self.streams
        budget = self._budget(runner.resident_bytes, kv_cache, scratch)
        cache = self._cache(budget, stack)
        runner.experts = cache
        self._make_lossy(runner, budget, stack)
        told = self._watchers(cache, budget, lambda: native_gates(runner, self.spec))
        if told:
            runner.observer = in_turn([watcher.routed for watcher in told])
        elif budget.complete and self.request.prefetch:
            # Whole steps in one call need every expert in memory, also those never chosen.
            runner.observer = Filling(cache, lambda: setattr(runner, "observer", None)).routed
        return runner, budget, cache

    def _make_lossy(self, runner: NativeRunner, budget: Budget, stack: ExitStack) -> None:
        """What changes results, where it was asked for."""
        sharing, rule = self.request.sharing, self.request.fallback
        if sharing is not None:
            runner.share_experts(sharing)
            self.notes.append("sequences that decode together share experts: lossy")
        if rule is not None and not budget.complete:
            nbytes = int(rule.share * budget.expert_cache)
            runner.low_bit = LowBitExperts(self.store, nbytes, rule, runner.shape)
            self.low_bit = stack.enter_context(runner.low_bit.cache)
            self.notes.append(
                f"missing experts of router weight up to {rule.max_weight:g} run from "
                f"{rule.planes} bit plane(s): lossy"
            )

    def _watchers(
        self, cache: ExpertCache, budget: Budget, gates: Callable[[], list[Gate]]
    ) -> list[RecentScores | Prefetching]:
        if budget.complete:
            return []
        predictor = self.request.predictor if self.request.prefetch else None
        return watchers(cache, self.spec, gates, predictor, self.trace, self.notes.append)


class _NoExperts:
    """Stands for the cache until it is known how large that may be."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.table = np.zeros(shape, dtype=np.uint64)

    def begin(
        self, layer: int, experts: ArrayLike, *, tokens: int = 1, counts: ArrayLike | None = None
    ) -> Claim:
        raise ValueError("a step before the expert cache is there")


def _generation_config(directory: Path, config: PretrainedConfig) -> GenerationConfig:
    if (directory / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(directory)
    return GenerationConfig.from_model_config(config)
