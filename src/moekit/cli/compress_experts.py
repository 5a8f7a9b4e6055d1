"""`moekit compress compressed-experts`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli.common import (
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    OutOption,
    Output,
    SeedOption,
    ThreadsOption,
    check_out,
    open_model,
    output,
    progress,
)
from moekit.cli.compress_options import BatchSizeOption, EvalOption, SeqLenOption

if TYPE_CHECKING:
    from moekit.compress.condense.compressed_experts import CompressedExperts
    from moekit.core.load import LoadedModel
    from moekit.evaluate.quality import Quality


def compressed_experts(
    model: ModelArgument,
    out: OutOption,
    auxiliary: Annotated[
        int, typer.Option(min=1, help="Choices of a token that become vectors; the rest still run.")
    ],
    data: Annotated[
        list[str],
        typer.Option("--data", help="Text to fit them to, as in moekit profile; repeatable."),
    ],
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Read so many tokens, an equal share from each domain.")
    ] = 65_536,
    passes: Annotated[int, typer.Option(min=1, help="Passes over the text.")] = 1,
    learning_rate: Annotated[float, typer.Option("--lr", help="Falls to 0 by a cosine.")] = 1e-2,
    seq_len: SeqLenOption = None,
    batch_size: BatchSizeOption = 8,
    evaluate: EvalOption = None,
    dtype: DtypeOption = Dtype.float32,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Run fewer experts a token, modulated by vectors.

    A token's last choices become vectors that modulate its first. The model stays as it is. OUT is
    a small file of vectors, which the skipping method compressed-experts puts on a loaded model
    (`moekit show compressed-experts`). --eval measures the model whole, with its main experts
    alone, and with the vectors.
    """
    with output(as_json) as printed:
        check_out(out)
        from moekit.compress.calibrate import Calibration, batches_for
        from moekit.compress.condense.compressed_experts import (
            CompressedExperts,
            train_compressed_experts,
        )
        from moekit.core.view import MoEView
        from moekit.evaluate.text import read_texts

        samples = read_texts(evaluate) if evaluate else []
        loaded = open_model(model, dtype, seed, threads)
        view = MoEView(loaded.model)
        untrained = CompressedExperts(view, auxiliary)
        calibration = Calibration(None, tuple(data), max_tokens, seq_len, batch_size, seed)
        batches = batches_for(loaded, calibration)
        with progress("train", "batches") as advance:
            made, losses = train_compressed_experts(
                view,
                batches,
                auxiliary,
                learning_rate=learning_rate,
                passes=passes,
                progress=advance,
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        made.save(out)
        printed.line(f"wrote {out}: loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
        found = _measured(printed, loaded, samples, untrained, made) if samples else {}
        printed.result(
            {"out": str(out), "losses": losses, "data": calibration.to_dict(), "quality": found}
        )


def _measured(
    printed: Output,
    loaded: LoadedModel,
    samples: list[Any],
    untrained: CompressedExperts,
    made: CompressedExperts,
) -> dict[str, Any]:
    """Bits per byte of the model whole, with its main experts alone, and with the vectors."""
    from moekit.evaluate.quality import measure_quality

    cases: dict[str, AbstractContextManager[None]] = {
        "all experts": nullcontext(),
        "main experts": untrained.active(),
        "compressed experts": made.active(),
    }
    found: dict[str, Quality] = {}
    for name, context in cases.items():
        with context:
            found[name] = measure_quality(loaded.model, loaded.tokenizer, samples)
    rows = [(name, f"{quality.mean:.4f}") for name, quality in found.items()]
    printed.table(rows, header=("", "bits per byte, mean"))
    return {name: quality.to_dict() for name, quality in found.items()}
