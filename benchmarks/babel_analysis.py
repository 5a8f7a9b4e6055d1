"""What babel's routing shows of what papers report of large models, each claim with its rule.

    python benchmarks/babel_analysis.py --data DATA --parallel PAIRS

DATA is the folder that babel was trained on (DOMAIN.valid.jsonl), PAIRS a folder of parallel
sentences in files XXX-eng.XXX and XXX-eng.eng, line by line. Writes
benchmarks/results/babel_analysis.json; `python benchmarks/render.py` turns it into docs/results.md.

The claims and the rules that decide them are in `babel_claims.py`.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from babel_claims import (
    PERMUTATIONS,
    cache_size,
    language_separation,
    phases,
    predictability,
    rows_of,
    super_presence,
    token_dependence,
)

import moekit
from moekit.analyze.causal_importance import causal_importance
from moekit.analyze.coupling import coupling
from moekit.analyze.language_divergence import language_divergence
from moekit.analyze.losses import token_losses
from moekit.analyze.redundancy import redundancy
from moekit.analyze.specialisation import specialisation
from moekit.core.collect import collect, pad_batches
from moekit.core.load import resolve_model
from moekit.core.record import start_record
from moekit.core.trace import RoutingTrace
from moekit.core.trace_writer import TraceWriter
from moekit.core.view import MoEView
from moekit.train.data import read_domains

RESULT = Path(__file__).parent / "results" / "babel_analysis.json"
# The languages of the training text, by the names of the parallel files.
TRAINED = {"deu", "fra", "jpn", "por", "spa"}


def trace_of(view: MoEView, samples: list[tuple[list[int], str]]) -> RoutingTrace:
    writer = TraceWriter()
    collect(view, pad_batches(samples, 8), [writer])
    return writer.trace


def documents(
    texts: dict[str, list[str]], tokenizer: Any, count: int, length: int
) -> list[tuple[list[int], str]]:
    """The beginnings of documents: one piece each, since pieces of one are not independent."""
    samples = []
    for domain, own in sorted(texts.items()):
        for number in range(min(count, len(own))):
            text = own[number * len(own) // min(count, len(own))]
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            samples.append(([tokenizer.eos_token_id, *ids[: length - 1]], domain))
    return samples


def restricted(trace: RoutingTrace, view: MoEView, domains: list[str]) -> RoutingTrace:
    """The samples of these domains, run again, which is quicker than cutting the trace."""
    tokens = trace.tokens
    return trace_of(
        view,
        [
            (tokens[s.start : s.stop].tolist(), s.domain)
            for s in trace.samples
            if s.domain in domains
        ],
    )


def relabelled(trace: RoutingTrace, names: dict[str, str]) -> RoutingTrace:
    """The trace with its domains joined under other names."""
    domains = list(dict.fromkeys(names[name] for name in trace.domains))
    numbers = [domains.index(names[name]) for name in trace.domains]
    samples = [numbers[number] for number in trace.header.sample_domains]
    header = replace(trace.header, domains=domains, sample_domains=samples)
    return RoutingTrace(header, trace.chunks)


# -- who serves what --


def servants(trace: RoutingTrace) -> dict[str, Any]:
    """Mutual information by layer, and the strongest significant expert of every domain."""
    found = specialisation(trace, permutations=PERMUTATIONS)
    strongest: dict[str, dict[str, Any]] = {}
    for layer, pairs in zip(trace.layers, found.detail["specialists"], strict=True):
        for pair in pairs:
            held = strongest.get(pair["domain"])
            if held is None or pair["npmi"] > held["npmi"]:
                strongest[pair["domain"]] = {"layer": layer.index, **pair}
    return {
        "tokens": len(trace),
        "documents": len(trace.samples),
        "domains": trace.domains,
        "layers": rows_of(found),
        "strongest": strongest,
        "specialists": [len(pairs) for pairs in found.detail["specialists"]],
    }


def parallel_divergence(
    view: MoEView, tokenizer: Any, folder: Path, count: int
) -> dict[str, dict[str, Any]]:
    """By language: divergence from English by layer, and extra bits a sentence over English."""
    found = {}
    for path in sorted(folder.glob("*-eng.eng")):
        language = path.name.split("-")[0]
        lines = {
            name: (folder / f"{language}-eng.{name}").read_text(encoding="utf-8").splitlines()
            for name in ("eng", language)
        }
        samples = [
            (
                [
                    tokenizer.eos_token_id,
                    *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
                ],
                name,
            )
            for name, own in lines.items()
            for text in own[:count]
        ]
        trace = trace_of(view, samples)
        divergence = language_divergence(trace, reference="eng", permutations=200, min_tokens=100)
        bits = dict.fromkeys(lines, 0.0)
        part = [s for n, s in enumerate(samples) if n % count < count // 2]
        for losses, (_, name) in zip(token_losses(view, part), part, strict=True):
            bits[name] += float(losses.sum()) / np.log(2) / (count // 2)
        found[language] = {
            "trained": language in TRAINED,
            "divergence": divergence.column(language),
            "largest_p": max(divergence.column("largest p")),
            "extra_bits": bits[language] - bits["eng"],
        }
    return found


# -- further facts --


def ablations(trace: RoutingTrace, view: MoEView, tokens: int, experts: int) -> dict[str, Any]:
    layers = causal_importance(trace, view, what="layers", max_tokens=tokens)
    single = causal_importance(
        trace, view, what="experts", max_tokens=tokens, budget=experts * (tokens + 1)
    )
    return {
        "tokens": layers.summary["tokens"],
        "loss": layers.summary["loss"],
        "layers": rows_of(layers),
        "experts": rows_of(single),
        "experts_ablated": single.summary["ablations"],
        "experts_that_matter": single.summary["harmful"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--parallel", type=Path, required=True)
    parser.add_argument("--model", default="babel")
    parser.add_argument("--documents", type=int, default=10, help="documents a domain")
    parser.add_argument("--length", type=int, default=320, help="tokens of a document")
    parser.add_argument("--sentences", type=int, default=80, help="sentences a language")
    parser.add_argument("--ablated", type=int, default=24, help="experts to ablate")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    options = {
        name: getattr(arguments, name) for name in ("documents", "length", "sentences", "ablated")
    }
    record = start_record("benchmarks/babel_analysis.py", options, seed=0)
    loaded = moekit.load(arguments.model, dtype="float32")
    view = MoEView(loaded.model)
    valid = read_domains(arguments.data, "*.valid.jsonl")
    samples = documents(valid, loaded.tokenizer, arguments.documents, arguments.length)
    trace = trace_of(view, samples)
    languages = {name: name.rpartition("-")[2] for name in trace.domains}
    book = [name for name in trace.domains if name.startswith("tech-")]
    english = [name for name, language in languages.items() if language == "en"]
    serving = {
        "domain": servants(trace),
        "language": servants(relabelled(trace, languages)),
        "language, one book": servants(restricted(trace, view, book)),
        "domain, English": servants(restricted(trace, view, english)),
    }
    parallel = parallel_divergence(view, loaded.tokenizer, arguments.parallel, arguments.sentences)
    twins = redundancy(trace, view)
    coupled = coupling(view)
    claims = {
        **language_separation(parallel),
        **token_dependence(trace),
        **cache_size(trace),
        **predictability(trace, view),
        **phases(Path(resolve_model(arguments.model)) / "training"),
        **super_presence(trace, view),
    }
    record.finish(
        {
            "claims": claims,
            "serving": serving,
            "languages": parallel,
            "ablations": ablations(trace, view, 2048, arguments.ablated),
            "redundancy": {**twins.summary, "layers": rows_of(twins)},
            "coupling": {**coupled.summary, "layers": rows_of(coupled)},
        }
    )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(record.to_json())


if __name__ == "__main__":
    main()
