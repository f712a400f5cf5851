"""Several processes that quantize one model together, on one machine or on several, through torch.distributed.

All of them carry out the same plan, block by block, in step. Each passes its share of the calibration windows through the
model, and statistics are summed over all; each rounds its share of a matrix's rows, and all get the whole matrix. So work
and activations are divided, and what is exchanged is a Gram for each input and the codes: little beside either. The first
process (rank 0) draws the windows, takes what could come out differently elsewhere (which method loses less), and alone
writes.

Outside `joined` there is one process, and every function here returns what it is given. Inside, all processes must call the
same ones in the same order, on their main thread.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from bitwright.errors import BitwrightError

T = TypeVar("T")
PATIENCE = timedelta(hours=12)  # a process may write a large shard, or plan, while the others wait

_group: dist.ProcessGroup | None = None


@contextmanager
def joined(together: bool) -> Iterator[None]:
    """Work with the other processes of torch.distributed's default group, which is made where there is none; False: alone.

    Messages pass through the CPU (gloo). BitwrightError where the processes do not find each other.
    """
    global _group  # torch.distributed's groups are the process's too
    if not together:
        yield
        return
    made = not dist.is_initialized()
    try:
        if made:
            dist.init_process_group("gloo", timeout=PATIENCE)
        _group = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        remedy = "start every process with torchrun: docs/guide/several-machines.md"
        raise BitwrightError(f"the processes do not find each other: {error}", remedy=remedy) from None
    try:
        yield
    finally:
        _group = None
        if made:
            dist.destroy_process_group()


def count() -> int:
    """How many processes work together."""
    return 1 if _group is None else dist.get_world_size(_group)


def rank() -> int:
    """Which of them this is, from 0."""
    return 0 if _group is None else dist.get_rank(_group)


def share(t: Tensor) -> Tensor:
    """This process's part of t [S, ...], in the order of ranks; empty where S is less than their number."""
    return t.tensor_split(count())[rank()]


def total(t: Tensor) -> Tensor:
    """The sum of t over all processes, in place; in float32 where t is of a shorter float type."""
    return _reduced(t, dist.ReduceOp.SUM)


def least(t: Tensor) -> Tensor:
    """The least of each element over all processes, in place."""
    return _reduced(t, dist.ReduceOp.MIN)


def most(t: Tensor) -> Tensor:
    """The largest of each element over all processes, in place."""
    return _reduced(t, dist.ReduceOp.MAX)


def _reduced(t: Tensor, how: Any) -> Tensor:
    if _group is None:
        return t
    whole = t.detach().to("cpu", torch.float32 if t.dtype in (torch.bfloat16, torch.float16) else t.dtype).contiguous()
    with _peers():
        dist.all_reduce(whole, how, group=_group)
    return t if whole is t else t.detach().copy_(whole)


def everyone(value: T) -> list[T]:
    """What each process gives, in the order of ranks."""
    if _group is None:
        return [value]
    found: list[Any] = [None] * count()
    with _peers():
        dist.all_gather_object(found, value, group=_group)
    return found


def to_first(value: T) -> list[T]:
    """What each process gives, in the order of ranks; for the others than the first: nothing."""
    if _group is None:
        return [value]
    found: list[Any] | None = [None] * count() if rank() == 0 else None
    with _peers():
        dist.gather_object(value, found, group=_group, group_dst=0)
    return found or []


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes; an error that it raises on purpose is raised in all."""
    if _group is None:
        return make()
    sent: list[Any] = [None]
    if rank() == 0:
        try:
            sent = [make()]
        except BitwrightError as error:
            sent = [_Raised(error)]
    with _peers():
        dist.broadcast_object_list(sent, group=_group, group_src=0)
    if isinstance(sent[0], _Raised):
        raise sent[0].error
    made: T = sent[0]
    return made


def on_first(make: Callable[[], T]) -> T | None:
    """What the first process makes, for itself alone; None in the others. Errors as in `from_first`."""
    kept: list[T] = []
    from_first(lambda: kept.append(make()))
    return kept[0] if kept else None


class _Raised:
    """An error on its way to the other processes."""

    def __init__(self, error: BitwrightError) -> None:
        self.error = error


@contextmanager
def _peers() -> Iterator[None]:
    """BitwrightError where another process has gone."""
    try:
        yield
    except RuntimeError as error:
        remedy = (
            "see what it printed; then start all of them again with the same command, which goes on from the last block"
        )
        raise BitwrightError(f"another process of this run has ended: {_short(error)}", remedy=remedy) from None


def _short(error: RuntimeError) -> str:
    """The first line of the message, without the place in torch's sources."""
    return str(error).splitlines()[0].rpartition("] ")[2] if str(error) else type(error).__name__
