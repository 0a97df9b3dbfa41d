"""Ranks that cannot meet say why in one line: variables of torchrun, interfaces, ports, stores."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import DistError, TCPStore

from picotron_core.errors import ConfigError, LostRankError, RunError
from picotron_core.parallel import network, rendezvous
from picotron_core.parallel.folder_store import FolderStore, read_value, write_value
from picotron_core.parallel.rendezvous import choose_interfaces, meet_over_tcp, place_of
from picotron_core.parallel.watchdog import Watchdog
from picotron_core.parallel.world import World, forming_groups

RIGHT = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"RANK": "two"}, "RANK is 'two'; it must be a number, at least 0 and below WORLD_SIZE"),
        ({"RANK": "2"}, "RANK is '2'"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": ""}, "lacks RANK"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK is '1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; it must be a number, at least 1"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "2\n3"}, "WORLD_SIZE is '2 3'"),
        ({"WORLD_SIZE": "1" * 5000}, "WORLD_SIZE is '1111"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is '2'; it must be a number, at least 0 and below WORLD"),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "below LOCAL_WORLD_SIZE, which is 1"),
        ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE is 'x'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'; it must be a number, 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536'"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is '0'"),
        ({"MASTER_ADDR": "no.such.host.invalid"}, "MASTER_ADDR is 'no.such.host.invalid', which"),
        ({"MASTER_ADDR": "a" * 300 + ".com"}, "which cannot be resolved"),
        ({"MASTER_ADDR": "::ffff:"}, "which cannot be resolved"),
        ({"GLOO_SOCKET_IFNAME": "^docker0,lo"}, "gloo takes names, and no ^"),
        ({"GLOO_SOCKET_IFNAME": "nope0"}, "'nope0' is no interface of this machine. There are: "),
        ({"GLOO_SOCKET_IFNAME": "lo,nope0"}, "'nope0' is no interface"),
        ({"GLOO_SOCKET_IFNAME": "lo,"}, "'' is no interface"),
        ({"GLOO_SOCKET_IFNAME": " "}, "' ' is no interface"),
        ({"GLOO_SOCKET_IFNAME": "=lo"}, "'=lo' is no interface"),
    ],
)
def test_variables_that_cannot_be_are_one_line(picotron, tiny, monkeypatch, changed, words):
    monkeypatch.setattr(rendezvous, "RESOLVE_S", 0.0)
    for name, value in {**RIGHT, **changed}.items():
        monkeypatch.setenv(name, value)
    code, out, err = picotron("train", *tiny)
    assert code == 2, err
    assert words in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert len(err) < 1500
    assert not out


def test_an_interface_without_an_address_is_named(monkeypatch):
    monkeypatch.setattr(network, "interfaces", lambda: {"lo": ["127.0.0.1"], "eth7": []})
    with pytest.raises(ConfigError, match="'eth7' has no address: it is down"):
        network.check_gloo_interfaces({"GLOO_SOCKET_IFNAME": "eth7"})


def test_a_machine_without_loopback_says_what_there_is(monkeypatch):
    monkeypatch.setattr(network, "interfaces", lambda: {"lo": [], "eth0": ["192.0.2.1"]})
    with pytest.raises(ConfigError, match=r"There are: lo \(no address\); eth0 \(192\.0\.2\.1\)"):
        network.loopback()


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({}, "lo"),  # 127.0.0.1 can only mean ranks of this machine
        ({"MASTER_ADDR": "localhost"}, "lo"),
        ({"MASTER_ADDR": "::1"}, "lo"),
        ({"MASTER_ADDR": "192.0.2.9", "LOCAL_WORLD_SIZE": "2"}, "lo"),
        ({"MASTER_ADDR": "192.0.2.9", "LOCAL_WORLD_SIZE": "1"}, None),
        ({"MASTER_ADDR": "192.0.2.9"}, None),
    ],
)
def test_ranks_of_one_machine_talk_over_the_loopback(monkeypatch, changed, wanted):
    for name in (network.GLOO, network.NCCL):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    place = place_of({**RIGHT, **changed})
    assert place is not None
    choose_interfaces(place, in_folder=False)
    name = network.loopback() if wanted else None
    assert os.environ.get(network.GLOO) == name
    assert os.environ.get(network.NCCL) == (name and f"={name}")


def test_a_name_of_the_user_counts_under_torchrun_and_not_with_nproc(monkeypatch):
    name = network.loopback()
    other = next((one for one in network.interfaces() if one != name), "eth0")
    monkeypatch.setattr(network, "check_gloo_interfaces", lambda _: None)
    monkeypatch.setenv(network.NCCL, other)
    monkeypatch.setenv(network.GLOO, name)
    place = place_of(RIGHT)
    assert place
    choose_interfaces(place, in_folder=False)
    assert os.environ[network.NCCL] == other
    (sentence,) = network.ignored_interfaces(os.environ)
    assert f"NCCL_SOCKET_IFNAME={other} is not used" in sentence
    choose_interfaces(place, in_folder=True)
    assert os.environ[network.NCCL] == f"={name}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_first_ranks_store_listens_on_the_named_address_alone():
    port = free_port()
    place = place_of({**RIGHT, "MASTER_PORT": str(port)})
    assert place
    others = []

    def come() -> None:
        others.append(TCPStore("127.0.0.1", port, 2, timeout=timedelta(seconds=60)))

    other = threading.Thread(target=come)
    other.start()
    store, hearts, lost = meet_over_tcp(place, timedelta(seconds=60))
    other.join()
    others[0].set("key", "value")
    assert store.get("key") == hearts.get("key") == b"value"
    assert "which rank 0 keeps" in lost
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        address, state = line.split()[1], line.split()[3]
        if state == "0A" and address.endswith(f":{port:04X}"):
            assert address.startswith("0100007F")
            break
    else:
        pytest.fail("it does not listen at all")


def test_a_port_in_use_and_ranks_that_never_come_are_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        place = place_of({**RIGHT, "MASTER_PORT": port})
        assert place
        with pytest.raises(RunError, match=f"127.0.0.1:{port}: Address already in use"):
            meet_over_tcp(place, timedelta(seconds=5))
    place = place_of({**RIGHT, "MASTER_PORT": str(free_port())})
    assert place
    with pytest.raises(RunError, match="whether all 2 ranks were started") as raised:
        meet_over_tcp(place, timedelta(seconds=1))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "said",
    [
        "[enforce fail at device.cc:83] rv != -1. nope.\nUnable to find address for: nope",
        "Gloo connectFullMesh failed with [/pytorch/gloo/pair.cc:144] no error\n",
        "NCCL error in: ProcessGroupNCCL.cpp:3690\nncclSystemError: no socket interface found",
        "std::bad_alloc: out of memory?",
        "",
    ],
)
def test_what_a_transport_says_is_one_line_with_the_interfaces(said):
    if "out of memory" in said:
        with pytest.raises(RuntimeError), forming_groups(World()):
            raise RuntimeError(said)
        return
    with pytest.raises(RunError) as raised, forming_groups(World()):
        raise RuntimeError(said)
    text = str(raised.value)
    assert " ".join(said.split()).rstrip(". ") in text
    assert f"{network.loopback()} (127.0.0.1" in text
    assert "\n" not in text


def test_where_another_rank_is_the_reason_that_is_said(tmp_path):
    store = FolderStore(tmp_path, 0)
    FolderStore(tmp_path, 1).compare_set("failed", "", "Rank 1 failed in step 3: no card.")
    dog = Watchdog(rank=0, size=2, store=store)
    dog._listen()
    with (
        pytest.raises(LostRankError, match="Rank 1 failed in step 3: no card"),
        forming_groups(World(size=2, watchdog=dog)),
    ):
        raise RuntimeError("never reached")


def test_of_a_folder_store_the_first_failure_wins(tmp_path):
    first, second = (FolderStore(tmp_path, rank) for rank in (0, 1))
    assert second.compare_set("failed", "", "mine") == b"mine"
    assert first.compare_set("failed", "", "no, mine") == b"mine"
    assert second.compare_set("failed", "", "something else") == b"mine"
    assert first.get("failed") == b"mine"


def test_a_folder_store_keeps_the_size_of_its_files(tmp_path):
    store = FolderStore(tmp_path, 0)
    for beat in range(100):
        store.set("alive/0", f"[{beat}]" * (1 + beat % 3))
    assert store.get("alive/0") == b"[99]"
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [4096]


@pytest.mark.parametrize(
    "garbage", [b"", b"0000", b"ffffffff00000000", b"0000000200000000ab", b"\x80" * 5000]
)
def test_half_a_record_is_no_value(tmp_path, garbage):
    (tmp_path / "alive-0").write_bytes(garbage)
    assert read_value(tmp_path, "alive/0") is None


def test_a_folder_that_is_gone_is_a_store_that_is_lost(tmp_path):
    store = FolderStore(tmp_path / "gone", 0)
    for ask in (lambda: store.check(["a"]), lambda: store.set("a", "b"), lambda: store.get("a")):
        with pytest.raises(DistError, match="No such file"):
            ask()
    dog = Watchdog(rank=0, size=2, store=store, lost="the folder cannot be read any more.")
    assert "the folder cannot be read any more." in dog.explain("all_reduce", late=False)


def test_values_are_whole_while_they_are_written(tmp_path):
    texts, stop = ["a" * 3000, "b" * 10], threading.Event()

    def write() -> None:
        while not stop.is_set():
            for text in texts:
                write_value(tmp_path, "alive/0", text)

    write_value(tmp_path, "alive/0", texts[0])
    writer = threading.Thread(target=write)
    writer.start()
    with suppress(AssertionError):
        found = {read_value(tmp_path, "alive/0") for _ in range(2000)}
    stop.set()
    writer.join()
    assert found <= {text.encode() for text in texts}
