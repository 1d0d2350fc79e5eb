import pytest
from tests.unit.store.device.fake_device import FakeDevice

from flashserve.errors import InternalError
from flashserve.store.device.regions import RegisteredArena


def test_the_arena_is_registered_in_pieces_and_wholly_unregistered():
    device = FakeDevice()
    arena = RegisteredArena(device, 4096, 2500, piece_bytes=1000)
    assert device.registered == {4096: 1000, 5096: 1000, 6096: 500}
    assert (arena.boundaries, arena.registered_bytes, arena.refusal) == ((1000, 2000), 2500, None)
    arena.close()
    arena.close()
    assert device.registered == {}
    assert arena.registered_bytes == 0


@pytest.mark.parametrize("refused", [0, 1, 2])
def test_a_refused_piece_ends_the_registering_and_says_why(refused):
    device = FakeDevice(register=refused)
    arena = RegisteredArena(device, 0, 2500, piece_bytes=1000)
    assert arena.registered_bytes == refused * 1000
    assert arena.refusal == "no register today"
    assert device.calls.count("register") == refused + 1
    arena.close()
    assert device.registered == {}


def test_a_fault_while_registering_leaves_nothing_registered():
    class Faulty(FakeDevice):
        def register(self, address, num_bytes):
            if self.registered:
                raise InternalError("the driver is gone")
            super().register(address, num_bytes)

    device = Faulty()
    with pytest.raises(InternalError):
        RegisteredArena(device, 0, 2500, piece_bytes=1000)
    assert device.registered == {}
