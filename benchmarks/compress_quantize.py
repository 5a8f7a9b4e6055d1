"""What fewer bits a weight cost babel: every quantizer at 8, 4, 3, 2 and fewer bits.

    python benchmarks/compress_quantize.py --data DATA [--work DIR]

DATA is the folder that babel was trained on: calibration text comes from DOMAIN.train.jsonl, three
draws of it, and what is reported from DOMAIN.valid.jsonl. Results are kept after every run, so that
the same command goes on after an interruption. Writes benchmarks/results/compress_quantize.json.
"""

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import moekit
from moekit.compress import Calibration, apply_live, rewrite_of, stats_for
from moekit.compress.quantize.allocation import step_down
from moekit.compress.quantize.block_error import rounding_errors
from moekit.compress.quantize.block_inputs import BlockInputs
from moekit.compress.quantize.planning import QuantizeRequest, plan_quantization
from moekit.core.codec_choice import codec_at
from moekit.core.packed import CodecChoice, ExpertParts
from moekit.core.plan import Action, ExpertPlan
from moekit.core.record import start_record
from moekit.core.rewrite import Rewrite
from moekit.core.stats import ExpertStats
from moekit.evaluate.quality import measure_quality
from moekit.evaluate.text import Sample, limit_bytes_per_domain, read_texts
from moekit.ops.codecs.ternary_rows import TernaryRowsCodec
from moekit.ops.pair_dictionary import encode_rows

RESULT = Path(__file__).parent / "results" / "compress_quantize.json"
SEEDS = (0, 1, 2)
SETS = ("default", "full", "inputs")
GROUP = 64
REACH = 0.5
UNIFORM = ("int4-zp", "int3-zp", "int2-zp")
MIXES = (2.5, 2.0, 1.57)
NO_SEED = -1
# What is run on every draw of the text before the others are run on one.
FIRST = (
    *("int4-zp rtn", "int3-zp rtn", "int2-zp rtn", "int2-zp rtn, ranges searched"),
    *("int3-zp gptq", "int2-zp gptq", "int2-zp gptq, ranges searched"),
    *("int4-zp gptq", "int3-zp awq", "int2-zp awq", "int3-zp eaquant"),
)


@dataclass(frozen=True)
class Case:
    """One row of the table: a request, or what `mixed` makes of its bits; `planes` of a nested
    codec, all where None."""

    name: str
    request: QuantizeRequest
    seeded: bool = True
    mixed: str = ""
    planes: int | None = None


def cases() -> Iterator[Case]:
    """In the order of what one would most like to know."""

    def asked(method: str, codec: str, **fields: Any) -> QuantizeRequest:
        return QuantizeRequest(method, CodecChoice(codec, GROUP), **fields)

    for codec in UNIFORM:
        yield Case(f"{codec} rtn", asked("rtn", codec), seeded=False)
        yield Case(f"{codec} rtn, ranges searched", asked("rtn", codec, reach=REACH), seeded=False)
        yield Case(f"{codec} gptq", asked("gptq", codec))
        yield Case(f"{codec} gptq, ranges searched", asked("gptq", codec, reach=REACH))
        yield Case(f"{codec} awq", asked("awq", codec))
        yield Case(f"{codec} eaquant", asked("eaquant", codec))
        yield Case(f"{codec} awq, then gptq", asked("awq", codec, solver="gptq"))
    mix = {"allocation": "mc-moe", "reach": REACH}
    for average in MIXES:
        request = asked("gptq", "int3-zp", bits_average=average, **mix)
        yield Case(f"{average:g} bits mc-moe", request)
        yield Case(f"{average:g} bits shuffled", request, mixed="shuffled")
    yield Case("int8 rtn", asked("rtn", "int8"), seeded=False)
    yield Case("int8 gptq", asked("gptq", "int8"))
    yield Case("ternary-rows rtn", asked("rtn", "ternary-rows"), seeded=False)
    yield Case("ternary-rows gptq", asked("gptq", "ternary-rows", damp=0.1))
    yield Case("ternary gptq", asked("gptq", "ternary"))
    yield Case("binary gptq", asked("gptq", "binary"))
    for planes in (3, 2, 1):
        request = asked("gptq", "nested4", block=GROUP)
        yield Case(f"nested4 gptq, {planes + 1} bits", request, planes=planes)
    yield Case("int4-zp eaquant, router 8 bits", asked("eaquant", "int4-zp", router_bits=8))
    yield Case("8, 4, 2 bits edgemoe, 1 %", asked("rtn", "int8"), mixed="edgemoe")


class Watched(Rewrite):
    """A rewrite whose experts are counted, and of whose planes only the first are used."""

    def __init__(self, inner: Any, planes: int | None) -> None:
        self.inner, self.planes = inner, planes
        self.identity, self.codec = inner.identity, inner.codec
        self.bytes = self.experts = self.coded = 0

    def expert(self, layer: int, expert: int, members: Any, read: Any) -> ExpertParts:
        made = self.inner.expert(layer, expert, members, read)
        matrices = {name: m.prefix(self.planes or 99) for name, m in made.matrices.items()}
        self.experts += 1
        self.bytes += sum(matrix.nbytes for matrix in matrices.values())
        if isinstance(made.codec, TernaryRowsCodec):
            for matrix in matrices.values():
                # Zero is digit 0 of the dictionary, and the codec's middle code.
                digits = torch.tensor([1, 0, 2])[made.codec.codes(matrix).long()]
                scales = 2 * matrix.shape[0] * 2
                self.coded += encode_rows(digits).nbytes + scales
        return ExpertParts(made.codec, matrices, made.vectors)


class Bench:
    """The model, its texts, and what they have given so far."""

    def __init__(self, data: Path, work: Path, tokens: int, bytes_per_domain: int) -> None:
        self.loaded = moekit.load("babel", "float32")
        self.view = moekit.MoEView(self.loaded.model)
        self.train = tuple(str(path) for path in sorted(data.glob("*.train.jsonl")))
        valid = read_texts(sorted(data.glob("*.valid.jsonl")))
        self.valid = limit_bytes_per_domain(valid, bytes_per_domain)
        self.work, self.tokens = work, tokens

    def stats(self, seed: int) -> ExpertStats:
        """Statistics of one draw of the training text, kept on disk."""
        path = self.work / f"stats-{seed}"
        if not path.exists():
            calibration = Calibration(data=self.train, max_tokens=self.tokens, seed=seed)
            stats_for(self.loaded, calibration, SETS).save(path)
        return ExpertStats.open(path)

    def quality(self, samples: list[Sample] | None = None) -> dict[str, Any]:
        found = measure_quality(
            self.loaded.model, self.loaded.tokenizer, samples or self.valid, stride=512
        )
        return found.to_dict()

    def run(self, case: Case, seed: int) -> dict[str, Any]:
        """Plan, apply and measure one case on one draw of the text."""
        start = time.perf_counter()
        stats = self.stats(max(seed, 0))
        spec = self.loaded.spec
        made = plan_quantization(case.request, spec, stats, self.view)
        plan = {"": lambda p: p, "shuffled": lambda p: shuffled(p, seed), "edgemoe": self.edgemoe}[
            case.mixed
        ](made.plan)
        rewrite = rewrite_of(plan, Path(), stats)
        watched = Watched(rewrite, case.planes)
        with apply_live(self.view, plan, watched, rewrite.codec):
            planned = time.perf_counter()
            quality = self.quality()
        bits = [action.bits or 0 for layer in plan.layers.values() for action in layer.values()]
        return {
            "quality": quality,
            "bytes_per_expert": watched.bytes / watched.experts,
            "coded_bytes_per_expert": watched.coded / watched.experts or None,
            "bits": sum(bits) / len(bits),
            "fallbacks": len(rewrite.fallbacks),
            "seconds": round(planned - start, 1),
        }

    def edgemoe(self, plan: ExpertPlan) -> ExpertPlan:
        """EdgeMoE's allocation over 8, 4 and 2 bits, its loss on the training text within 1 %.

        An expert's importance is the change of its block's output at 2 bits.
        """
        stats, kind = self.stats(0), CodecChoice("int8", GROUP)
        lowest = [codec_at(2, kind).make()]
        parts = []
        for position, layer in enumerate(self.view):
            inputs = BlockInputs.of(stats, position)
            parts.append(rounding_errors(layer, lowest, inputs)[:, 0])
        places = [(layer.index, e) for layer in self.view for e in range(layer.num_experts)]
        texts = limit_bytes_per_domain(read_texts(self.train), 600)

        def with_bits(bits: Any) -> ExpertPlan:
            layers: dict[int, dict[int, Action]] = {}
            for (layer, expert), width in zip(places, bits, strict=True):
                layers.setdefault(layer, {})[expert] = Action(bits=width)
            return dataclasses.replace(plan, layers=layers)

        def loss(bits: Any) -> float:
            candidate = with_bits(bits)
            rewrite = rewrite_of(candidate, Path(), stats)
            with apply_live(self.view, candidate, rewrite, kind):
                return float(self.quality(texts)["mean"])

        return with_bits(step_down(torch.cat(parts), (8, 4, 2), loss, 0.01).bits)


def shuffled(plan: ExpertPlan, seed: int) -> ExpertPlan:
    """The plan with the bits of each layer dealt to its experts at random."""
    source = random.Random(seed)
    layers = {}
    for index, actions in plan.layers.items():
        bits = [action.bits for action in actions.values()]
        source.shuffle(bits)
        layers[index] = {e: Action(bits=b) for e, b in zip(actions, bits, strict=True)}
    return dataclasses.replace(plan, layers=layers)


def fill(
    found: dict[str, Any],
    bench: Bench,
    save: Callable[[Mapping[str, Any]], None],
    seconds: float,
) -> None:
    """Run what `found` lacks, in the order of `FIRST`; stop after `seconds`."""
    begun = time.perf_counter()
    if "plain" not in found:
        found["plain"] = {"quality": bench.quality()}
        save(found)
    named = {case.name: case for case in cases()}
    first = [named[name] for name in FIRST]
    # Mixes take longest.
    rest = [case for case in named.values() if case not in first]
    rest.sort(key=lambda case: case.request.bits_average is not None or bool(case.mixed))
    order = [(case, seed) for group in (first, rest) for seed in SEEDS for case in group]
    for case, seed in order:
        runs = found["cases"].setdefault(case.name, {})
        key = str(seed if case.seeded else NO_SEED)
        if key in runs or (seed and case.mixed == "edgemoe"):
            continue
        if time.perf_counter() - begun > seconds:
            return
        runs[key] = bench.run(case, seed if case.seeded else NO_SEED)
        save(found)
        print(case.name, key, round(runs[key]["quality"]["mean"], 4), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="for statistics, between runs")
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration text, a draw")
    parser.add_argument("--bytes", type=int, default=2500, help="scored bytes a domain")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    options = {"tokens": arguments.tokens, "bytes": arguments.bytes, "group_size": GROUP}
    record = start_record("benchmarks/compress_quantize.py", options, seed=0)
    found: dict[str, Any] = {"cases": {}}
    if RESULT.is_file():
        before = json.loads(RESULT.read_text())
        if before["options"] == record.options:
            found = before["metrics"]

    def save(metrics: Mapping[str, Any]) -> None:
        record.finish(dict(metrics))
        RESULT.write_text(record.to_json())

    bench = Bench(arguments.data, arguments.work, arguments.tokens, arguments.bytes)
    fill(found, bench, save, arguments.seconds)
    save(found)


if __name__ == "__main__":
    main()
