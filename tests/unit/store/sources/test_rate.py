from flashserve.store.sources.rate import RateLimit


class Time:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now = 100.0

    def clock(self):
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        self.now += seconds


def limit_of(time, bytes_per_s):
    return RateLimit(bytes_per_s, clock=time.clock, sleep=time.sleep)


def test_bytes_pass_at_the_rate():
    time = Time()
    limit = limit_of(time, 1000)
    for _ in range(51):
        limit.take(100)
    assert 5.0 <= round(time.now - 100, 6) <= 5.1


def test_small_pieces_pass_at_the_rate_too():
    time = Time()
    limit = limit_of(time, 1_000_000)
    for _ in range(10_000):
        limit.take(100)
    assert 0.98 <= time.now - 100 <= 1.0


def test_a_pause_saves_up_nothing():
    time = Time()
    limit = limit_of(time, 1000)
    limit.take(100)
    time.now += 60
    began = time.now
    for _ in range(11):
        limit.take(100)
    assert round(time.now - began, 6) == 1.0


def test_no_limit_never_waits():
    time = Time()
    limit = limit_of(time, 0)
    limit.take(1 << 60)
    limit.take(1 << 60)
    assert time.now == 100
