"""Signs of life between ranks: here they are threads, which share a store in memory."""

import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from processes import wait_until

from llama import heartbeat
from llama.errors import RankLost
from llama.heartbeat import Heart

INTERVAL = 0.02


class Store(dist.Store):
    """A store whose calls hang, or fail, from when a test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = self.hangs = False
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self._values[key] = value.encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        while self.hangs or not all(key in self._values for key in keys):
            time.sleep(INTERVAL / 4)
        if self.fails:
            raise dist.DistNetworkError("connection reset by peer")
        return [self._values[key] for key in keys]


class Ranks:
    """Three ranks, and the losses that each noticed."""

    def __init__(self) -> None:
        self.stores = [Store() for _ in range(3)]
        for store in self.stores:
            store._values = self.stores[0]._values
        self.losses: list[list[RankLost]] = [[] for _ in range(3)]
        self.hearts = [
            Heart(store, rank, 3, loss.append)
            for rank, (store, loss) in enumerate(zip(self.stores, self.losses, strict=True))
        ]

    def wait_for_loss(self, rank: int) -> str:
        wait_until(lambda: bool(self.losses[rank]), 10)
        return str(self.losses[rank][0])


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    monkeypatch.setattr(heartbeat, "INTERVAL", INTERVAL)
    monkeypatch.setattr(heartbeat, "LIMIT", 10)
    monkeypatch.setattr(heartbeat.socket, "gethostname", lambda: "node-a")
    found = Ranks()
    wait_until(lambda: all(s.number > 1 for heart in found.hearts for s in heart._signs), 10)
    yield found
    for store in found.stores:
        store.hangs = False
    for heart in found.hearts:
        heart.leave()


def test_a_silent_rank_is_lost(ranks: Ranks) -> None:
    """A machine that loses power closes no connections: a failure means waiting for it forever."""
    assert ranks.hearts[0].cause() is None  # the others live
    ranks.stores[2].hangs = True
    expected = "rank 2 on node-a has died, or can't be reached"
    # Sooner, where a collective has failed; a last sign may still be on its way.
    wait_until(lambda: isinstance(ranks.hearts[0].cause(), RankLost), 10)
    assert str(ranks.hearts[0].cause()) == expected
    assert [ranks.wait_for_loss(rank) for rank in (0, 1)] == [expected] * 2
    assert "the store where the ranks meet can't be reached" in ranks.wait_for_loss(2)


def test_a_store_that_is_gone_is_a_loss(ranks: Ranks) -> None:
    """It is on a rank's machine, or on its launcher's: a failure means that others go on alone."""
    ranks.stores[1].fails = True
    assert "the store where the ranks meet can't be reached" in ranks.wait_for_loss(1)
    assert "the store" in str(ranks.hearts[1].cause())
    assert "rank 1 on node-a has died" in ranks.wait_for_loss(0)


def test_a_rank_that_fails_tells_the_others_why(ranks: Ranks) -> None:
    ranks.hearts[1].leave(MemoryError("no room"))
    for rank in (0, 2):
        assert ranks.wait_for_loss(rank) == "rank 1 on node-a failed: MemoryError: no room"
    assert str(ranks.hearts[0].cause()) == "rank 1 on node-a failed: MemoryError: no room"


def test_ranks_may_leave_one_after_another(ranks: Ranks) -> None:
    """The first to end mustn't end the others, which may have a file to write."""
    begin = time.monotonic()
    ranks.hearts[0].leave(lingers=True)  # until the others know
    assert all(heart._signs[0].last_words for heart in ranks.hearts)
    assert time.monotonic() - begin < 1
    for store in ranks.stores:
        store.fails = True  # it ends with rank 0
    wait_until(lambda: all(heart._is_broken for heart in ranks.hearts[1:]), 10)
    time.sleep(3 * INTERVAL)
    assert ranks.losses == [[], [], []]
    assert str(ranks.hearts[1].cause()).startswith("rank 0 on node-a has ended: see what it")
