"""`moekit run`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from moekit.cli.common import (
    DryRunOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    Output,
    SeedOption,
    ThreadsOption,
    note,
    open_model,
    output,
)
from moekit.cli.engine import (
    CodecOption,
    DeviceOption,
    ExpertCacheOption,
    GpuMemoryOption,
    LowBitOption,
    MaxContextOption,
    MemoryOption,
    PolicyOption,
    PredictorOption,
    PrefetchOption,
    ResidentCodecOption,
    RunnerName,
    RunnerOption,
    SchedulerOption,
    SlotsOption,
    TraceOption,
    engine_options,
    needs_engine,
)
from moekit.core.errors import UserError


def run(
    model: ModelArgument,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="The prompt; - or nothing reads standard input."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Use the model's chat template; by default if it has one."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens to generate; by default 128 or what the context holds."),
    ] = None,
    do_sample: Annotated[
        bool | None,
        typer.Option(
            "--do-sample/--no-do-sample",
            help="Draw tokens, or take the likeliest; by default as the model says, "
            "and --do-sample where a sampling option is given.",
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Divides the logits; above 0.", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens of this total."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Draw from the k likeliest tokens; 0 for all.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 makes tokens already used less likely.")
    ] = None,
    num_beams: Annotated[
        int | None, typer.Option(min=1, help="Beam search with so many beams; does not stream.")
    ] = None,
    memory: MemoryOption = None,
    expert_cache: ExpertCacheOption = None,
    codec: CodecOption = None,
    resident_codec: ResidentCodecOption = None,
    policy: PolicyOption = None,
    predictor: PredictorOption = None,
    prefetch: PrefetchOption = None,
    trace: TraceOption = None,
    slots_per_layer: SlotsOption = None,
    low_bit_fallback: LowBitOption = None,
    device: DeviceOption = None,
    gpu_memory: GpuMemoryOption = None,
    scheduler: SchedulerOption = None,
    max_context: MaxContextOption = None,
    runner: RunnerOption = RunnerName.auto,
    dtype: DtypeOption = Dtype.auto,
    threads: ThreadsOption = None,
    dry_run: DryRunOption = False,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Generate text from a prompt, or chat."""
    sampling = _sampling(do_sample, temperature, top_p, top_k, repetition_penalty, num_beams)
    options = engine_options(
        memory=memory,
        expert_cache=expert_cache,
        codec=codec,
        resident_codec=resident_codec,
        policy=policy,
        predictor=predictor,
        prefetch=prefetch,
        trace=trace,
        slots_per_layer=slots_per_layer,
        low_bit_fallback=low_bit_fallback,
        device=device,
        gpu_memory=gpu_memory,
        scheduler=scheduler,
        max_context=max_context,
        runner=runner,
    )
    with output(as_json) as out:
        if dry_run:
            from moekit.cli.run_engine import forecast

            forecast(model, options, threads, out)
            return
        text = _read_prompt(prompt, file, as_json)
        with _open(model, options, dtype, seed, threads, num_beams) as speaker:
            if text is None:
                _converse(speaker, chat, max_new_tokens, sampling)
            else:
                _answer(speaker, text, chat, max_new_tokens, sampling, out)


@contextmanager
def _open(
    model: str,
    options: dict[str, Any],
    dtype: Dtype,
    seed: int,
    threads: int | None,
    num_beams: int | None,
) -> Iterator[Any]:
    """What generates: an engine where one was asked for or the model is packed, else transformers,
    which also knows beams and encoders."""
    if needs_engine(model, options):
        from moekit.cli.run_engine import opened

        if num_beams is not None:
            raise UserError("--num-beams: an engine has no beam search; leave it out")
        with opened(model, options, dtype, seed, threads) as speaker:
            yield speaker
        return
    from moekit.runtime.generate import WholeModel

    loaded = open_model(model, dtype, seed, threads)
    yield WholeModel(loaded.model, loaded.tokenizer)


def _sampling(
    do_sample: bool | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    repetition_penalty: float | None,
    num_beams: int | None,
) -> dict[str, Any]:
    """The options that were given, checked before anything is loaded."""
    if temperature is not None and temperature <= 0:
        raise UserError(
            f"--temperature {temperature:g} must be above 0: for the likeliest token "
            "use --no-do-sample"
        )
    if repetition_penalty is not None and repetition_penalty <= 0:
        raise UserError(f"--repetition-penalty {repetition_penalty:g} must be above 0")
    drawing = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given = {name: value for name, value in drawing.items() if value is not None}
    if given and do_sample is False:
        name = next(iter(given)).replace("_", "-")
        raise UserError(f"--{name} has no effect with --no-do-sample: leave one of them out")
    if given:
        do_sample = True
    others = {
        "do_sample": do_sample,
        "repetition_penalty": repetition_penalty,
        "num_beams": num_beams,
    }
    return {**given, **{name: value for name, value in others.items() if value is not None}}


def _read_prompt(prompt: str | None, file: Path | None, as_json: bool) -> str | None:
    """The prompt, or None for a conversation on the terminal."""
    if file is not None:
        if prompt is not None:
            raise UserError("PROMPT and --file were both given: leave one of them out")
        return _utf8(file.read_bytes(), str(file)).removesuffix("\n")
    if prompt is not None and prompt != "-":
        # Bytes of the command line that were not UTF-8 arrive as lone surrogates.
        return _utf8(prompt.encode(errors="surrogateescape"), "PROMPT")
    if prompt is None and sys.stdin.isatty():
        if as_json:
            raise UserError("--json needs a prompt: an argument, --file, or standard input")
        return None
    return _utf8(sys.stdin.buffer.read(), "standard input").removesuffix("\n")


def _utf8(raw: bytes, name: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (byte {error.start})") from error


def _answer(
    speaker: Any,
    text: str,
    chat: bool | None,
    max_new_tokens: int | None,
    sampling: dict[str, Any],
    out: Output,
) -> None:
    from moekit.runtime.generate import encode_prompt

    encoded = encode_prompt(speaker.tokenizer, text, chat=chat)
    done = speaker.generate(
        encoded,
        max_new_tokens=max_new_tokens,
        on_text=None if out.as_json else _write,
        **sampling,
    )
    out.line()
    note(_speed(done))
    values = {"prompt": text, "new_tokens": len(done.token_ids), **asdict(done)}
    out.result({**values, **speaker.account()})


def _converse(
    speaker: Any, chat: bool | None, max_new_tokens: int | None, sampling: dict[str, Any]
) -> None:
    """Read lines from the terminal until its end; a chat model is given the whole conversation."""
    from moekit.runtime.generate import encode_prompt

    templated = chat or (chat is None and speaker.tokenizer.chat_template is not None)
    if templated:
        note("Ctrl-D ends the chat, an empty line starts a new one.")
    else:
        note("Each line is continued on its own, for the model has no chat template. Ctrl-D ends.")
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if not line:
            messages = []
            continue
        messages = [*messages, {"role": "user", "content": line}] if templated else []
        try:
            encoded = encode_prompt(speaker.tokenizer, messages or line, chat=templated)
            done = speaker.generate(
                encoded, max_new_tokens=max_new_tokens, on_text=_write, **sampling
            )
        except UserError as error:
            note(f"error: {error}\nan empty line starts anew")
            messages = messages[:-1]
            continue
        print()
        note(_speed(done))
        if templated:
            messages.append({"role": "assistant", "content": done.text})


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _speed(done: Any) -> str:
    prefill = f", prompt {done.prefill_seconds:.2f} s" if done.prefill_seconds is not None else ""
    return (
        f"[{done.prompt_tokens} + {len(done.token_ids)} tokens, "
        f"{done.tokens_per_second:.1f} tokens/s{prefill}]"
    )
