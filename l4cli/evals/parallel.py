"""Work on several threads, for work that mostly waits for others.

in: a function and items; out: its results, in the order of the items
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_GRACE_S = 0.5  # for what is as good as finished when something else fails


class Stopped(Exception):
    """Work was given up because other work failed, which has more to say."""


def in_parallel(
    work: Callable[[T], R],
    items: Sequence[T],
    num_threads: int,
    *,
    on_failure: Callable[[], None] = lambda: None,
) -> Iterator[R]:
    """Give results in the order of the items, as soon as those before them are there.

    The first failure ends the work: `on_failure` is called at once, what is finished by then, or
    a moment later, is still given, gaps and all, and the failure is raised. The threads are
    daemons, so that Ctrl-C need not wait for answers nobody wants any more.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, R] | BaseException | None] = queue.SimpleQueue()
    is_over = threading.Event()
    for i in range(len(items)):
        todo.put(i)

    def run() -> None:
        try:
            while not is_over.is_set():
                i = todo.get_nowait()
                done.put((i, work(items[i])))
        except queue.Empty:
            pass
        except BaseException as error:  # raised again where the results are awaited
            is_over.set()
            on_failure()
            done.put(error)
        finally:
            done.put(None)

    num_running = min(num_threads, len(items))
    for _ in range(num_running):
        threading.Thread(target=run, daemon=True).start()
    held: dict[int, R] = {}
    place = 0
    failure: BaseException | None = None
    try:
        while place < len(items):
            # Whatever stopped others is on its way, unless it happened elsewhere.
            is_known = failure is not None and not isinstance(failure, Stopped)
            try:
                arrived = done.get(timeout=_GRACE_S if is_known else None)
            except queue.Empty:
                num_running = 0
            else:
                if arrived is None:
                    num_running -= 1
                elif not isinstance(arrived, BaseException):
                    held[arrived[0]] = arrived[1]
                elif not is_known:
                    failure = arrived
            if failure is not None and num_running == 0:
                for i in sorted(held):
                    yield held.pop(i)
                raise failure
            while place in held:
                yield held.pop(place)
                place += 1
    finally:
        if place < len(items):
            is_over.set()
            on_failure()
