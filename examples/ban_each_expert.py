"""What each expert is worth: python examples/ban_each_expert.py MODEL TEXT [LAYER]

Keeps one expert after the other from being chosen in one layer and prints what that costs in bits
per byte. The router picks among the others by the family's own rule.
"""

import sys

import moekit
from moekit.evaluate.bits_per_byte import bits_per_byte
from moekit.evaluate.text import limit_bytes_per_domain, read_texts


def main(model: str, text: str, position: int = 0) -> list[float]:
    loaded = moekit.load(model)
    view = moekit.MoEView(loaded.model)
    samples = limit_bytes_per_domain(read_texts(text), 2000)

    def measure() -> float:
        result = bits_per_byte(loaded.model, loaded.tokenizer, samples, context=64, stride=32)
        return result.total.bpb

    whole = measure()
    print(f"all experts: {whole:.4f} bits per byte")
    costs = []
    for expert in range(view[position].num_experts):
        with view.ban_experts({position: [expert]}):
            costs.append(measure() - whole)
        print(f"without {expert}: {costs[-1]:+.4f}")
    return costs


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
