"""The setup hook of Ray's worker processes, without a cluster."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray")

_PREPARED = """
import asyncio, sys
import grpc.aio
import ray.util
from ray._private import ray_constants
from ray.serve._private import grpc_util
from ray.serve._private.direct_ingress_http_util import ASGIDIReceiveProxy
from ray.serve._private.haproxy import HAProxyApi
from turret.fleet.serving import ingress
from turret.fleet.serving.ingress import ingress_environment
from pathlib import Path

hook = ingress_environment(Path("/"))[ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR]
assert hook == f"{ingress.__name__}.{ingress.prepare.__name__}"


class Process:
    returncode = None

    def __init__(self):
        self.over = asyncio.Event()

    async def wait(self):
        await self.over.wait()
        return self.returncode

    def kill(self):
        self.returncode = -9
        self.over.set()


started = []


async def start(self, *arguments):
    await asyncio.sleep(0.3 if arguments else 0.0)
    started.append(Process())
    return started[-1]


HAProxyApi._start_and_wait_for_haproxy = start
ray.util.get_node_ip_address = lambda: ingress.LOOPBACK
ingress.prepare()


# The number of parts of a body that are read although the handler takes none.
async def read_ahead():
    parts = 0

    async def receive():
        nonlocal parts
        parts += 1
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b"x", "more_body": True}

    proxy = ASGIDIReceiveProxy({"type": "http"}, receive, asyncio.get_running_loop())
    task = proxy.fetch_until_disconnect_task()
    done, _ = await asyncio.wait([task], timeout=0.05)
    assert not done
    ahead = parts
    assert (await proxy())["body"] == b"x"
    task.cancel()
    return ahead


async def main():
    assert await read_ahead() == 2
    received = [v for n, v in grpc_util.DEFAULT_GRPC_SERVER_OPTIONS if "receive" in n]
    assert received == [4 << 20], received
    assert ("grpc.http2.bdp_probe", 0) in grpc_util.DEFAULT_GRPC_SERVER_OPTIONS
    server = grpc_util.gRPCGenericServer(lambda **_: None)
    unary = grpc.unary_unary_rpc_method_handler(None)
    # The changed handler starts before its message has arrived, and checks the call.
    assert server._override_method_handler("/turret.v1.Inference/Score", unary).request_streaming
    plain = grpc.aio.server()
    for each in (server, plain):
        port = each.add_insecure_port("[::]:0")
        listening = Path("/proc/net/tcp6").read_text() + Path("/proc/net/tcp").read_text()
        heard = [l.split()[1] for l in listening.splitlines() if f":{port:04X} 0" in l]
        assert heard and {h[-13:-5] for h in heard} == {"0100007F"}, heard

    api = HAProxyApi.__new__(HAProxyApi)
    api._old_procs = []
    api._proc = await api._start_and_wait_for_haproxy()
    api._proc.kill()
    await asyncio.sleep(0.1)
    assert len(started) == 2 and api._proc is started[1], started
    # A reload ends the old one before the new one is known.
    async def reload():
        api._proc = await api._start_and_wait_for_haproxy("-sf")

    reloading = asyncio.ensure_future(reload())
    await asyncio.sleep(0.1)
    started[1].kill()
    await reloading
    await asyncio.sleep(0.5)
    assert len(started) == 3 and api._proc is started[2], started
    await api.stop()
    await asyncio.sleep(0.5)
    assert len(started) == 3 and started[2].returncode == -9, started
    print("done")


asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_listens_on_loopback_and_keeps_its_haproxy() -> None:
    done = subprocess.run([sys.executable, "-c", _PREPARED], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


def test_ray_still_calls_the_patched_function() -> None:
    found = importlib.util.find_spec("ray")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).with_name("_private")
    call = "services.resolve_ip_for_localhost(_node_ip_address)"
    assert call in (folder / "worker.py").read_text()
    assert "bootstrap_host = resolve_ip_for_localhost(host)" in (folder / "services.py").read_text()
