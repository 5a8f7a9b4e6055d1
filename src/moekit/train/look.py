"""Looking at a model while it trains: loss by domain, and the routing of a fixed probe text."""

import json
from typing import Any

import torch

from moekit.core.collect import collect, pad_batches
from moekit.core.find import find_moe
from moekit.core.trace_writer import TraceWriter
from moekit.core.view import MoEView
from moekit.evaluate.bits_per_byte import bits_per_byte
from moekit.evaluate.text import Sample, limit_bytes_per_domain

from .run import Run


def evaluate(run: Run, max_bytes: int | None) -> dict[str, Any]:
    """Bits per byte on the validation text: the mean over domains, and by domain."""
    attention = run.model.config._attn_implementation
    # Evaluation pads, which the blocked attention of training cannot mask.
    run.model.set_attn_implementation("sdpa")
    precision = torch.bfloat16 if run.recipe.train.precision == "bf16" else None
    try:
        context = run.recipe.train.context
        score = bits_per_byte(
            run.model,
            run.tokenizer,
            run.valid,
            context=context,
            stride=context // 2,
            max_bytes_per_domain=max_bytes,
            autocast=precision,
        )
    finally:
        run.model.set_attn_implementation(attention)
    by_domain = {name: round(loss.bpb, 4) for name, loss in score.per_domain.items()}
    return {"mean": round(score.mean, 4), "by_domain": by_domain}


def final_evaluation(run: Run) -> dict[str, Any]:
    """`evaluate` on the whole validation text of a finished run.

    The result is kept in the run's folder, so that a crash after it does not cost it again.
    """
    if not run.valid:
        return {"mean": float("nan"), "by_domain": {}}
    kept = run.folder / "evaluation.json"
    if not kept.exists():
        run.say("measuring on the validation text")
        score = evaluate(run, None)
        kept.with_suffix(".new").write_text(json.dumps(score))
        kept.with_suffix(".new").rename(kept)
    return json.loads(kept.read_text())


def probe_text(run: Run) -> list[Sample]:
    """The probe: the leading bytes of every domain's validation text, the same at every step."""
    return limit_bytes_per_domain(run.valid, run.recipe.train.probe_bytes)


def write_probe(run: Run, step: int) -> None:
    """Trace the routing of the probe text in `probes/step-NNNNNN`; the main process only."""
    target = run.folder / "probes" / f"step-{step:06d}"
    if not run.world.is_main or not run.valid or not find_moe(run.model) or target.exists():
        return
    view = MoEView(run.model)
    target.parent.mkdir(exist_ok=True)
    end = run.tokenizer.eos_token_id
    samples = []
    for sample in probe_text(run):
        ids = [end, *run.tokenizer(sample.text, add_special_tokens=False)["input_ids"]]
        samples.append((ids[: run.recipe.train.context], sample.domain))
    attention = run.model.config._attn_implementation
    run.model.set_attn_implementation("sdpa")
    try:
        logits = run.recipe.train.probe_logits
        writer = TraceWriter(target, logits=logits, metadata={"step": step})
        collect(view, pad_batches(samples, 8, pad_id=end), [writer], logits=logits)
    finally:
        run.model.set_attn_implementation(attention)
