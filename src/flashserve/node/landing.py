"""What is still on its way into DRAM, followed from the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from flashserve.errors import FlashServeError
from flashserve.store.arrival import FAILED, Arrival, StageReport


class Landing:
    """The arrival of one model's bytes, whose news come from the store's threads.

    Args:
        on_opened: called on the loop with the number of open groups, each time that it has grown.
    """

    def __init__(self, arrival: Arrival, on_opened: Callable[[int], None]) -> None:
        self.num_groups = arrival.num_groups
        self.num_open = arrival.num_open
        self.is_fetched = arrival.is_fetched
        loop = asyncio.get_running_loop()
        self.report: asyncio.Future[StageReport] = loop.create_future()
        """Done when all is there, or with the FlashServeError of what will not come."""
        self.report.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._arrival = arrival
        self._on_opened = on_opened

        def tell(num_open: int) -> None:
            loop.call_soon_threadsafe(self._tell, num_open)

        if arrival.is_complete:
            self._end()
        else:
            arrival.subscribe(tell)

    def _tell(self, num_open: int) -> None:
        if num_open == FAILED:
            self._end()
        elif num_open > self.num_open:
            self.num_open = num_open
            self._on_opened(num_open)
            if num_open == self.num_groups:
                self._end()

    def _end(self) -> None:
        """The arrival has ended, so that its `wait` returns at once."""
        if self.report.done():
            return
        try:
            self.report.set_result(self._arrival.wait())
        except FlashServeError as error:
            self.report.set_exception(error)
