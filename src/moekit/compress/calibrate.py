"""The statistics a method decides by: opened, or collected from a text on the fly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.core.errors import UserError

if TYPE_CHECKING:
    from moekit.core.collect import Batch
    from moekit.core.load import LoadedModel
    from moekit.core.stats import ExpertStats

# One statistic that tells whether a set was collected.
MARK_OF_SET = {
    "default": "count",
    "diagonal": "input_sq",
    "full": "input_second",
    "outputs": "output_gram",
    "inputs": "sample_hidden",
    "fisher": "neuron_fisher",
}


@dataclass(frozen=True)
class Calibration:
    """Where statistics come from: the directory `stats`, or the texts `data`.

    `max_tokens` is shared equally among the domains of the texts, whose documents are drawn by
    `seed`; `seq_len` tokens are read at a time. `all_tokens` takes input moments over every token
    in every expert.
    """

    stats: Path | None = None
    data: tuple[str, ...] = ()
    max_tokens: int | None = None
    seq_len: int | None = None
    batch_size: int = 8
    seed: int = 0
    all_tokens: bool = False

    def __post_init__(self) -> None:
        if bool(self.stats) == bool(self.data):
            raise UserError("give either --stats, a directory of moekit profile, or --data, a text")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, for records."""
        plain = asdict(self)
        return {**plain, "stats": str(self.stats) if self.stats else None}


def stats_for(
    model: LoadedModel,
    calibration: Calibration,
    sets: Sequence[str] = ("default",),
    *,
    scratch: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ExpertStats:
    """The statistics of `sets` (see `moekit.profile.SETS`) for a loaded model.

    Raises `UserError` for stats of another model or without one of the sets, for a text in which
    there is nothing, and for a model without a tokenizer.
    """
    if calibration.stats is not None:
        return open_stats(calibration.stats, model.spec, sets)
    from moekit.core.view import MoEView
    from moekit.evaluate.sequences import sequence_length
    from moekit.profile import align_weights, profile

    batches = batches_for(model, calibration)
    align_weights(model.model)
    stats = profile(
        MoEView(model.model),
        batches,
        sets=sets,
        all_tokens=calibration.all_tokens,
        seed=calibration.seed,
        scratch=scratch,
        progress=progress,
    )
    length = sequence_length(model.model.config, calibration.seq_len)
    stats.metadata = {**calibration.to_dict(), "seq_len": length}
    return stats


def batches_for(model: LoadedModel, calibration: Calibration) -> list[Batch]:
    """The texts of a calibration as padded batches.

    Raises `UserError` for a text in which there is nothing, a model without a tokenizer, and a
    calibration that has statistics and no text.
    """
    from moekit.core.collect import pad_batches
    from moekit.evaluate.sequences import sequence_length, sequences
    from moekit.evaluate.text import read_texts, shuffled

    if not calibration.data:
        raise UserError("the method runs the model: give a text with --data, not --stats")
    if model.tokenizer is None:
        raise UserError("the model has no tokenizer, so it cannot read --data; give --stats")
    texts = read_texts(calibration.data)
    if calibration.max_tokens is not None:
        texts = shuffled(texts, calibration.seed)
    length = sequence_length(model.model.config, calibration.seq_len)
    samples = list(sequences(model.tokenizer, texts, length, calibration.max_tokens))
    return list(pad_batches(samples, calibration.batch_size))


def open_stats(path: Path, spec: Any, sets: Sequence[str]) -> ExpertStats:
    """Open stats and check that they are of the model of `spec` and hold `sets` (`UserError`)."""
    from moekit.core.stats import ExpertStats

    stats = ExpertStats.open(path)
    try:
        stats.validate(spec)
    except UserError as error:
        raise UserError(f"--stats {path}: {error}") from error
    for name in sets:
        mark = MARK_OF_SET[name]
        lacking = [at for at in range(len(stats.layers)) if not stats.has(at, mark)]
        if lacking:
            raise UserError(
                f"--stats {path} has no {mark!r} for {stats.layers[lacking[0]].name}: profile "
                f"again with --set {name}"
            )
    return stats
