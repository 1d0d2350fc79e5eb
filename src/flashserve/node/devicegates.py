"""Execute while loading on a device: the engine's gates, put before copies that are under way."""

from __future__ import annotations

import threading

from flashserve.engine.gates import Gates
from flashserve.errors import FlashServeError
from flashserve.node.sleeping import Residence


class DeviceGates(Gates):
    """Gates of an engine whose weights come through a `Residence`; made anew for each wake.

    A group opens here when its bytes lie in the arena: its copies start. Whoever waits for it then
    goes on at once, and the device computes behind the copies.

    Args:
        num_groups: as the engine counts them. A checkpoint that is divided otherwise is waited for
            as a whole.
    """

    def __init__(self, residence: Residence, num_groups: int) -> None:
        super().__init__(num_groups)
        self._residence = residence
        self._is_behind_all = False
        self._opening = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Also: everything that is given to the device from now on runs behind the last copy."""
        return super().is_open and self._is_behind_all

    def open(self, num_open: int) -> None:
        """The bytes of the checkpoint's groups [0, num_open) lie in the arena."""
        with self._opening:
            try:
                self._residence.open(num_open)
            except FlashServeError as error:
                self.fail(error)
                return
        if num_open >= self._residence.num_groups:
            super().open(self.num_groups)
        elif self._residence.num_groups == self.num_groups:
            super().open(num_open)

    def wait(self, group: int) -> None:
        super().wait(group)
        is_last = group == self.num_groups - 1
        if is_last or self._residence.num_groups != self.num_groups:
            group = self._residence.num_groups - 1
        try:
            self._residence.wait(group)
        except FlashServeError:
            with self._opening:  # whoever closed it there has said why by then
                pass
            super().wait(group)
            raise
        self._is_behind_all = self._is_behind_all or is_last
