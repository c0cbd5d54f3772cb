"""Work on the records of an LMDB by several threads, in the LMDB's order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

IN_FLIGHT_PER_WORKER = 16
"""Records that are being worked on or wait for one before them, for each thread: bounds the memory."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def ahead(job: Callable[[_Item], _Result], items: Iterable[_Item], workers: int) -> Iterator[_Result]:
    """``job`` of each of ``items``, in order, done ahead by ``workers`` threads.

    OpenCV lets go of Python's lock while it decodes, so that threads use all cores.
    """
    import cv2

    cv2.setNumThreads(1)  # One thread an image: the images are what is worked on in parallel.
    waiting: deque[Future[_Result]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            waiting.append(pool.submit(job, item))
            if len(waiting) >= workers * IN_FLIGHT_PER_WORKER:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
