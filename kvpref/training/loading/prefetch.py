"""Computing the next items in a background thread."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")


class Prefetcher(Generic[Key, Item]):
    """Calls a function ahead of use in one thread, only for the keys announced to follow.

    It keeps no place in any iteration, so callers may stop, skip or restart anywhere: calls begun for keys that no
    longer follow are dropped. The thread starts with the first call and ends with this object.
    """

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._pending: dict[Key, Future[Item]] = {}

    def get(self, function: Callable[[Key], Item], key: Key, following: Sequence[Key] = ()) -> Item:
        """``function(key)``, begun in the thread if an earlier call announced the key; begins those for `following`.

        Raises:
            Exception: Whatever the function raised for `key`.
        """
        if self._executor is None:
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvpref-prefetch")
        begun, self._pending = self._pending, {}
        current = begun.pop(key, None)
        for other in following:
            future = begun.pop(other) if other in begun else self._executor.submit(function, other)
            self._pending[other] = future
        for stale in begun.values():
            stale.cancel()
        return function(key) if current is None else current.result()
