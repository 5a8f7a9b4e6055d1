"""Data parallelism for the trainer: processes started by torchrun, gradients averaged in one go."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """This process's `rank` among `size` processes, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add `tensor` up over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def average_gradients(self, model: nn.Module) -> None:
        """Replace every gradient by its mean over the processes; one flat buffer, one call."""
        if self.size == 1:
            return
        grads = [param.grad for param in model.parameters() if param.grad is not None]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        flat /= self.size
        start = 0
        for grad in grads:
            grad.copy_(flat[start : start + grad.numel()].view_as(grad))
            start += grad.numel()

    def agree(self, flag: bool) -> bool:
        """True on every process as soon as one of them says so."""
        return bool(self.sum_(torch.tensor(float(flag), device=self.device)).item() > 0)


def join_world(device: str | None = None) -> World:
    """The torchrun world that this process belongs to, or a world of one.

    One GPU a process where there are GPUs, else gloo on the CPU.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        target = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(target)
    else:
        target = torch.device(device)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return World(rank, size, target)


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
