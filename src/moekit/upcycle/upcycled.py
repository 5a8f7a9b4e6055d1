"""Results that no stock class holds: the config and the tensor names they share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from moekit.core.deferred import Deferred
from moekit.core.errors import UserError
from moekit.core.source_model import SourceModel
from moekit.upcycle.converter import Job
from moekit.upcycle.model import UpcycledConfig

PREFIX = "base."
LOADS_HERE = (
    "No class of transformers holds it: it loads through moekit (moekit eval, moekit.load, or "
    "AutoModelForCausalLM after `import moekit.upcycle.model`)."
)


def config_of(
    source: SourceModel,
    kind: str,
    bank: PretrainedConfig | None = None,
    **options: Any,
) -> UpcycledConfig:
    """The config of the dense model `source` with a part of that kind, and its bank, in it."""
    return UpcycledConfig(
        text_config=source.config, experts_config=bank, part={"kind": kind, **options}
    )


def below_base(tensors: Mapping[str, Deferred], without: Iterable[str] = ()) -> dict[str, Deferred]:
    """A dense model's tensors by the names they have in the upcycled one.

    Those of the modules at the paths `without` are left out.
    """
    left_out = tuple(f"{path}." for path in without)
    return {
        PREFIX + name: tensor for name, tensor in tensors.items() if not name.startswith(left_out)
    }


def names_of(job: Job) -> list[str]:
    """Short names of the experts given with --from; `UserError` where there is none."""
    if not job.others:
        raise UserError("this method joins models: give the others with --from.")
    return [Path(other.name).name for other in job.others]


def check_same_family(job: Job) -> None:
    """Raise `UserError` where a model differs from the base in family, tensor names or shapes."""
    for other in job.others:
        if other.config.model_type != job.base.config.model_type:
            raise UserError(
                f"{other.name} is a {other.config.model_type} and {job.base.name} a "
                f"{job.base.config.model_type}; experts must be fine-tunes of one model."
            )
        for name, tensor in job.base.tensors.items():
            found = other.tensors.get(name)
            if found is None or found.shape != tensor.shape:
                told = "no such tensor" if found is None else f"shape {list(found.shape)}"
                raise UserError(
                    f"{name} has shape {list(tensor.shape)} in {job.base.name}, and {told} in "
                    f"{other.name}; experts must be fine-tunes of one model."
                )


def part_of(job: Job, kind: str, method: str) -> dict[str, Any]:
    """The part of the base model that `method` made; `UserError` for any other model."""
    job.need_alone()
    config = job.base.config
    part = config.part if isinstance(config, UpcycledConfig) else None
    if not part or part["kind"] != kind:
        raise UserError(f"{job.base.name} was not made by {method}.")
    return part
