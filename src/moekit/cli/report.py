"""`moekit report`."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli.common import (
    Dtype,
    DtypeOption,
    JsonOption,
    SeedOption,
    ThreadsOption,
    check_out,
    note,
    open_model,
    output,
    progress,
    write_page,
)
from moekit.core.errors import UserError

if TYPE_CHECKING:
    from moekit.report import Facts, Subject

# Large batches, since every batch runs every expert; but logits of a batch stay below this.
LARGEST_BATCH, LOGITS_BYTES = 64, 512 * 2**20
# Short enough for a few sequences of each domain, which tests against chance need.
SEQ_LEN = 256
QUALITY_BYTES = 4096


def report(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL|TRACE|RUN...",
            help="A model; or what was recorded of one: a trace, stats, an analysis, a training "
            "run, its probes. Parts of one model may follow one another. The second of a kind "
            "begins a second model, and the report compares the two.",
            show_default=False,
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            metavar="DATA",
            help='Text to run the models on: JSONL with "text", plain text, directories of both, '
            "or -; repeatable. The domain is the file name up to its first dot.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="HTML file to write; must not exist. Without it the summary is printed alone.",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Your memory, as 14GB: forecast how the model would run in it."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of --data to read, an equal share of each domain.")
    ] = 2**15,
    dtype: DtypeOption = Dtype.auto,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Make a page about what a model's experts do.

    One HTML file that needs no network: load, domains and languages, flow between layers, cache
    curves, super experts, similar experts, pruning, text by expert, training. With --data the model
    is traced and profiled first. The conclusions are printed too.
    """
    with output(as_json) as printed:
        start = time.perf_counter()
        if out is not None:
            if out.suffix.lower() not in {".html", ".htm"}:
                raise UserError(f"--out {out}: the report is one HTML file, such as {out}.html")
            check_out(out)
        from moekit.core.memory import bytes_of

        limit = None if memory is None else bytes_of(memory)
        from moekit.report import print_summary, read_subjects, render
        from moekit.report.comparison import changes
        from moekit.report.conclusions import conclusions, summary_line
        from moekit.report.document import plotly_bundle

        if out is not None:
            # Before any model runs: a missing package is no reason to wait first.
            plotly_bundle()
        subjects = read_subjects(sources)
        _check(subjects, data)
        say = (lambda line: None) if as_json else note
        every = [
            _facts(subject, data, limit, max_tokens, dtype, threads, seed, say)
            for subject in subjects
        ]
        if out is not None:
            write_page(out, render(every))
        if not as_json:
            print_summary(every)
            if out is not None:
                printed.line(f"{out}: {out.stat().st_size / 1e6:.1f} MB, opens without network")
        printed.result(
            {
                "out": None if out is None else str(out),
                "models": [
                    {
                        "name": facts.name,
                        "summary": summary_line(facts),
                        "tokens": facts.tokens,
                        "domains": facts.usage.domains,
                        "conclusions": [asdict(c) for c in conclusions(facts)],
                        "bits_per_byte": facts.bits_per_byte,
                        "missing": facts.missing,
                    }
                    for facts in every
                ],
                "changes": [asdict(c) for c in changes(*every)] if len(every) == 2 else [],
                "seconds": round(time.perf_counter() - start, 3),
            }
        )


def _check(subjects: list[Subject], data: list[str] | None) -> None:
    for subject in subjects:
        if data and subject.source is None:
            raise UserError(f"--data needs a model to run, and {subject.name} is none")
        if data and (subject.traces or subject.stats is not None):
            raise UserError(
                f"{subject.name}: --data would trace it again; leave --data or the trace away"
            )


def _facts(
    subject: Subject,
    data: list[str] | None,
    memory: int | None,
    max_tokens: int,
    dtype: Dtype,
    threads: int | None,
    seed: int,
    say: Any,
) -> Facts:
    from moekit.report import gather

    options: dict[str, Any] = {"memory": memory, "seed": seed, "say": lambda m: say(f"{m} ...")}
    if subject.source is None:
        if memory is not None:
            raise UserError(f"--memory needs the model, and {subject.name} is none: name it too")
        return gather(subject, **options)
    if data:
        options |= _run(subject, data, max_tokens, dtype, threads, seed)
    else:
        options |= _described(subject.source)
    return gather(subject, **options)


def _described(source: str) -> dict[str, Any]:
    """What a model's small files say: its spec and its tokenizer."""
    from moekit.core.load import find_config, load_tokenizer, local_directory
    from moekit.core.spec import MoESpec

    spec = MoESpec.from_dir(find_config(source))
    return {"spec": spec, "tokenizer": load_tokenizer(local_directory(source))}


def _run(
    subject: Subject,
    data: list[str],
    max_tokens: int,
    dtype: Dtype,
    threads: int | None,
    seed: int,
) -> dict[str, Any]:
    """Trace and profile the model in one pass, and measure its loss on some of the text."""
    from moekit.evaluate.sequences import sequence_length, sequences
    from moekit.evaluate.text import read_texts

    assert subject.source is not None
    texts = read_texts(data)
    loaded = open_model(subject.source, dtype, seed, threads)
    from moekit.core.collect import pad_batches
    from moekit.core.trace_writer import TraceWriter
    from moekit.core.view import MoEView
    from moekit.evaluate.bits_per_byte import bits_per_byte
    from moekit.profile import profile

    config = loaded.model.config
    if config.is_encoder_decoder:
        raise UserError(
            f"{config.model_type} is an encoder-decoder, which text alone does not drive; "
            "give a trace of it"
        )
    length = min(SEQ_LEN, sequence_length(config, None))
    samples = list(sequences(loaded.tokenizer, texts, length, max_tokens))
    writer = TraceWriter()
    view = MoEView(loaded.model)
    size = LOGITS_BYTES // (4 * length * max(loaded.spec.vocab_size, 1))
    batches = list(pad_batches(samples, min(max(size, 1), LARGEST_BATCH)))
    with progress("trace and profile", "batches") as update:
        subject.stats = profile(view, batches, sinks=[writer], progress=update)
    subject.traces = [writer.trace]
    with progress("loss", "windows") as update:
        loss = bits_per_byte(
            loaded.model,
            loaded.tokenizer,
            texts,
            context=length,
            stride=max(1, length // 2),
            max_bytes_per_domain=QUALITY_BYTES,
            progress=update,
        )
    return {
        "view": view,
        "spec": loaded.spec,
        "tokenizer": loaded.tokenizer,
        "bits_per_byte": {name: domain.bpb for name, domain in loss.per_domain.items()},
    }
