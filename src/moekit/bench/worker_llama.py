"""llama.cpp behind `worker_loop`: run by the Python that has llama-cpp-python.

    PEER_PYTHON .../moekit/bench/worker_llama.py FILE.gguf --threads 2 [--mmap] [--context 1024]

The C functions are called directly, so that nothing of the Python wrapper counts as llama.cpp's.
That Python may lack moekit and everything else but numpy.
"""

import argparse
import ctypes
from typing import Any

import numpy as np


class LlamaCpp:
    """One model and one sequence. Without `repack` the weights stay as they lie in the file."""

    def __init__(self, path: str, threads: int, mmap: bool, context: int, repack: bool) -> None:
        import llama_cpp as peer

        self._peer: Any = peer
        peer.llama_backend_init()
        self._quiet = peer.llama_log_callback(lambda *_: None)
        peer.llama_log_set(self._quiet, ctypes.c_void_p(0))
        wanted = peer.llama_model_default_params()
        wanted.load_mode = peer.LLAMA_LOAD_MODE_MMAP if mmap else peer.LLAMA_LOAD_MODE_NONE
        wanted.use_extra_bufts = repack
        self._model = peer.llama_model_load_from_file(path.encode(), wanted)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = peer.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = min(context, 512)
        params.n_threads = params.n_threads_batch = threads
        self._context = peer.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context")
        vocabulary = peer.llama_model_get_vocab(self._model)
        self._vocab = peer.llama_vocab_n_tokens(vocabulary)
        self._batch_size = params.n_batch

    def prefill(self, ids: list[int]) -> None:
        self._peer.llama_memory_clear(self._peer.llama_get_memory(self._context), True)
        for start in range(0, len(ids), self._batch_size):
            part = ids[start : start + self._batch_size]
            tokens = (self._peer.llama_token * len(part))(*part)
            self._run(self._peer.llama_batch_get_one(tokens, len(part)))

    def step(self, token: int) -> None:
        self._run(self._peer.llama_batch_get_one((self._peer.llama_token * 1)(token), 1))

    def _run(self, batch: Any) -> None:
        status = self._peer.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode: {status}")
        if not self._peer.llama_get_logits_ith(self._context, -1):
            raise RuntimeError("llama.cpp has no logits")

    def logits(self, ids: list[int]) -> np.ndarray:
        self._peer.llama_memory_clear(self._peer.llama_get_memory(self._context), True)
        found = np.empty((len(ids), self._vocab), np.float32)
        for start in range(0, len(ids), self._batch_size):
            part = ids[start : start + self._batch_size]
            batch = self._peer.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for row, token in enumerate(part):
                batch.token[row], batch.pos[row], batch.n_seq_id[row] = token, start + row, 1
                batch.seq_id[row][0], batch.logits[row] = 0, 1
            status = self._peer.llama_decode(self._context, batch)
            if status:
                raise RuntimeError(f"llama_decode: {status}")
            rows = self._peer.llama_get_logits(self._context)
            found[start : start + len(part)] = np.ctypeslib.as_array(
                rows, shape=(len(part), self._vocab)
            )
            self._peer.llama_batch_free(batch)
        return found


if __name__ == "__main__":
    # The folder of a script is where its imports are looked for.
    from worker_loop import serve

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mmap", action="store_true")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--no-repack", action="store_true", help="of weights, in own memory")
    given = parser.parse_args()
    serve(
        lambda: LlamaCpp(
            given.file, given.threads, given.mmap, given.context, repack=not given.no_repack
        )
    )
