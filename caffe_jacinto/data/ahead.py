"""Work on many images by several threads, in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from caffe_jacinto.memory import keep_freed_memory

IN_FLIGHT_PER_WORKER = 16
"""Images that are being worked on or wait for one before them, for each thread: bounds the memory."""

CHUNK = 4
"""Images that a thread takes at a time: to hand them over one by one costs some percent of decoding them."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def ahead(job: Callable[[_Item], _Result], items: Iterable[_Item], workers: int) -> Iterator[_Result]:
    """``job`` of each of ``items``, in order, done ahead by ``workers`` threads.

    Threads, not processes: OpenCV lets go of Python's lock while it decodes, resizes and encodes, which is
    nearly all of the time, and no image has to travel between processes.
    """
    import cv2

    cv2.setNumThreads(1)  # One thread an image: the images are what is worked on in parallel.
    keep_freed_memory()

    def work(chunk: Sequence[_Item]) -> list[_Result]:
        return [job(item) for item in chunk]

    waiting: deque[Future[list[_Result]]] = deque()
    remaining = iter(items)
    pool = ThreadPoolExecutor(workers)
    try:
        while chunk := tuple(islice(remaining, CHUNK)):
            waiting.append(pool.submit(work, chunk))
            if len(waiting) * CHUNK >= workers * IN_FLIGHT_PER_WORKER:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
