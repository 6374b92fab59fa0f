"""An upload that the server rejects early ends with the server's error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from turret import AsyncTurretClient, TurretClient
from turret.clients.errors import AlreadyExistsError, UnavailableError
from turret.v1 import adapters_pb2, adapters_pb2_grpc

# With this number and size, gRPC's own client lost the status of about every second upload.
UPLOADS = 25
FILE_BYTES = 8 << 20


class Refusing(adapters_pb2_grpc.AdaptersServicer):
    """A server that rejects the name after the first message."""

    async def UploadAdapter(
        self,
        request_iterator: AsyncIterator[adapters_pb2.UploadAdapterRequest],
        context: grpc.aio.ServicerContext[adapters_pb2.UploadAdapterRequest, adapters_pb2.Adapter],
    ) -> adapters_pb2.Adapter:
        async for _ in request_iterator:
            break
        await context.abort(grpc.StatusCode.ALREADY_EXISTS, "taken", (("x-request-id", "the-id"),))
        raise AssertionError


@pytest.fixture
async def address() -> AsyncIterator[str]:
    server = grpc.aio.server()
    adapters_pb2_grpc.add_AdaptersServicer_to_server(Refusing(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files that are sent in chunks of a megabyte, as by other clients."""
    monkeypatch.setattr("turret.clients.messages.adapter_files._CHUNK_BYTES", 1 << 20)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(FILE_BYTES))
    return tmp_path


async def test_an_early_status_from_the_server_is_raised(address: str, adapter: Path) -> None:
    async with AsyncTurretClient(address) as client:
        for _ in range(UPLOADS):
            with pytest.raises(AlreadyExistsError, match="taken") as caught:
                await client.adapters.upload("a", adapter)
            assert caught.value.request_id == "the-id"


async def test_a_synchronous_client_raises_an_early_status(address: str, adapter: Path) -> None:
    def upload() -> None:
        with TurretClient(address) as client, pytest.raises(AlreadyExistsError, match="taken"):
            client.adapters.upload("a", adapter)

    await asyncio.to_thread(upload)


async def test_an_upload_without_a_server_raises_the_usual_error(adapter: Path) -> None:
    async with AsyncTurretClient("127.0.0.1:1", max_retries=0) as client:
        with pytest.raises(UnavailableError) as raised:
            await client.adapters.upload("a", adapter)
    assert raised.value.reason == "NOT_REACHED"
