"""`Device`: all that the tier above RAM asks of a GPU, so that its logic runs without one.

Work on a device is of two kinds, each in its own order: computing, in the current stream of torch,
and copies, in a stream beside it. A `Mark` is a point in one of them. The two meet only where one
is told to wait for a mark of the other; the host waits for neither unless it says so.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from moekit.core.errors import UserError


class Mark(Protocol):
    """A point in the order of work of a device."""

    def done(self) -> bool:
        """Whether everything before it is done."""

    def wait(self) -> None:
        """Block the host until everything before it is done."""


class Device(Protocol):
    """A device with memory of its own. `torch_device` is where its tensors are."""

    torch_device: torch.device

    def memory(self, nbytes: int) -> Tensor:
        """Bytes [nbytes] of the device's memory, beginning at a multiple of 256."""

    def pin(self, memory: Tensor) -> None:
        """Lock host memory [n] into RAM, so that copies from it need not pass through another
        buffer. Raises UserError where the system refuses."""

    def unpin(self, memory: Tensor) -> None:
        """Give up the lock; nothing may still be copied from the memory."""

    def copy(self, target: Tensor, source: Tensor, after: Mark | None) -> Mark:
        """Copy pinned `source` to device memory `target` in the order of copies, once computing
        has passed `after`; the mark is where the copy is done."""

    def follow(self, mark: Mark) -> None:
        """Let computing wait for a mark, and the host go on."""

    def mark(self) -> Mark:
        """Where computing is now, with all that was launched before."""

    def free_bytes(self) -> tuple[int, int]:
        """Bytes of the device's memory that nobody uses, and all."""

    def limit(self, nbytes: int) -> None:
        """Let this process never hold more than `nbytes` in tensors, beside what it held when the
        device was opened; peaks count from now on."""

    def peak_bytes(self) -> int:
        """The most bytes held for tensors since `limit`, in the same count."""


class CudaMark:
    """An event of CUDA."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event()
        self.event.record(stream)

    def done(self) -> bool:
        return self.event.query()

    def wait(self) -> None:
        self.event.synchronize()


class CudaDevice:
    """A GPU that torch calls cuda."""

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device
        self._copies = torch.cuda.Stream(torch_device)
        torch.cuda.empty_cache()
        # What this process holds for other things.
        self._before = torch.cuda.memory_reserved(torch_device)

    def memory(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)

    def pin(self, memory: Tensor) -> None:
        # torch's own pinned memory is rounded up to a power of two and cannot be read into past
        # the page cache; memory of our own is both exact and whole pages.
        code = self._runtime().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        if int(code) != 0:
            raise UserError(
                f"{memory.nbytes} bytes of RAM cannot be pinned for the GPU (CUDA error "
                f"{int(code)}): raise `ulimit -l` or give less --memory"
            )

    def unpin(self, memory: Tensor) -> None:
        torch.cuda.synchronize(self.torch_device)
        self._runtime().cudaHostUnregister(memory.data_ptr())

    @staticmethod
    def _runtime() -> Any:
        return torch.cuda.cudart()

    def copy(self, target: Tensor, source: Tensor, after: Mark | None) -> Mark:
        if after is not None:
            assert isinstance(after, CudaMark)
            self._copies.wait_event(after.event)
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
        return CudaMark(self._copies)

    def follow(self, mark: Mark) -> None:
        assert isinstance(mark, CudaMark)
        torch.cuda.current_stream(self.torch_device).wait_event(mark.event)

    def mark(self) -> Mark:
        return CudaMark(torch.cuda.current_stream(self.torch_device))

    def free_bytes(self) -> tuple[int, int]:
        return torch.cuda.mem_get_info(self.torch_device)

    def limit(self, nbytes: int) -> None:
        _, total = self.free_bytes()
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        share = (nbytes + self._before) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), self.torch_device)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_reserved(self.torch_device) - self._before


def open_device(name: str) -> Device:
    """The device called "cuda" or "cuda:1"; UserError where there is none, or no Triton."""
    try:
        asked = torch.device(name)
    except RuntimeError:
        asked = torch.device("meta")
    if asked.type != "cuda":
        raise UserError(f"--device {name} is none of cpu, cuda, cuda:0, cuda:1, ...")
    if not torch.cuda.is_available():
        raise UserError(
            f"--device {name}: this torch sees no GPU (torch {torch.__version__}, built for CUDA "
            f"{torch.version.cuda or 'none'}); leave out --device, or install a torch for your GPU"
        )
    count = torch.cuda.device_count()
    number = torch.cuda.current_device() if asked.index is None else asked.index
    if number >= count:
        raise UserError(
            f"--device {name}: this torch sees {count} GPUs, cuda:0 to cuda:{count - 1}"
        )
    # Its modules need Triton, which is not everywhere.
    from moekit.ops.triton import available

    if not available():
        raise UserError(f"--device {name} needs Triton: pip install 'moekit[gpu]'")
    return CudaDevice(torch.device("cuda", number))
