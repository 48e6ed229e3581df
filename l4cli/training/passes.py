"""Forward and backward over the micro-batches of a step, one by one or several at once.

in: micro-batches, what makes a loss of one; out: its result each, gradients added up in `.grad`

Small models leave most of a CPU idle: their products are too short to be shared out among
threads, and most of a step is many small operations. So several micro-batches run at once, each
on a thread that computes alone. Gradients are added in the order of the micro-batches, and the
sum is the same bit for bit as that of one after the other on one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from l4cli.ops.batch import Batch
from l4cli.training.optim import one_by_one

# On 2 cores a model of 3M gains 1.6 times over threads inside operations, one of 100M nothing.
MAX_PARAMETERS = 2**26

Result = TypeVar("Result")
# A micro-batch to what is to be minimised (None: nothing depends on a weight) and a result.
Loss = Callable[[Batch], tuple[Tensor | None, Result]]


def num_at_once(num_parameters: int, device: torch.device, num_threads: int) -> int:
    """How many micro-batches to run at once: all threads' worth for a small model on a CPU.

    Every one in flight holds a gradient of the whole model, which a small model can afford.
    """
    is_small = num_parameters <= MAX_PARAMETERS
    return num_threads if device.type == "cpu" and is_small else 1


class Passes(Generic[Result]):
    """Runs the passes of every step; a context that ends its threads."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._num_threads = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None
        if num_workers > 1:
            each = max(1, self._num_threads // num_workers)
            self._pool = ThreadPoolExecutor(
                num_workers, "l4-pass", initializer=torch.set_num_threads, initargs=(each,)
            )

    def __enter__(self) -> Passes[Result]:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(
        self, batches: Sequence[Batch], loss: Loss[Result], parameters: Sequence[Tensor]
    ) -> Iterator[Result]:
        """Run all micro-batches; each result comes once its gradient is added."""
        if self._pool is None or len(batches) == 1:
            for batch in batches:
                total, result = loss(batch)
                if total is not None:
                    total.backward()
                yield result
            return
        waiting, running = deque(batches), deque[Future[tuple[Sequence[Tensor | None], Result]]]()
        with self._threads_shared_out():
            try:
                while waiting or running:
                    # No further ahead than there are workers: finished gradients take memory.
                    while waiting and len(running) < self.num_workers:
                        batch = waiting.popleft()
                        running.append(self._pool.submit(_gradients, batch, loss, parameters))
                    gradients, result = running.popleft().result()
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        _add(parameter, gradient)
                    yield result
            finally:
                wait([future for future in running if not future.cancel()])  # left by an error

    def each(self, work: Callable[[Any], None], items: Sequence[Any]) -> None:
        """Call `work` with each item, several at once."""
        if self._pool is None:
            one_by_one(work, items)
            return
        with self._threads_shared_out():
            for _ in self._pool.map(work, items):
                pass

    @contextmanager
    def _threads_shared_out(self) -> Iterator[None]:
        # MKL counts its threads for the process as a whole; the workers' number is this one's.
        torch.set_num_threads(max(1, self._num_threads // self.num_workers))
        try:
            yield
        finally:
            torch.set_num_threads(self._num_threads)


def _gradients(
    batch: Batch, loss: Loss[Result], parameters: Sequence[Tensor]
) -> tuple[Sequence[Tensor | None], Result]:
    total, result = loss(batch)
    if total is None:
        return [None] * len(parameters), result
    return torch.autograd.grad(total, parameters, allow_unused=True), result


def _add(parameter: Tensor, gradient: Tensor | None) -> None:
    if gradient is None:
        return
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient
