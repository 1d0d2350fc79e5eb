from __future__ import annotations

from flashserve.policy.keepalive import expires_at, keep_alive_s, stop_reason
from flashserve.types import ModelId, ModelSpec


def test_a_model_s_own_keep_alive_goes_before_the_server_s() -> None:
    model = ModelSpec(ModelId("m"), "/m", 1)
    assert keep_alive_s(model, 300.0) == 300.0
    assert keep_alive_s(ModelSpec(ModelId("m"), "/m", 1, keep_alive_s=0.0), 300.0) == 0.0


def test_a_replica_expires_its_keep_alive_after_its_last_request() -> None:
    assert expires_at(12.0, 300.0) == 312.0


def test_the_reason_compares_both_times() -> None:
    assert stop_reason(300.0, 300.0) == "idle 300 s ≥ keep-alive 300 s"
    assert stop_reason(0.5, 0.25) == "idle 0.50 s ≥ keep-alive 0.25 s"
