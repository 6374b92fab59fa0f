"""A fleet on a Ray cluster of several machines: a silent machine, and an update."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from checkout import ROOT
from fleets.joined import JoinedFleet, joined_fleet
from fleets.machines import network
from fleets.serving import Asking, status_rows

from turret.clients.client import TurretClient

pytest.importorskip("ray")
pytestmark = pytest.mark.long

NAMES = ("sql", "json", "label")
PROMPT = "Once upon a time"
# The time until a stream ends after its machine fell silent, and the slack for busy machines.
SILENT_SECONDS, SLACK_SECONDS = 10.0, 3.0


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JoinedFleet]:
    with contextlib.ExitStack() as stack:
        try:
            machines = stack.enter_context(network(2))
        except OSError as error:
            pytest.skip(str(error))
        folder = tmp_path_factory.mktemp("machines")
        yield stack.enter_context(joined_fleet(machines, folder))


class Stream(threading.Thread):
    """Reads one answer to its end, and records the arrival of each piece."""

    def __init__(self, client: TurretClient, name: str, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self._open = lambda: client.generate_stream(
            PROMPT,
            adapters=[name] if name else [],
            max_tokens=max_tokens,
            temperature=0,
            ignore_eos=True,
        )
        self.text = ""
        self.times: list[float] = []
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            for chunk in self._open():
                self.text += chunk.text
                self.times.append(time.monotonic())
        except Exception as error:
            self.error = error
        self.times.append(time.monotonic())

    @property
    def pause(self) -> float:
        """The longest time without a piece."""
        return max(b - a for a, b in zip(self.times, self.times[1:], strict=False))


def ask(client: TurretClient, number: int) -> None:
    """One of several mixes."""
    name = (*NAMES, "")[number % 4]
    client.generate(PROMPT, adapters=[name] if name else [], max_tokens=4, temperature=0)
    time.sleep(0.1)


def until(holds: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.5)


def num_replicas(fleet: JoinedFleet) -> int:
    return len(status_rows(fleet.status()))


FLAGS = ("--adapter-root", str(ROOT / "examples" / "adapters"), "--replicas", "2")


def test_a_fleet_is_updated_under_load(fleet: JoinedFleet) -> None:
    """The command is run again with other flags.

    The previous one ends without stopping the fleet.
    """
    first = fleet.serve("first", *FLAGS, "--threads", "1")
    with TurretClient(fleet.address, max_retries=20, timeout=300.0) as client:
        uuids = {name: client.adapters.load(name, name).uuid for name in NAMES}
        assert num_replicas(fleet) == 2
        text = client.generate(PROMPT, adapters=["sql"], max_tokens=40, temperature=0).text
        before = {process.pid for process in fleet.replicas()}
        with Asking(fleet.address, ask, 2, max_retries=20) as asking:
            fleet.serve("second", *FLAGS, "--threads", "1", "--max-num-seqs", "8")
            assert first.wait(60.0) == 0
            until(lambda: len({p.pid for p in fleet.replicas()} - before) == 2, 120.0)
            until(lambda: not {p.pid for p in fleet.replicas()} & before, 120.0)
            until(lambda: num_replicas(fleet) == 2, 60.0)
        assert not asking.failures
        assert asking.num_answers > 20
        assert {name: client.adapters.get(name).uuid for name in NAMES} == uuids
        assert client.generate(PROMPT, adapters=["sql"], max_tokens=40, temperature=0).text == text


def test_a_machine_that_goes_silent_costs_its_streams_ten_seconds(fleet: JoinedFleet) -> None:
    """The streams continue elsewhere with the next token, and other requests are answered."""
    fleet.serve("third", *FLAGS, "--threads", "1")
    with TurretClient(fleet.address, max_retries=20, timeout=300.0) as client:
        for name in NAMES:
            client.adapters.load(name, name)
        until(lambda: num_replicas(fleet) == 2, 120.0)
        lose_a_machine(fleet, client)


def lose_a_machine(fleet: JoinedFleet, client: TurretClient) -> None:
    """Silence a machine; its streams continue elsewhere, and other requests are answered."""
    names = ["", *NAMES] * 2
    wanted = {
        name: client.generate(
            PROMPT, adapters=[name] if name else [], max_tokens=300, temperature=0, ignore_eos=True
        ).text
        for name in set(names)
    }
    streams = [Stream(client, name, 300) for name in names]
    with (
        TurretClient(fleet.address, resume=False, max_retries=0) as plain,
        Asking(fleet.address, ask, 2, max_retries=20) as asking,
    ):
        # With this number of streams, it is unlikely that none is on the lost machine.
        streams += [Stream(plain, name, 300) for name in ("", "", *NAMES)]
        for stream in streams:
            stream.start()
        until(lambda: all(stream.times for stream in streams), 60.0)
        fleet.network.silence(fleet.machines[1])
        silent = time.monotonic()
        for stream in streams:
            stream.join(180.0)
        broken = [stream for stream in streams if stream.error is not None]
        until(lambda: num_replicas(fleet) == 1, 30.0)
        client.adapters.load("pirate", "pirate")
    print("pauses", [round(s.pause, 2) for s in streams], asking.num_answers, asking.longest)
    print("ended", [round(s.times[-1] - silent, 2) for s in broken], broken and broken[0].error)
    assert not asking.failures
    assert asking.num_answers > 10
    assert {stream.error for stream in streams[: len(names)]} == {None}
    assert [stream.text for stream in streams[: len(names)]] == [wanted[name] for name in names]
    assert broken
    for stream in broken:
        assert stream.times[-1] - silent < SILENT_SECONDS + SLACK_SECONDS
