"""Several processes that compute as one: each is sent here what the others know.

Alone, every function gives back what it was given, and no process group is made. Together, small things that
decide what happens next (sums of counts, a request to stop) travel between processors by gloo; tensors of the
network travel where they are, between GPUs by NCCL. Each function is to be called by all processes at the
same point, as every collective operation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from qat.errors import QatError, first_line
from qat.system.launch import World, launched

_FAILURES: Final = "qat/failures"
_FAILED: Final = "qat/failed"
#: How long a process that lost another one waits to hear why. To be changed by tests alone.
PATIENCE = timedelta(seconds=5)

_ALONE: Final = World()
_world = _ALONE
_store: Any = None


def world() -> World:
    """This process and the number of all; of one alone outside of :func:`joined`."""
    return _world


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return _world.rank == 0


@contextmanager
def as_one_of(found: World) -> Iterator[World]:
    """While entered, :func:`world` is ``found``. This alone connects the process with no other."""
    global _world
    before, _world = _world, found
    try:
        yield found
    finally:
        _world = before


@contextmanager
def joined() -> Iterator[World]:
    """While entered, this process is one of those that its launcher started; of one alone nothing changes.

    Where an error leaves, the processes stay connected, so that :func:`speaks` can say who tells of it.

    Raises:
        QatError: the others can't be reached.
    """
    global _store
    found = launched()
    if found.size == 1:
        yield _ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        _store, rank, size = next(iter(rendezvous("env://")))
        dist.init_process_group(backend, store=_store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:  # no address, an address that is taken, a time-out
        raise QatError(
            f"{found.size} processes were launched, which don't find each other: {first_line(error)}"
        ) from error
    with as_one_of(found):
        yield found
        total([0.0])  # nobody leaves before all are done
    dist.destroy_process_group()


def were_connected() -> bool:
    """Whether this process has been connected with others, as it may still be."""
    return _store is not None


def speaks(code: int, message: str, error: BaseException) -> tuple[int, str | None]:
    """Exit code of a process that ends with ``error``, and what it says of it, if it does.

    The first to fail says why. One that fails for the same reason, or because the first is gone, is silent.
    """
    if _store is None:
        return code, message if launched().rank == 0 else None
    lost = _is_lost(error)
    try:
        if lost:
            with _expected():
                _store.wait([_FAILED], PATIENCE)
            code, message = 2, "another process of this training ended without a word; --resume goes on"
        if int(_store.add(_FAILURES, 1)) == 1:
            _store.set(_FAILED, f"{code}\n{message}")
            return code, message
        _store.wait([_FAILED], PATIENCE)
        their_code, _, theirs = bytes(_store.get(_FAILED)).decode().partition("\n")
    except RuntimeError:  # the launcher is gone, too
        return code, message
    return (int(their_code), None) if lost or theirs == message else (code, message)


@contextmanager
def _expected() -> Iterator[None]:
    try:
        yield
    except RuntimeError:  # nobody said anything in time
        return


def _is_lost(error: BaseException) -> bool:
    """Whether ``error`` says that another process can't be reached any more."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "NCCL", "closed by peer"))
    )


def total(values: Sequence[float]) -> list[float]:
    """Sum of each number over all processes, in float64: exact for counts."""
    if _world.size == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return [float(value) for value in sums]


def any_of(flag: bool) -> bool:
    """Whether it is true in any process."""
    return total([float(flag)])[0] > 0


def from_main(text: str) -> str:
    """The text as process 0 has it."""
    if _world.size == 1:
        return text
    texts = [text]
    dist.broadcast_object_list(texts, src=0, device=torch.device("cpu"))
    return texts[0]


def rows_of_all(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks.

    Args:
        rows: (n, ...) float32 on the CPU; n may differ, and may be 0 where (0, 0) will do.
    """
    if _world.size == 1:
        return rows
    counts: list[Any] = [None] * _world.size
    dist.all_gather_object(counts, tuple(rows.shape))
    width = max((shape for shape in counts if shape[0]), default=tuple(rows.shape))[1:]
    most = max(shape[0] for shape in counts)
    padded = rows.new_zeros(most, *width)
    if len(rows):
        padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: shape[0]] for part, shape in zip(parts, counts, strict=True)])


def summed(values: Tensor) -> Tensor:
    """Sum over all processes, without a gradient; any shape, on its device."""
    if _world.size == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values


def extremes(values: Tensor) -> Tensor:
    """The least and the largest of all processes' values, (2,); of values that are no numbers ±infinity.

    Args:
        values: any shape, float; none at all where another process has some.
    """
    ends = values.new_full((2,), -torch.inf)
    if values.numel():
        low, high = torch.aminmax(values.detach())
        # Processes may disagree about the largest of NaN and a number.
        ends = torch.stack([-low, high]).nan_to_num(torch.inf, torch.inf, -torch.inf)
    if _world.size > 1:
        dist.all_reduce(ends, dist.ReduceOp.MAX)
    return torch.stack([-ends[0], ends[1]])


def greatest(values: Tensor) -> Tensor:
    """Of each value the greatest that any process has, any shape, float; of no numbers infinity."""
    if _world.size == 1:
        return values
    # Processes may disagree about the greatest of NaN and a number.
    values = values.detach().float().nan_to_num(torch.inf, torch.inf, -torch.inf)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def of_each(values: Tensor) -> Tensor:
    """(processes, *shape): the values of each process, which have one shape; gradients flow back to each."""
    if _world.size == 1:
        return values.unsqueeze(0)
    gathered: Tensor = _OfEach.apply(values)  # type: ignore[no-untyped-call]  # torch leaves it without types
    return gathered


class _OfEach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values) for _ in range(_world.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # Each process's loss depends on the values of all.
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad)
        return grad[_world.rank]


def exchanged(rows: Tensor, order: Sequence[int]) -> Tensor:
    """This process's share of the rows of all in another order.

    Each process sends only what others ask for.

    Args:
        rows: (n, ...), the same n in each process; together they are (n · processes, ...), by rank.
        order: of all rows, the same in each process.

    Returns:
        Rows ``order[rank · n : (rank + 1) · n]``, in the type and on the device of ``rows``.
    """
    if _world.size == 1:
        return rows[torch.as_tensor(order, device=rows.device)]
    count, me = len(rows), _world.rank
    wanted = [
        [i for i, row in enumerate(order[to * count : (to + 1) * count]) if row // count == me]
        for to in range(_world.size)
    ]
    sent = [order[to * count + i] - me * count for to, places in enumerate(wanted) for i in places]
    mine = order[me * count : (me + 1) * count]
    places = [[i for i, row in enumerate(mine) if row // count == of] for of in range(_world.size)]
    received = torch.empty_like(rows, memory_format=torch.contiguous_format)
    dist.all_to_all_single(
        received,
        rows[torch.as_tensor(sent, device=rows.device, dtype=torch.int64)].contiguous(),
        [len(part) for part in places],
        [len(part) for part in wanted],
    )
    result = torch.empty_like(received)
    result[torch.tensor([i for part in places for i in part], device=rows.device)] = received
    return result
