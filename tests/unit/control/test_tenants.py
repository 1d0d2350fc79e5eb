"""Tenants share a model's places and its queue."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from tests.unit.control.fake_nodes import PHASES, model, node

from flashserve.config import PolicySettings
from flashserve.control.controller import Controller
from flashserve.control.records import Request
from flashserve.control.shares import Shares
from flashserve.messages.commands import Command, Dispatch, Reject, StartReplica
from flashserve.messages.events import (
    ModelDeployed,
    NodeJoined,
    ReplicaLost,
    ReplicaReady,
    RequestArrived,
    RequestFinished,
)
from flashserve.policy.admission import Load, choose_tenant
from flashserve.types import ModelId, NodeId, RequestId

M, N = ModelId("m"), NodeId("n1")


class Server:
    """One replica with `places` places."""

    def __init__(self, places: int, weights: dict[str, float] | None = None, **policy: object):
        settings = PolicySettings(**{"deadline_s": 1e6, **policy})  # type: ignore[arg-type]
        self.controller = Controller(settings, weights=weights)
        self.controller.handle(NodeJoined(node(max_sequences=places)), 0.0)
        self.controller.handle(ModelDeployed(model("m")), 0.0)
        self.now, self.num = 0.0, 0
        self.running: list[RequestId] = []
        self.rejected: dict[RequestId, Reject] = {}
        self.replica_id = ""
        self.is_ready = False

    def arrive(self, tenant: str) -> RequestId:
        self.num += 1
        request_id = RequestId(f"{tenant}/{self.num}")
        self._note(
            self.controller.handle(RequestArrived(request_id, M, tenant=tenant), self._tick())
        )
        return request_id

    def be_ready(self) -> None:
        self.is_ready = True
        event = ReplicaReady(N, self.replica_id, M, PHASES)  # type: ignore[arg-type]
        self._note(self.controller.handle(event, self._tick()))

    def lose(self) -> None:
        self.running.clear()
        event = ReplicaLost(N, self.replica_id, M, "killed")  # type: ignore[arg-type]
        self._note(self.controller.handle(event, self._tick()))

    def finish(self, request_id: RequestId) -> None:
        self.running.remove(request_id)
        self._note(self.controller.handle(RequestFinished(request_id), self._tick()))

    def tenants(self) -> Counter[str]:
        return Counter(request_id.partition("/")[0] for request_id in self.running)

    def _tick(self) -> float:
        self.now += 0.001
        return self.now

    def _note(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Dispatch():
                    self.running.append(command.request_id)
                case Reject():
                    self.rejected[command.request_id] = command
                case StartReplica():
                    self.replica_id = command.replica_id


def test_a_tenant_that_floods_a_model_does_not_take_all_its_places() -> None:
    server = Server(places=4)
    for _ in range(50):
        server.arrive("flood")
    late = [server.arrive("late") for _ in range(2)]
    server.be_ready()
    assert server.tenants() == {"flood": 2, "late": 2}
    assert set(late) < set(server.running)


def test_within_a_tenant_requests_come_in_order() -> None:
    server = Server(places=1)
    arrived = [server.arrive("a") for _ in range(5)]
    server.be_ready()
    order = []
    while server.running:
        order.append(server.running[0])
        server.finish(server.running[0])
    assert order == arrived


def test_places_follow_the_weights() -> None:
    server = Server(places=8, weights={"heavy": 3.0})
    for _ in range(20):
        server.arrive("light")
        server.arrive("heavy")
    server.be_ready()
    assert server.tenants() == {"heavy": 6, "light": 2}


def test_a_full_queue_refuses_the_latest_of_the_tenant_with_most_of_it() -> None:
    server = Server(places=1, queue_limit=4)
    flood = [server.arrive("flood") for _ in range(4)]
    others = [server.arrive("acme") for _ in range(3)]
    assert list(server.rejected) == [flood[3], flood[2], others[2]]
    assert all(reject.code == "queue_full" for reject in server.rejected.values())
    assert server.rejected[flood[3]].retry_after_s is not None
    assert "acme" not in server.rejected[flood[3]].message


def test_an_answer_that_was_begun_does_not_give_way() -> None:
    server = Server(places=2, queue_limit=2)
    begun = [server.arrive("flood") for _ in range(2)]
    server.be_ready()
    server.lose()
    newcomer = server.arrive("acme")
    assert list(server.rejected) == [newcomer]
    server.be_ready()
    assert server.running == begun


def test_one_tenant_alone_is_first_come_first_served() -> None:
    server = Server(places=1, queue_limit=2)
    arrived = [server.arrive("") for _ in range(4)]
    assert list(server.rejected) == arrived[2:]


def test_requests_of_a_lost_replica_come_first_of_their_tenant() -> None:
    server = Server(places=2)
    first = [server.arrive("a"), server.arrive("a")]
    server.be_ready()
    later = [server.arrive("a"), server.arrive("b")]
    server.lose()
    server.be_ready()
    assert server.running == [first[0], later[1]]


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 6))
def test_nobody_starves(seed: int, places: int, num_tenants: int) -> None:
    """However others press, a request is dispatched before each of its rivals had many turns."""
    draw = random.Random(seed)
    tenants = [f"t{i}" for i in range(num_tenants)]
    server = Server(places, {t: draw.choice([0.1, 1.0, 10.0]) for t in tenants}, queue_limit=10_000)
    server.arrive("t0")
    server.be_ready()
    quiet = server.arrive("quiet")
    for turn in range(places * num_tenants + places + 1):
        if quiet in server.running:
            return
        for tenant in tenants:
            server.arrive(tenant)
        server.finish(draw.choice(server.running))
        assert turn < places * num_tenants + places
    assert quiet in server.running


@given(st.lists(st.tuples(st.sampled_from("wsrxb"), st.integers(0, 5)), max_size=60))
def test_the_index_agrees_with_the_rule(steps: list[tuple[str, int]]) -> None:
    shares = Shares()
    waiting: list[Request] = []
    running: list[Request] = []
    weights = {"t0": 1.0, "t1": 0.3, "t2": 2.0, "t3": 1.0, "t4": 1.0, "t5": 5.0}
    sequence = 0
    for step, number in steps:
        if step == "w":
            sequence += 1
            name = f"t{number}"
            request = Request(RequestId(str(sequence)), M, sequence, 1.0, 0.0, name, weights[name])
            waiting.append(request)
            shares.wait([request])
        elif step == "s" and waiting:
            shares.stop_waiting(waiting.pop(number % len(waiting)))
        elif step == "r" and (request := shares.next()):
            waiting.remove(request)
            running.append(request)
            shares.stop_waiting(request)
            shares.run(request)
        elif step in "xb" and running:
            request = running.pop(number % len(running))
            shares.stop_running(request)
            if step == "b":
                waiting.append(request)
                shares.wait([request])
        loads = [
            Load(
                name,
                weight,
                sum(one.tenant == name for one in running),
                sum(one.tenant == name for one in waiting),
                min((one.sequence for one in waiting if one.tenant == name), default=0),
            )
            for name, weight in weights.items()
        ]
        chosen, following = choose_tenant(loads), shares.next()
        assert (chosen.head if chosen else None) == (following.sequence if following else None)
        most = max(load.waiting / load.weight for load in loads)
        told = shares.most()
        assert (told.waiting / told.weight if told else 0) == most
        for load in loads:
            assert shares.num_waiting(load.tenant) == load.waiting
