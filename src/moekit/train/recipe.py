"""The settings of a training run, read from YAML and checked before anything is allocated."""

import contextlib
import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from moekit.core.errors import UserError

TRACKERS = ("tensorboard", "trackio")
# What `train.freeze` may name; `freeze.parts_of` says which parameters they are.
PARTS = ("routers", "experts", "shared", "attention", "embeddings", "norms")


@dataclass(frozen=True)
class DataRecipe:
    """Which files, and how often each domain is seen: `weights`, or tokens ** `exponent`."""

    train: str = "*.train.jsonl"
    valid: str = "*.valid.jsonl"
    weights: dict[str, float] | None = None
    exponent: float = 0.7


@dataclass(frozen=True)
class TokenizerRecipe:
    """A new byte-level BPE of `vocab_size` entries, or an existing one at `path`."""

    vocab_size: int = 8192
    bytes_per_domain: int = 1_300_000
    path: str | None = None


@dataclass(frozen=True)
class OptimRecipe:
    """AdamW for every parameter, or Muon for weight matrices and AdamW for the rest.

    `lr` is AdamW's, `embedding_lr` that of the token embedding and `muon_lr` Muon's. The rate
    rises over `warmup_steps`, stays, and falls linearly to `final_lr` (a fraction) over the last
    `decay` fraction of the run.
    """

    name: str = "adamw"
    lr: float = 2e-3
    embedding_lr: float = 4e-3
    muon_lr: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup_steps: int = 100
    decay: float = 0.4
    final_lr: float = 0.02


@dataclass(frozen=True)
class BalanceRecipe:
    """How the router is kept balanced.

    `rule`: "family" (what the family itself does), "loss", "bias" or "none". `coefficient` scales
    the balance loss, whose loads are counted over `scope` (sequence, micro, step or global),
    `z_loss` the squared log-sum-exp of the router logits, `bias_rate` the step of the loss-free
    bias (DeepSeek-V3, arXiv 2412.19437). `losses` lists any others, each by `name` and `weight`,
    with its `scope`, the `begin`, `end` and `last` of its schedule, and its own options.
    """

    rule: str = "family"
    coefficient: float | None = None
    scope: str = "micro"
    losses: list[dict[str, Any]] = field(default_factory=list)
    z_loss: float = 0.0
    bias_rate: float = 1e-3


@dataclass(frozen=True)
class DistillRecipe:
    """A `teacher` (a model directory) whose distribution is learnt with `weight` beside the text.

    At `temperature`, and until the fraction `end` of the run.
    """

    teacher: str | None = None
    weight: float = 1.0
    temperature: float = 1.0
    end: float = 1.0


@dataclass(frozen=True)
class TrainRecipe:
    """Length and pace of the run, in tokens, windows and steps.

    `batch_windows` windows of `seq_len` tokens make an optimiser step over all processes;
    `micro_windows` of them go through the model at a time. With `recompute` only the layers' inputs
    are kept for the backward pass, which computes the rest again; with `shard` every process keeps
    its slice of parameters, gradients and optimiser state (FSDP2). `freeze` names `PARTS` that do
    not learn, and from the fraction `freeze_routers_at` of the run on routers do not either. With
    `consistency` every micro-batch runs twice and the divergence of the passes, in which a random
    router chooses differently, counts so much in the loss (THOR, arXiv 2110.04260). Probes hold the
    router logits too with `probe_logits`: 2 bytes a token, MoE layer and expert. Evaluations and
    probes see `eval_context` tokens, or as many as a window, at most 512.
    """

    tokens: int = 1_000_000
    seq_len: int = 512
    batch_windows: int = 16
    micro_windows: int = 8
    seed: int = 0
    precision: str = "bf16"
    attention: str = "sdpa"
    experts: str = "grouped"
    compile: bool = False
    recompute: bool = False
    shard: bool = False
    freeze: tuple[str, ...] = ()
    freeze_routers_at: float = 1.0
    consistency: float = 0.0
    init_std: float | None = None
    zero_output: bool = True
    log_every: int = 10
    report_to: tuple[str, ...] = ()
    eval_every: int = 500
    eval_bytes: int = 20_000
    checkpoint_every: int = 200
    probe_at: tuple[int, ...] = ()
    probe_bytes: int = 4_000
    probe_logits: bool = True
    eval_context: int | None = None

    @property
    def context(self) -> int:
        """Tokens of context in evaluations and probes."""
        return self.eval_context or min(512, self.seq_len)


@dataclass(frozen=True)
class Recipe:
    """One training run.

    `model` holds a transformers config's arguments and its `model_type`, or the `path` of a model
    to start from and arguments to change.
    """

    name: str
    model: dict[str, Any]
    data: DataRecipe = field(default_factory=DataRecipe)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    balance: BalanceRecipe = field(default_factory=BalanceRecipe)
    distill: DistillRecipe = field(default_factory=DistillRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)

    @property
    def steps(self) -> int:
        """Optimiser steps: the tokens asked for, rounded up to whole steps."""
        return -(-self.train.tokens // (self.train.batch_windows * self.train.seq_len))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_CHOICES = {
    ("optim", "name"): ("adamw", "muon"),
    ("balance", "rule"): ("family", "loss", "bias", "none"),
    ("train", "precision"): ("bf16", "fp32"),
    ("train", "attention"): ("sdpa", "blocked", "eager"),
    ("train", "experts"): ("grouped", "grouped_mm", "eager"),
}


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in YAML file `path`, with `section.key=value` overrides applied.

    Raises UserError naming the field for anything unknown, of the wrong type or out of range.
    """
    import yaml

    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"recipe {path}: expected a mapping with name, model, data, train, ...")
    for override in overrides or []:
        key, separator, value = override.partition("=")
        if not separator:
            raise UserError(f"--set {override}: write it as section.key=value.")
        target = raw
        *parents, last = key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise UserError(f"--set {override}: '{parent}' is not a section.")
        try:
            target[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(
                f"--set {override}: the value is not valid YAML; put quotes around a text."
            ) from error
    return recipe_from_dict(raw)


def recipe_from_dict(raw: dict[str, Any]) -> Recipe:
    """A checked `Recipe` from plain data."""
    recipe = _build(Recipe, raw, "")
    for (section, name), choices in _CHOICES.items():
        value = getattr(getattr(recipe, section), name)
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, 1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise UserError(f"{section}.{name} is '{value}', not one of {choices}.{hint}")
    train, optim = recipe.train, recipe.optim
    for name in ("tokens", "seq_len", "batch_windows", "micro_windows", "log_every"):
        if getattr(train, name) < 1:
            raise UserError(f"train.{name} is {getattr(train, name)}; it must be at least 1.")
    if train.batch_windows % train.micro_windows:
        raise UserError(
            f"train.batch_windows {train.batch_windows} is not a multiple of "
            f"train.micro_windows {train.micro_windows}."
        )
    if not 0 <= optim.decay <= 1:
        raise UserError(f"optim.decay is {optim.decay}; it is a fraction between 0 and 1.")
    if recipe.balance.losses or recipe.balance.scope != "micro":
        _check_losses(recipe.balance)
    if "model_type" not in recipe.model and "path" not in recipe.model:
        raise UserError(
            "model.model_type is missing; name a family such as qwen3_moe or moekit, or give the "
            "path of a model to start from."
        )
    if "model_type" in recipe.model and "path" in recipe.model:
        raise UserError("model has both model_type and path; leave one of them out.")
    _check_parts(train)
    if train.shard and optim.name != "adamw":
        raise UserError(
            f"train.shard cuts weight matrices, which optim.name {optim.name} needs whole; "
            "use adamw."
        )
    limit = recipe.model.get("max_position_embeddings")
    for name, value in (("seq_len", train.seq_len), ("eval_context", train.context)):
        if limit is not None and value > limit:
            raise UserError(f"train.{name} {value} exceeds model.max_position_embeddings {limit}.")
    if train.context < 2:
        raise UserError(f"train.eval_context is {train.context}; it must be at least 2.")
    if "path" in recipe.model and recipe.tokenizer.path is None:
        own = dataclasses.replace(recipe.tokenizer, path=str(recipe.model["path"]))
        recipe = dataclasses.replace(recipe, tokenizer=own)
    return recipe


def _check_parts(train: TrainRecipe) -> None:
    for field_name, known in (("freeze", PARTS), ("report_to", TRACKERS)):
        for part in getattr(train, field_name):
            if part not in known:
                near = difflib.get_close_matches(part, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
                raise UserError(f"train.{field_name} names {part!r}: {hint}")
    if not 0 <= train.freeze_routers_at <= 1:
        raise UserError(
            f"train.freeze_routers_at is {train.freeze_routers_at}; it is a fraction of the run."
        )
    if train.consistency < 0:
        raise UserError(f"train.consistency is {train.consistency}; it is a weight, 0 or more.")


def _check_losses(balance: BalanceRecipe) -> None:
    """UserError for a loss that does not exist or has other options; needs torch."""
    from .balance import balance_loss_of

    for entry in balance.losses:
        balance_loss_of(entry)
    balance_loss_of({"name": "balance-loss", "weight": 0.0, "scope": balance.scope})


def _build(cls, raw: Any, path: str):
    if not isinstance(raw, dict):
        raise UserError(f"{path or 'recipe'}: expected a section, got {raw!r}.")
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for key in raw:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1)
            hint = f" Did you mean '{near[0]}'?" if near else f" Known: {sorted(fields)}."
            raise UserError(f"unknown field '{path}{key}'.{hint}")
    values: dict[str, Any] = {}
    for name, item in fields.items():
        if name not in raw:
            if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
                raise UserError(f"the recipe lacks '{path}{name}'.")
            continue
        value = raw[name]
        if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            values[name] = _build(item.type, value or {}, f"{path}{name}.")
        else:
            values[name] = _cast(value, item.type, f"{path}{name}")
    return cls(**values)


def _cast(value: Any, kind: Any, path: str) -> Any:
    if isinstance(kind, UnionType):
        if value is None:
            return None
        kind = next(part for part in get_args(kind) if part is not type(None))
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-3 as a string; nobody means one.
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind in (str, bool) and isinstance(value, kind):
        return value
    if kind == tuple[int, ...] and isinstance(value, (list, tuple)):
        return tuple(int(part) for part in value)
    if kind == tuple[str, ...] and isinstance(value, (list, tuple)):
        return tuple(str(part) for part in value)
    if kind == list[dict[str, Any]]:
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise UserError(f"{path} is {value!r}; expected a list of mappings.")
        return value
    wrong = get_origin(kind) is dict and not isinstance(value, dict)
    if wrong or kind in (float, int, str, bool, tuple[int, ...], tuple[str, ...]):
        raise UserError(f"{path} is {value!r}; expected {getattr(kind, '__name__', kind)}.")
    return value
