"""One process or many: `torchrun` says which, and signals that ask for an end are agreed upon."""

from __future__ import annotations

import inspect
import logging
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

_DATA_LOGS = [logging.getLogger(name) for name in ("audiomae.data", "audiomae.finetune")]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# The name since torch 2.14, and the one before.
_SYNC_BUFFERS = "forward_sync_buffers"
if _SYNC_BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    _SYNC_BUFFERS = "broadcast_buffers"


class Processes(AbstractContextManager):
    """The processes of a run, as `torchrun` describes them in the environment; one if it does not.

    Attributes:
        rank, world_size: of this process.
        device: it trains on.

    Raises:
        ValueError: the device cannot be used.
    """

    def __init__(self, device: str = "auto"):
        self.world_size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self._said: set[str] = set()
        self.launched = "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and self.launched:
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.launched:
            # Gloo beside NCCL: what the hosts agree upon must not wait for the devices.
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")

    def __exit__(self, *exception: object) -> None:
        if self.launched and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    @contextmanager
    def warn_once(self) -> Iterator[None]:
        """Of what all processes find alike, perhaps several times, the first one alone warns, and once."""

        def new(record: logging.LogRecord) -> bool:
            if (sentence := record.getMessage()) in self._said:
                return False
            self._said.add(sentence)
            return self.first

        for log in _DATA_LOGS:
            log.addFilter(new)
        try:
            yield
        finally:
            for log in _DATA_LOGS:
                log.removeFilter(new)

    def any(self, flag: bool) -> bool:
        """Whether it is set in any process. The hosts wait for each other, not for their devices."""
        if self.world_size == 1:
            return flag
        count = torch.tensor(int(flag))
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        return bool(count)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, on the values' device."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def agree(self, error: Exception | None) -> None:
        """Raise in every process what went wrong in one of them."""
        sentences = self.gather(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, sentence in enumerate(sentences):
            if sentence is not None:
                raise OSError(f"process {rank}: {sentence}")


def distribute(model: nn.Module, processes: Processes, fsdp: bool) -> nn.Module:
    """The model to call in training: sharded in place (FSDP2), in DDP's wrapper, or as it is.

    Buffers are each process's own: MAE-AST's batch statistics are taken per process, as published.
    """
    if fsdp:
        if not processes.launched:
            raise ValueError("--fsdp shards over processes: start the command under torchrun")
        mesh = dist.init_device_mesh(processes.device.type, (processes.world_size,))
        for part in (model.encoder, getattr(model, "decoder", None)):
            for block in [] if part is None else part.blocks:
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "encode")
        # Of in-place operations on the model's outputs; the loop has none.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        return model
    if processes.world_size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[processes.device.index] if processes.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{_SYNC_BUFFERS: False},
    )


def synchronise(model: nn.Module, last: bool) -> AbstractContextManager:
    """Gradients are averaged over the processes in the last micro-batch of a step only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


class StopSignal(AbstractContextManager):
    """Remembers that the process was asked to end, in place of ending; `requested` is the signal's name."""

    def __init__(self) -> None:
        self.requested: str | None = None

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.requested = signal.Signals(number).name


def ignore_signals(worker: int) -> None:
    """For workers that decode: schedulers signal all processes of a job, and the training process needs its batches
    until it has saved. They end when it does."""
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
