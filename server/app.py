"""The composition root: starts everything in order, waits, and stops it in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import turret
from turret.server import log, tracing
from turret.server.adapters.state_dir import NoStateDir, open_state_dir
from turret.server.api.access import (
    NOTHING_TO_RELOAD,
    Shares,
    TokenReloader,
    TokenTable,
    most_connections,
)
from turret.server.api.gate import Backend, ServingGate
from turret.server.api.services import Services
from turret.server.basics.machine import see_only
from turret.server.basics.settings import is_local_address
from turret.server.basics.work import started_pool
from turret.server.command.entry import Hangup
from turret.server.config import Config
from turret.server.errors import AdapterExistsError, TurretError
from turret.server.log import end_bars
from turret.server.metrics import Metrics, add_aliases
from turret.server.metrics_server import MetricsServer
from turret.server.rpc import RpcServer
from turret.server.words import say

if TYPE_CHECKING:
    from turret.server.adapters.adapter import AdapterInfo
    from turret.server.adapters.registry import AdapterRegistry
    from turret.server.http.server import HttpServer

_log = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_FAILED = 1
# Time at the very end for complete answers and rejections to reach their clients.
_FLUSH_SECONDS = 2.0
# How long health checks get NOT_SERVING after the engine has failed.
_DEAD_SECONDS = 1.0

Build = Callable[[Config, Metrics, NoStateDir], Backend]
_T = TypeVar("_T")


def _build(config: Config, metrics: Metrics, state: NoStateDir) -> Backend:
    # Import this late. The server listens before torch and transformers are loaded, which takes
    # seconds. The device must be chosen before the import too, because libraries look for devices
    # when they are imported.
    see_only(config.model.device)
    from turret.server.build import build_backend

    return build_backend(config, metrics, state=state)


def _preload(registry: AdapterRegistry, name: str, path: str) -> AdapterInfo:
    """Load an adapter of ``--preload``, or replace the one that was registered before a restart.

    Raises:
        PreloadError: The adapter was rejected.
    """
    try:
        try:
            return registry.load(name, path)
        except AdapterExistsError:
            return registry.replace(name, path)
    except TurretError as error:
        said = say("PRELOAD_FAILED", name=name, path=path, problem=error.message)
        raise PreloadError(said) from error


class PreloadError(Exception):
    """An adapter of ``--preload`` that the server rejected; the text names the flag."""


class App:
    """One server process: ``startup``, ``main_loop``, ``shutdown``; ``run`` does all three.

    Args:
        config: The resolved configuration.
        build: Loads the model and creates the engine. Blocks.
        on_loaded: Called once all objects exist that live as long as the process.
    """

    def __init__(
        self,
        config: Config,
        build: Build = _build,
        on_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.metrics = Metrics()
        add_aliases(self.metrics.registry, config.telemetry.metrics_aliases)
        self.gate = ServingGate()
        self._services: Services | None = None
        self.rpc: RpcServer | None = None
        self.http: HttpServer | None = None
        self.metrics_server: MetricsServer | None = None
        self._build = build
        self._on_loaded = on_loaded
        self._backend: Backend | None = None
        self._stop = asyncio.Event()
        self._reloader: TokenReloader | None = None
        self._watching: asyncio.Future[None] | None = None

    async def run(self) -> int:
        """Serve until a stop is requested or the engine dies; returns the exit code."""
        asyncio.get_running_loop().set_default_executor(started_pool())
        with self._signals():
            try:
                await self.startup()
                code = await self.main_loop()
            except (PreloadError, TurretError, OSError, ValueError) as error:
                self._say(error)
                return EXIT_FAILED
            except Exception:
                _log.exception("the server failed")
                return EXIT_FAILED
            finally:
                await self.shutdown()
        _log.info("stopped", extra=log.fields(exit_code=code))
        return code

    def _say(self, error: Exception) -> None:
        """Report why the server does not serve, in the form of the checks before the start."""
        if self.config.log.log_format == "text":
            print(f"turret serve: error: {error}", file=sys.stderr, flush=True)
        else:
            _log.error("cannot start", extra=log.fields(reason=error))

    def stop(self) -> None:
        """Begin a graceful stop; idempotent."""
        self._stop.set()

    async def startup(self) -> None:
        """Listen at once (health NOT_SERVING, RPCs UNAVAILABLE), load the model, then serve.

        Returns early if a stop is requested meanwhile.

        Raises:
            OSError, ValueError, TurretError: A file, an address or the model is not usable.
            PreloadError: A preloaded adapter was rejected.
        """
        config = self.config
        # Another server may have started at the same time, after the checks before the start. The
        # one that comes second ends here, and not after it has loaded a model.
        limits = config.adapters
        state = open_state_dir(limits.state_dir, limits.max_upload_bytes)
        if config.telemetry.otel:
            tracing.start(self.metrics.registry)
        token_file = config.security.token_file
        tokens = TokenTable.parse(token_file) if token_file is not None else None
        self._warn_if_exposed()
        training = None
        if limits.training and limits.state_dir is not None:
            training = limits.state_dir / "training"
        self._services = services = Services(
            gate=self.gate,
            metrics=self.metrics,
            tokens=tokens,
            shares=Shares.of(config),
            most_connections=most_connections(len(config.listen.call_addresses)),
            training=training,
        )
        rpc = RpcServer(config.listen, config.security, services)
        if token_file is not None and tokens is not None:
            self._reloader = TokenReloader(token_file, tokens)
            self._watching = asyncio.ensure_future(self._reloader.run())
        if config.listen.metrics_address is not None:
            self.metrics_server = MetricsServer(self.metrics, config.listen.metrics_address, tokens)
            _log.info("metrics", extra=log.fields(address=self.metrics_server.address))
        self.rpc = rpc
        await rpc.start()
        if config.listen.http_address is not None:
            # Starlette and uvicorn are loaded only if they are used.
            from turret.server.http.server import HttpServer

            self.http = HttpServer(config.listen, config.security, services)
            await self.http.start()
            _log.info("http", extra=log.fields(address=self.http.address))
        build = functools.partial(self._build, config, self.metrics, state)
        backend = await self._unless_stopped(build, "model")
        if backend is None:
            return
        await backend.engine.start()
        self._backend = backend
        for name, path in config.adapters.preload:
            record = await self._unless_stopped(
                lambda name=name, path=path: _preload(backend.registry, name, path),
                f"adapter {name}",
            )
            if record is None:
                return
            for warning in record.facts.warnings:
                _log.warning("loaded with a warning", extra=log.fields(adapter=name, why=warning))
        model = backend.model_info
        self.metrics.info(turret.__version__, model.name, model.dtype, model.quantization)
        self._on_loaded()
        self.gate.open(backend)
        rpc.health.set_serving(True)
        _log.info("serving", extra=log.fields(model=model.name, address=rpc.address))

    async def main_loop(self) -> int:
        """Wait for a stop or the engine's death; returns the exit code."""
        if self._backend is None:
            return EXIT_OK
        engine = self._backend.engine
        stop = asyncio.ensure_future(self._stop.wait())
        dead = asyncio.ensure_future(engine.dead.wait())
        try:
            await asyncio.wait((stop, dead), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            dead.cancel()
        if engine.is_dead:
            _log.error("the engine died")
            return EXIT_FAILED
        return EXIT_OK

    async def shutdown(self) -> None:
        """Reject new calls, let running ones finish up to the grace period, close everything."""
        backend = self._backend
        is_dead = backend is not None and backend.engine.is_dead
        has_served = self.gate.is_open
        self.gate.close(say("ENGINE_FAILED") if is_dead else say("SHUTTING_DOWN"))
        if self._watching is not None:
            self._watching.cancel()
        if self.rpc is not None:
            self.rpc.health.set_serving(False)
            if is_dead:
                # Give clients that poll the health a chance to see the new status.
                await asyncio.sleep(_DEAD_SECONDS)
        if backend is not None:
            grace = self.config.lifecycle.grace_seconds
            if has_served and not is_dead:
                _log.info("draining", extra=log.fields(grace_seconds=grace))
            # A dead engine has nothing to finish; this ends its streams and joins its thread.
            await backend.engine.drain(0.0 if is_dead else grace)
            await asyncio.to_thread(backend.close)
        if self._services is not None:
            self._services.adapters.close()
        servers = [each for each in (self.rpc, self.http) if each is not None]
        await asyncio.gather(*(each.stop(_FLUSH_SECONDS) for each in servers))
        await asyncio.to_thread(tracing.stop, _FLUSH_SECONDS)
        if self.metrics_server is not None:
            await asyncio.to_thread(self.metrics_server.close)

    async def _unless_stopped(self, work: Callable[[], _T], what: str) -> _T | None:
        """Run blocking work in a thread; None if a stop is requested first.

        The thread is a daemon, because a stop during a long load must not wait for the load.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[_T] = loop.create_future()

        def settle(finish: Callable[[], None]) -> None:
            if not done.done():
                finish()

        def body() -> None:
            try:
                finish = functools.partial(done.set_result, work())
            except BaseException as error:
                finish = functools.partial(done.set_exception, error)
            # If the process stopped meanwhile, the loop is closed and nobody waits for the result.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, finish)

        threading.Thread(target=body, name=f"load {what}", daemon=True).start()
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((stop, done), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
        if done.done():
            return done.result()
        done.cancel()
        end_bars()
        _log.info("stopped while loading", extra=log.fields(what=what))
        return None

    def _warn_if_exposed(self) -> None:
        listen = self.config.listen
        exposed = [a for a in listen.call_addresses if not is_local_address(a)]
        if exposed and not self.config.security.is_complete:
            _log.warning(
                "serving other machines without TLS or without tokens",
                extra=log.fields(addresses=",".join(exposed)),
            )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Handle signals in the block.

        The first SIGTERM or SIGINT stops the server gracefully, the second at once. SIGHUP reloads
        the token file, or stops the server if its terminal was closed.
        """
        loop = asyncio.get_running_loop()
        is_main = threading.current_thread() is threading.main_thread()
        kinds = (signal.SIGTERM, signal.SIGINT) if is_main else ()

        def received(kind: signal.Signals) -> None:
            if self._stop.is_set():
                _log.warning("second signal: stopping at once")
                os._exit(128 + kind)
            _log.info("stopping", extra=log.fields(signal=kind.name))
            self._stop.set()

        hangup = Hangup()

        def reload() -> None:
            if hangup.is_of_terminal():
                received(signal.SIGHUP)
            elif self._reloader is not None:
                self._reloader.reload()
            elif self.config.security.token_file is None:
                _log.info(NOTHING_TO_RELOAD)

        for kind in kinds:
            loop.add_signal_handler(kind, received, kind)
        if is_main:
            loop.add_signal_handler(signal.SIGHUP, reload)
        try:
            yield
        finally:
            for kind in kinds:
                loop.remove_signal_handler(kind)
            if is_main:
                loop.remove_signal_handler(signal.SIGHUP)
