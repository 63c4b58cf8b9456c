"""Collective operations: each of several processes that compute together is sent what the others know.

All processes must call such a function at the same point, or those that call it wait for the others. In a
process that works alone, each function returns its argument, and no process group is made. In several
processes, small values that decide what happens next (sums of counts, a request to stop) are sent by gloo
between CPUs. Tensors of the network are sent from the device on which they lie: by NCCL between GPUs.
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

#: Keys of the store that all processes share: the number of failed processes, and the first one's message.
_FAILURES: Final = "qat/failures"
_FAILED: Final = "qat/failed"
#: How long a failing process waits for the message of the process that failed first. Only tests change it.
PATIENCE = timedelta(seconds=5)

_ALONE: Final = World()
_world = _ALONE
_store: Any = None


def world() -> World:
    """This process's rank and the number of processes. Outside of :func:`joined` it is one process alone."""
    return _world


def is_main() -> bool:
    """Whether this is process 0, which alone writes files and prints."""
    return _world.rank == 0


@contextmanager
def as_one_of(found: World) -> Iterator[World]:
    """Context in which :func:`world` returns ``found``. It doesn't connect this process with others."""
    global _world
    before, _world = _world, found
    try:
        yield found
    finally:
        _world = before


@contextmanager
def joined() -> Iterator[World]:
    """Context in which this process is connected with the others that its launcher started.

    A process that was started alone enters and leaves it without effect. If an exception leaves the context,
    the processes stay connected, because :func:`failure_report` needs the connection.

    Raises:
        QatError: the other processes can't be reached.
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
        total([0.0])  # a barrier: no process disconnects before all have finished
    dist.destroy_process_group()


def were_connected() -> bool:
    """Whether this process was ever connected with others by :func:`joined`."""
    return _store is not None


def failure_report(code: int, message: str, error: BaseException) -> tuple[int, str | None]:
    """What this process reports when it ends with ``error``: an exit code, and a message or ``None``.

    The process that fails first prints its message. A process that fails with the same message, or because it
    lost the connection to the first one, prints nothing and takes over the first one's exit code.

    Args:
        code: exit code for ``error``.
        message: text for ``error``.
        error: the exception that ends this process.
    """
    if _store is None:
        return code, message if launched().rank == 0 else None
    lost = _is_lost(error)
    try:
        if lost:
            with _ignoring_timeouts():
                _store.wait([_FAILED], PATIENCE)
            code, message = 2, "another process of this training ended without a word; --resume goes on"
        if int(_store.add(_FAILURES, 1)) == 1:
            _store.set(_FAILED, f"{code}\n{message}")
            return code, message
        _store.wait([_FAILED], PATIENCE)
        their_code, _, theirs = bytes(_store.get(_FAILED)).decode().partition("\n")
    except RuntimeError:  # the launcher, which holds the store, is gone, too
        return code, message
    return (int(their_code), None) if lost or theirs == message else (code, message)


@contextmanager
def _ignoring_timeouts() -> Iterator[None]:
    """Context that ends quietly where a wait for another process's message takes too long."""
    try:
        yield
    except RuntimeError:
        return


def _is_lost(error: BaseException) -> bool:
    """Whether ``error`` means that another process can't be reached any more."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "NCCL", "closed by peer"))
    )


def total(values: Sequence[float]) -> list[float]:
    """Sum of each number over all processes. It is computed in float64, and so is exact for counts.

    Args:
        values: equally many numbers in each process.
    """
    if _world.size == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return [float(value) for value in sums]


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is true in at least one process."""
    return total([float(flag)])[0] > 0


def from_main(text: str) -> str:
    """The ``text`` of process 0; what the other processes pass is ignored."""
    if _world.size == 1:
        return text
    texts = [text]
    dist.broadcast_object_list(texts, src=0, device=torch.device("cpu"))
    return texts[0]


def rows_of_all(rows: Tensor) -> Tensor:
    """The rows of all processes, concatenated in the order of their ranks.

    Args:
        rows: (n, ...) float32 on the CPU. The number of rows n may differ between processes. A process
            without rows may pass the shape (0, 0) if it doesn't know the other dimensions.

    Returns:
        (sum of all n, ...) float32 on the CPU.
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
    """Elementwise sum over all processes, without a gradient.

    Args:
        values: any shape, the same in each process.
    """
    if _world.size == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values


def extremes(values: Tensor) -> Tensor:
    """The minimum and the maximum of the values of all processes, as a tensor of shape (2,).

    If a process has a NaN among its values, the result is −infinity and infinity.

    Args:
        values: float, any shape, which may differ between processes and be empty in some of them.
    """
    ends = values.new_full((2,), -torch.inf)
    if values.numel():
        low, high = torch.aminmax(values.detach())
        # NaN becomes infinity: backends differ in which of NaN and a number is the maximum.
        ends = torch.stack([-low, high]).nan_to_num(torch.inf, torch.inf, -torch.inf)
    if _world.size > 1:
        dist.all_reduce(ends, dist.ReduceOp.MAX)
    return torch.stack([-ends[0], ends[1]])


def elementwise_maximum(values: Tensor) -> Tensor:
    """Elementwise maximum over all processes, as float32, without a gradient. A NaN counts as infinity.

    Args:
        values: float, any shape, the same in each process.
    """
    if _world.size == 1:
        return values
    # NaN becomes infinity: backends differ in which of NaN and a number is the maximum.
    values = values.detach().float().nan_to_num(torch.inf, torch.inf, -torch.inf)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def gathered(values: Tensor) -> Tensor:
    """The values of all processes, stacked in the order of their ranks; gradients flow back to each process.

    Args:
        values: any shape, the same in each process.

    Returns:
        (processes, *shape).
    """
    if _world.size == 1:
        return values.unsqueeze(0)
    stacked: Tensor = _AllGather.apply(values)  # type: ignore[no-untyped-call]  # torch has no types
    return stacked


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values) for _ in range(_world.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # The loss of each process depends on the values of all, so the gradients of all losses are added.
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad)
        return grad[_world.rank]


def permuted_rows(rows: Tensor, order: Sequence[int]) -> Tensor:
    """Put the rows of all processes in another order, and return this process's share of the result.

    A process sends no row to another one that doesn't need it.

    Args:
        rows: (n, ...), with the same n in each process. Concatenated by rank, they are (n · processes, ...).
        order: a permutation of the n · processes row numbers, the same in each process.

    Returns:
        Rows ``order[rank · n : (rank + 1) · n]`` of the concatenation, in the type and on the device of
        ``rows``.
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
