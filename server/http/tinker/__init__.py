"""The Tinker API (``/api/v1``), which trains adapters on the base model that is served."""

from __future__ import annotations

from functools import partial
from typing import Any

from turret.server.api.access import TRAINING
from turret.server.http.endpoint import Handler, Route
from turret.server.http.fields import Body
from turret.server.http.tinker import listing, sampling, schemas, sessions, training

_API = "/api/v1"
_RUN = "/training_runs/{run}"
_CHECKPOINT = f"{_RUN}/checkpoints/{{kind}}/{{name}}"


def _route(path: str, handler: Handler, body: type[Body] | None = None, **more: Any) -> Route:
    return Route(f"{_API}{path}", handler, body, **{"service": TRAINING, "is_hidden": True, **more})


def _command(path: str, work: training.Work, body: type[Body]) -> Route:
    return _route(path, partial(training.command, work, body), body)


_often = partial(_route, is_frequent=True)
ROUTES: tuple[Route, ...] = (
    # The client makes these calls by itself.
    _route("/client/config", sessions.config, schemas.Anything),
    _often("/client/dynamic_config", sessions.dynamic_config, schemas.Anything),
    _route("/get_server_capabilities", sessions.capabilities),
    _route("/healthz", sessions.healthz, service=""),
    _often("/telemetry", sessions.telemetry, schemas.Anything),
    _route("/create_session", sessions.create_session, schemas.Typed),
    _often("/session_heartbeat", sessions.heartbeat, schemas.OfSession),
    _route("/sessions/{session}/finish", sessions.finish, schemas.Anything),
    _often("/retrieve_future", sessions.retrieve, schemas.OfRequest),
    _route("/cancel_future", sessions.cancel, schemas.OfRequest),
    # Training.
    _route("/create_model", training.create_model, schemas.CreateModel),
    _route("/get_info", training.get_info, schemas.OfModel),
    _route("/unload_model", training.unload_model, schemas.OfModel),
    _route("/forward_backward", training.forward_backward, is_raw=True),
    _command("/optim_step", training.optim_step, schemas.OptimStep),
    _command("/save_weights", training.save_weights, schemas.SaveWeights),
    _command("/save_weights_for_sampler", training.save_for_sampler, schemas.SaveForSampler),
    _command("/save_weights_external", training.save_external, schemas.SaveExternal),
    _route("/load_weights", training.load_weights, schemas.LoadWeights),
    # Sampling.
    _route("/create_sampling_session", sampling.create_sampler, schemas.CreateSampler),
    _route("/samplers/{sampler}", sampling.get_sampler),
    _route("/asample", sampling.sample, schemas.Sample),
    # Checkpoints and runs.
    _route("/weights_info", listing.weights_info, schemas.OfPath),
    _route("/checkpoints", listing.list_checkpoints),
    _route("/training_runs", listing.list_runs),
    _route(_RUN, listing.get_run),
    _route(f"{_RUN}/checkpoints", listing.list_run_checkpoints),
    _route(_CHECKPOINT, listing.delete_checkpoint, verb="DELETE"),
    _route(f"{_CHECKPOINT}/ttl", listing.set_ttl, schemas.Ttl, verb="PUT"),
    _route(f"{_CHECKPOINT}/archive", listing.archive),
    _route(f"{_CHECKPOINT}/external_weights_urls", listing.file_urls),
    _route("/archives/{secret}", listing.download, service=""),
)
