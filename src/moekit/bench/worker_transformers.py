"""transformers behind `worker_loop`: a model directory in a number format and experts backend.

python -m moekit.bench.worker_transformers DIR --dtype bfloat16 --experts grouped_mm --threads 2
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from moekit.bench.worker_loop import serve


class Transformers:
    def __init__(self, path: str, dtype: str, experts: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), experts_implementation=experts
        ).eval()
        self._cache: Any = None

    @torch.no_grad()
    def _run(self, ids: list[int], all_positions: bool = False) -> torch.Tensor:
        out = self._model(
            input_ids=torch.tensor([ids]),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=0 if all_positions else 1,
        )
        self._cache = out.past_key_values
        return out.logits[0]

    def prefill(self, ids: list[int]) -> None:
        self._cache = None
        self._run(ids)

    def step(self, token: int) -> None:
        self._run([token])

    def logits(self, ids: list[int]) -> np.ndarray:
        self._cache = None
        return self._run(ids, all_positions=True).float().numpy()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--experts", default="grouped_mm")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    serve(lambda: Transformers(given.directory, given.dtype, given.experts, given.threads))
