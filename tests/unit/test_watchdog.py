"""What a rank's watchdog knows and says, by two of them over one store in memory."""

import math
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore, TCPStore

from picotron_core.errors import LostRankError
from picotron_core.parallel import watchdog as module
from picotron_core.parallel.mesh import Axis
from picotron_core.parallel.watchdog import TRANSPORT_S, Watchdog
from picotron_core.parallel.world import World


@pytest.fixture
def soon(monkeypatch):
    """Looks that take a fifth of a second."""
    monkeypatch.setattr(module, "POLL_S", 0.05)
    monkeypatch.setattr(module, "SILENT_S", 0.2)


class Beating:
    """Rank `rank` of two is alive in `store`, within a `with`."""

    def __init__(self, store, rank):
        self.dog = Watchdog(rank=rank, size=2, store=store)

    def __enter__(self):
        self.thread = threading.Thread(target=self.dog._beat)
        self.thread.start()
        return self.dog

    def __exit__(self, *_):
        self.dog._stopped.set()
        self.thread.join()


def test_a_wait_within_another_leaves_it_as_it_was():
    dog = Watchdog()
    with dog.waiting("the outer"):
        outer = dog._waits
        with dog.waiting("the inner"):
            assert dog._waits.what == "the inner"
        assert dog._waits is outer
        with pytest.raises(KeyError), dog.waiting("the failing"):
            raise KeyError
        assert dog._waits is outer
    assert dog._waits is None


def test_an_error_of_our_own_around_a_wait_stays_what_it_is(soon):
    store = HashStore()
    dog = Watchdog(rank=0, size=2, timeout_s=60, store=store)

    def with_a_bug():
        with dog.waiting("the outer"):
            with dog.waiting("the inner"):
                pass
            raise RuntimeError("some bug")

    with Beating(store, 1), pytest.raises(RuntimeError, match="some bug"):
        with_a_bug()


class Noting:
    """A store that notes whether the main thread is watched as it asks."""

    def __init__(self, store, dog):
        self.store, self.dog, self.unwatched = store, dog, []

    def __getattr__(self, name):
        def ask(*args):
            if self.dog._waits is None:
                self.unwatched.append((name, *args))
            return getattr(self.store, name)(*args)

        return ask


@pytest.mark.parametrize("rank", [0, 1])
def test_no_word_to_the_store_is_unwatched(rank):
    shared = HashStore()

    def world_of(rank, store, dog):
        return World(rank=rank, size=2, store=store, watchdog=dog)

    def talk(world):
        world.share("shared", lambda: "")
        world.gather("gathered", "")
        world.clock_offset("clock")
        world.leave()

    dog = Watchdog()
    store = Noting(shared, dog)
    other = threading.Thread(target=talk, args=[world_of(1 - rank, shared, Watchdog())])
    other.start()
    talk(world_of(rank, store, dog))
    other.join()
    assert not store.unwatched


class Late:
    """Work that fails when it is waited for."""

    def wait(self):
        raise RuntimeError("Timed out waiting 5000ms for recv operation to complete")


def test_a_collective_is_late_from_its_start_and_not_from_the_wait_for_it(soon):
    class Comm:
        def all_reduce(self, tensor, **_):
            return Late()

    store = HashStore()
    dog = Watchdog(rank=0, size=2, timeout_s=0.5, store=store)
    axis = Axis(name="dp", ranks=(0, 1), index=0, comm=Comm(), watchdog=dog)
    with Beating(store, 1):
        work = axis.all_reduce(torch.ones(1), async_op=True)
        Event().wait(0.5)  # as over a long backward
        with pytest.raises(LostRankError, match=r"in all_reduce over dp: it took longer than 0\.5"):
            work.wait()


class Clock:
    """Time that only what waits lets pass."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def signals(self, seconds):
        self.now += seconds
        return b""

    def no_answer(self, ask, *, within_s):
        self.now += within_s

    def leave(self, code):
        self.now += 1.0  # for what was to be printed
        raise SystemExit(code)


def test_it_acts_at_the_timeout_and_is_done_before_the_transport(monkeypatch):
    """At the worst: the store does not answer, and it is rank 0's turn to wait for the others."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "answer_of", clock.no_answer)
    monkeypatch.setattr(module.os, "write", lambda *_: None)
    monkeypatch.setattr(module, "end_now", clock.leave)
    monkeypatch.setattr(Watchdog, "_signals_within", clock.signals)
    dog = Watchdog(rank=0, size=2, timeout_s=30, store=object(), keeps_store=True)
    dog.waiting("all_reduce over dp").__enter__()  # and never comes out
    with pytest.raises(SystemExit):
        dog._watch()
    assert 30 < clock.now < 30 + TRANSPORT_S


def test_a_rank_that_never_spoke_has_a_sentence_of_its_own(soon):
    dog = Watchdog(rank=0, size=3, store=HashStore())
    dog.store.set("alive/1", '[1, "in step 7, at work", "elsewhere", 0]')
    words = dog.explain("the wait for 'plugins/2'", late=False)
    assert "rank 1, last in step 7, at work, is not heard of any more" in words
    assert ". rank 2 never spoke: it ended, or was stopped, before it had joined." in words


def test_a_fault_of_our_own_is_not_called_the_stores(soon):
    dog = Watchdog(rank=0, size=2, store=HashStore())
    dog.store.set("alive/0", "{")
    dog.store.set("alive/1", "{")  # as by another version
    with pytest.raises(ValueError, match="Expecting"):
        dog.explain("all_reduce over dp", late=False)


def until(holds):
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_heart_that_does_not_beat_is_noticed_and_one_that_does_is_not(soon):
    store = HashStore()
    with Beating(store, 0) as dog:
        until(lambda: dog._quiet_s > 0.5)
        with Beating(store, 1):
            until(lambda: dog._quiet_s == 0.0)
        until(lambda: dog._quiet_s > 0.5)


def test_a_rank_that_was_frozen_does_not_blame_who_wakes_up_later(soon, monkeypatch):
    frozen_s = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + frozen_s)
    monkeypatch.setattr(module, "time", clock)
    with Beating(HashStore(), 0) as dog:
        until(lambda: dog._quiet_s > 0.2)
        frozen_s = 1e6
        before = dog._quiet_s
        until(lambda: dog._quiet_s > before + 0.2)
        assert dog._quiet_s < 100


SERVER = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds the connection in /proc")
def test_a_lost_connection_is_made_anew_and_a_lost_store_is_noticed(soon):
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            port, patience = int(server.stdout.readline()), timedelta(seconds=3)
            mine, others = (TCPStore("127.0.0.1", port, timeout=patience) for _ in range(2))
            with Beating(mine, 0) as dog:
                until(lambda: others.check(["alive/0"]))
                shut(port, skip=1)
                before = others.get("alive/0")
                until(lambda: others.get("alive/0") != before)
                assert dog._lost == math.inf
                server.kill()
                server.wait()
                until(lambda: dog._lost < math.inf)
        finally:
            server.kill()


def shut(port, *, skip):
    """The latest but `skip` of this process's connections to a port."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the folder's own is gone; some sockets have no peer
            if path.readlink().name.startswith("socket:"):  # else what is dupped would stay open
                with socket.socket(fileno=os.dup(int(path.name))) as connection:
                    found += [int(path.name)] if connection.getpeername()[1] == port else []
    with socket.socket(fileno=os.dup(sorted(found)[-1 - skip])) as connection:
        connection.shutdown(socket.SHUT_RDWR)
