"""How differently two texts use the experts: python examples/routing_by_text.py MODEL A.txt B.txt

Prints per layer the total variation distance between the two loads: 0 if both texts use the same
experts equally often, 1 if they share none.
"""

import sys

import torch

import moekit
from moekit.core.collect import pad_batches
from moekit.core.trace_writer import TraceWriter
from moekit.evaluate.text import read_texts


def load_shares(trace: moekit.RoutingTrace, position: int, tokens: torch.Tensor) -> torch.Tensor:
    """Share of the choices of some tokens that goes to each expert of one layer: [E]."""
    ids = trace.layer(position).topk_ids[tokens].flatten()
    counts = torch.bincount(ids[ids >= 0], minlength=trace.layers[position].num_experts)
    return counts / counts.sum()


def main(model: str, *texts: str) -> list[float]:
    loaded = moekit.load(model)
    samples = read_texts(texts)
    sequences = [
        (loaded.tokenizer(sample.text)["input_ids"][:512], str(number))
        for number, sample in enumerate(samples)
    ]
    writer = TraceWriter()
    moekit.collect(moekit.MoEView(loaded.model), pad_batches(sequences, batch_size=1), [writer])
    trace = writer.trace
    distances = []
    for position, layer in enumerate(trace.layers):
        first, second = (load_shares(trace, position, trace.sample_of == n) for n in (0, 1))
        distances.append((first - second).abs().sum().item() / 2)
        print(f"layer {layer.index}: {distances[-1]:.2f}")
    return distances


if __name__ == "__main__":
    main(*sys.argv[1:])
