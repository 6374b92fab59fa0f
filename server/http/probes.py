"""GET /health and /metrics."""

from __future__ import annotations

import asyncio

from prometheus_client.exposition import choose_encoder

from turret.server.api.inference.inference import Inference
from turret.server.http.endpoint import Exchange
from turret.server.metrics import Metrics


class Probes:
    """Answers those who watch the server.

    Args:
        inference: Knows whether calls are served.
        metrics: What is counted.
    """

    def __init__(self, inference: Inference, metrics: Metrics) -> None:
        self._inference = inference
        self._metrics = metrics

    async def health(self, exchange: Exchange) -> None:
        """200 while calls are served.

        Raises:
            UnavailableError: The server is starting, draining or dead.
        """
        self._inference.model()
        await exchange.reply.json({"status": "ok"})

    async def metrics(self, exchange: Exchange) -> None:
        """Every series, as text for Prometheus."""
        encode, content_type = choose_encoder(exchange.headers.get("accept", ""))
        body = await asyncio.to_thread(encode, self._metrics.registry)
        await exchange.reply.whole(body, 200, {"content-type": content_type})
