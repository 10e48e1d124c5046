"""Reading, computing and writing at the same time, by threads, in bounded memory.

The model stays in the calling thread; what a thread reads or writes fails in the caller, where its result is needed.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing
from itertools import starmap
from operator import itemgetter
from queue import SimpleQueue
from threading import Event, Semaphore
from typing import Any, TypeVar

Item = TypeVar("Item")
T = TypeVar("T")

_END, _CUT = object(), object()


def read_ahead(
    submit: Callable[[Item], Future[T]], items: Iterable[Item], depth: int
) -> Iterator[tuple[Item, Future[T]]]:
    """The items in order, each with its job, while those of the next `depth` items already run."""
    ahead: deque[tuple[Item, Future[T]]] = deque()
    for item in items:
        ahead.append((item, submit(item)))
        if len(ahead) > depth:
            yield ahead.popleft()
    while ahead:
        yield ahead.popleft()


def read_pieces(
    read: Callable[[int, int], T], bounds: Sequence[tuple[int, int]], ahead: bool
) -> Generator[T, None, None]:
    """`read(start, stop)` for all bounds, in order; with `ahead` a thread reads the next piece while one is in use.

    After a piece that cannot be read, none is read. Closing the iterator waits until the thread has ended.
    """
    if not ahead:
        yield from starmap(read, bounds)
        return
    failed = Event()

    def read_next(start: int, stop: int) -> T:
        if failed.is_set():
            raise CancelledError  # nobody asks for this piece
        try:
            return read(start, stop)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(1, thread_name_prefix="mg-read") as pool:
        jobs = read_ahead(lambda bound: pool.submit(read_next, *bound), bounds, 1)
        yield from map(Future.result, map(itemgetter(1), jobs))  # unlike a loop, it keeps no reference to a piece


def write_behind(write: Callable[[Iterator[Item]], T], items: Generator[Item, None, None], depth: int = 1) -> T:
    """`write(items)` in a thread, while the items are computed in this one, up to `depth` ahead of the writer.

    If computing them fails, `write`'s iterator raises too, so that it can clean up. If `write` fails, no more items are
    computed. Either way the thread has ended and `items` is closed when this returns.

    Args:
        write: consumes an iterator over the items; it may stop early.

    Returns:
        What `write` returns.

    Raises:
        Exception: what `write` or the items raised.
    """
    queue: SimpleQueue[Any] = SimpleQueue()
    room = Semaphore(depth)

    def coming() -> Iterator[Item]:
        while (item := queue.get()) is not _END:
            if item is _CUT:
                raise RuntimeError("there are no more items: computing them failed")
            yield item
            del item  # held no longer than the next one is waited for
            room.release()

    def put(item: Item) -> bool:
        room.acquire()
        if done.done():
            return False
        queue.put(item)
        return True

    with closing(items), ThreadPoolExecutor(1, thread_name_prefix="mg-write") as pool:
        try:
            done = pool.submit(write, coming())
            done.add_done_callback(lambda _: room.release())  # the writer has ended: wait for it no longer
            all(map(put, items))  # until the writer has ended
            queue.put(_END)
        finally:  # wherever Ctrl-C comes, or the pool would wait for a writer that waits for an item
            queue.put(_CUT)
        return done.result()
