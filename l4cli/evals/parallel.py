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

    The first failure ends the work: `on_failure` is called at once, what is finished by then is
    still given, gaps and all, and the failure is raised. The threads are daemons, so that Ctrl-C
    need not wait for answers nobody wants any more.
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
            arrived = done.get()
            if arrived is None:
                num_running -= 1
            elif isinstance(arrived, BaseException):
                failure = arrived
            else:
                held[arrived[0]] = arrived[1]
            # Whatever stopped others is on its way, unless it happened elsewhere.
            if failure and (num_running == 0 or not isinstance(failure, Stopped)):
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
