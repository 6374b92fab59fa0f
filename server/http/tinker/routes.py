"""All paths of the Tinker API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from turret.server.http.endpoint import TRAINING, Exchange, Json, Route
from turret.server.http.fields import Body
from turret.server.http.tinker import listing, sampling, schemas, sessions, training
from turret.server.http.tinker.sessions import TinkerState

_Handler = Callable[..., Awaitable[Json | None]]
_API = "/api/v1"
_RUN = "/training_runs/{run}"
_CHECKPOINT = f"{_RUN}/checkpoints/{{kind}}/{{name}}"


def routes(state: TinkerState) -> tuple[Route, ...]:
    """The routes, whose handlers share the state."""

    def route(path: str, handler: _Handler, body: type[Body] | None = None, **more: Any) -> Route:
        """A route; ``handler`` takes the state and the exchange."""
        fields: dict[str, Any] = {"service": TRAINING, "is_hidden": True, **more}
        return Route(f"{_API}{path}", partial(handler, state), body, **fields)

    def sent(path: str, handler: _Handler, body: type[Body], **more: Any) -> Route:
        """A route whose handler also takes the body."""

        async def handle(state: TinkerState, exchange: Exchange) -> Json | None:
            return await handler(state, exchange, exchange.take_body().checked(body))

        return route(path, handle, body, **more)

    def command(path: str, work: training.Work, body: type[Body]) -> Route:
        return route(path, partial(training.command, work, body), body)

    often = partial(sent, is_frequent=True)
    return (
        # The client makes these calls by itself.
        sent("/client/config", sessions.config, schemas.Anything),
        often("/client/dynamic_config", sessions.dynamic_config, schemas.Anything),
        route("/get_server_capabilities", sessions.capabilities),
        route("/healthz", sessions.healthz, service=""),
        often("/telemetry", sessions.telemetry, schemas.Anything),
        sent("/create_session", sessions.create_session, schemas.Typed),
        often("/session_heartbeat", sessions.heartbeat, schemas.OfSession),
        sent("/sessions/{session}/finish", sessions.finish, schemas.Anything),
        often("/retrieve_future", sessions.retrieve, schemas.OfRequest),
        sent("/cancel_future", sessions.cancel, schemas.OfRequest),
        # Training.
        sent("/create_model", training.create_model, schemas.CreateModel),
        sent("/get_info", training.get_info, schemas.OfModel),
        sent("/unload_model", training.unload_model, schemas.OfModel),
        route("/forward_backward", training.forward_backward, is_raw=True),
        command("/optim_step", training.optim_step, schemas.OptimStep),
        command("/save_weights", training.save_weights, schemas.SaveWeights),
        command("/save_weights_for_sampler", training.save_for_sampler, schemas.SaveForSampler),
        command("/save_weights_external", training.save_external, schemas.SaveExternal),
        route("/load_weights", training.load_weights, schemas.LoadWeights),
        # Sampling.
        sent("/create_sampling_session", sampling.create_sampler, schemas.CreateSampler),
        route("/samplers/{sampler}", sampling.get_sampler),
        sent("/asample", sampling.sample, schemas.Sample),
        # Checkpoints and runs.
        sent("/weights_info", listing.weights_info, schemas.OfPath),
        route("/checkpoints", listing.list_checkpoints),
        route("/training_runs", listing.list_runs),
        route(_RUN, listing.get_run),
        route(f"{_RUN}/checkpoints", listing.list_run_checkpoints),
        route(_CHECKPOINT, listing.delete_checkpoint, verb="DELETE"),
        sent(f"{_CHECKPOINT}/ttl", listing.set_ttl, schemas.Ttl, verb="PUT"),
        route(f"{_CHECKPOINT}/archive", listing.archive),
        route(f"{_CHECKPOINT}/external_weights_urls", listing.file_urls),
        route("/archives/{secret}", listing.download, service=""),
    )
