"""The client of a turret server.

    async with AsyncTurretClient("127.0.0.1:50051") as client:
        await client.adapters.load("sql", "sql-lora")
        answer = await client.chat("How many?", adapters=["sql", ("json", -0.5)], temperature=0)
        print(answer.text)
        async for chunk in client.generate_stream("Once upon a time", max_tokens=64):
            print(chunk.text, end="")

Every failed call raises :class:`~turret.clients.errors.TurretRpcError`.
"""
# `timeout` is the call's deadline, which travels to the server; asyncio.timeout would not.
# ruff: noqa: ASYNC109

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from typing import Any, ClassVar, ParamSpec, Self, TypeVar, Unpack

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from turret.clients.adapter_files import ExportWriter, NewDirectory, upload_messages
from turret.clients.calls import (
    AnswerProgress,
    AsyncConnection,
    AsyncGenerationStream,
    BlockingConnection,
    CallSettings,
    Retries,
    RetryPolicy,
    call,
    stream_timeout,
    waiting,
)
from turret.clients.channel import DEFAULT_ADDRESS, Tls, check_address
from turret.clients.errors import TurretRpcError
from turret.clients.fields import ArgumentTypeError
from turret.clients.requests import (
    AdaptersLike,
    AdapterWeight,
    GenerateOptions,
    MessageLike,
    Prompt,
    TrainingDatum,
    chat_messages,
    filled,
    generate_request,
    pass_requests,
    to_mix,
)
from turret.clients.results import (
    Adapter,
    Alias,
    Checkpoint,
    Classifications,
    Completion,
    Embeddings,
    Fusion,
    MergeState,
    Model,
    PassResult,
    Result,
    Score,
    StepResult,
    Tokens,
    TrainedModel,
)
from turret.clients.words import say
from turret.v1 import adapters_pb2, inference_pb2, training_pb2

__all__ = [
    "AdapterWeight",
    "AsyncAdaptersClient",
    "AsyncGenerationStream",
    "AsyncTurretClient",
    "Tls",
    "TurretRpcError",
]

# Calls that are not retried, because executing them twice would have another effect.
_NOT_REPEATABLE = (
    *("ReplaceAdapter", "RollbackAdapter", "UnloadAdapter", "DeleteAlias"),
    *("MergeAdapters", "UnmergeAdapters"),
    *("CreateModel", "DeleteModel", "ForwardBackward", "OptimStep"),
    *("SaveCheckpoint", "DeleteCheckpoint", "PublishModel"),
)
_P = ParamSpec("_P")
_T = TypeVar("_T")


def _rpc(
    name: str, kind: type[Result] | None, listed: str = "", make: Callable[..., Any] | None = None
) -> Callable[[Callable[_P, Awaitable[_T]]], Callable[_P, Coroutine[Any, Any, _T]]]:
    """Implement a method as an RPC. The arguments become the fields of its request.

    The method's own body never runs: its signature alone defines the request.

    Args:
        name: The name of the RPC.
        kind: The class of the result; None for a response without fields.
        listed: The field of the response with a list of results; empty for a single result.
        make: Makes the messages of a call that sends several; None for a single request.
    """

    def implement(
        method: Callable[_P, Awaitable[_T]],
    ) -> Callable[_P, Coroutine[Any, Any, _T]]:
        signature = inspect.signature(method)

        @functools.wraps(method)
        async def run(*args: _P.args, **kwargs: _P.kwargs) -> Any:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{method.__name__}() {error}") from None
            bound.apply_defaults()
            client, timeout = bound.arguments.pop("self"), bound.arguments.pop("timeout")
            request = None if make else client._request(name, **bound.arguments)
            sent = functools.partial(make, **bound.arguments) if make else lambda: request
            answer = await client._answer(name, timeout, sent, client._mix(request))
            if listed and kind is not None:
                return tuple(map(kind.from_proto, getattr(answer, listed)))
            return kind.from_proto(answer) if kind else None

        return run

    return implement


class ServiceClient:
    """Sends the requests of one service, over an asyncio connection or a blocking one."""

    _service: ClassVar[ServiceDescriptor]
    _connection: AsyncConnection | BlockingConnection
    _settings: CallSettings

    def _request(self, rpc: str, **values: Any) -> Any:
        return filled(GetMessageClass(self._service.methods_by_name[rpc].input_type)(), **values)

    def _mix(self, request: Any) -> Iterable[adapters_pb2.AdapterWeight]:
        """The mix that a load balancer should know for this request; empty if none."""
        return ()

    async def _answer(
        self,
        rpc: str,
        timeout: float | None,
        make_request: Callable[[], Any],
        mix: Iterable[adapters_pb2.AdapterWeight] = (),
    ) -> Any:
        return await call(
            self._connection,
            getattr(getattr(self._connection, self._service.name.lower()), rpc),
            make_request,
            self._settings.routed(mix),
            timeout,
            repeatable=rpc not in _NOT_REPEATABLE,
        )


class InferenceBase(ServiceClient):
    """The base class of both clients; arguments are those of ``TurretClient``."""

    _service = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
    _connection_class: ClassVar[type[AsyncConnection | BlockingConnection]]

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        admin_address: str | None = None,
        timeout: float | None = 600.0,
        max_retries: int | RetryPolicy = 2,
        resume: bool = True,
    ) -> None:
        if not isinstance(resume, bool):
            raise ArgumentTypeError("resume", say("NOT_TRUE_OR_FALSE", value=repr(resume)))
        self._resume = resume
        is_policy = isinstance(max_retries, RetryPolicy)
        policy = max_retries if is_policy else RetryPolicy(max_retries)
        self._settings = CallSettings.of(token, timeout, policy)
        check_address(address, tls)
        if admin_address is not None:
            check_address(admin_address, tls, "admin_address")
        self._connection = self._connection_class(address, admin_address, tls)

    async def _close(self) -> None:
        self._settings.closed.set()
        await self._connection.close()

    def _mix(self, request: Any) -> Iterable[adapters_pb2.AdapterWeight]:
        return getattr(request, "adapters", ())

    async def _generate(
        self, prompt: Prompt, timeout: float | None, options: GenerateOptions
    ) -> Completion:
        request = generate_request(prompt, options)
        answer = await self._answer("Generate", timeout, lambda: request, request.adapters)
        return Completion.from_proto(answer)

    def _stream(
        self, prompt: Prompt, timeout: float | None, options: GenerateOptions
    ) -> AsyncGenerationStream:
        request = generate_request(prompt, options)
        settings = self._settings.routed(request.adapters)
        retries = Retries(settings.policy, stream_timeout(timeout))
        progress = AnswerProgress(request, retries, resume=self._resume)
        return AsyncGenerationStream(self._connection, progress, settings)


class AsyncTurretClient(InferenceBase):
    """Calls a turret server, with asyncio.

    Arguments are those of :class:`~turret.clients.client.TurretClient`. Create and use a client in
    one running event loop; elsewhere it raises RuntimeError. Cancelling the task that awaits a call
    stops the request on the server.
    """

    _connection_class = AsyncConnection

    @functools.cached_property
    def adapters(self) -> AsyncAdaptersClient:
        """The client of the ``Adapters`` service."""
        return AsyncAdaptersClient(self._connection, self._settings)

    @functools.cached_property
    def training(self) -> AsyncTrainingClient:
        """The client of the ``Training`` service."""
        return AsyncTrainingClient(self._connection, self._settings)

    async def close(self) -> None:
        """Close the client. Running calls raise CallCancelledError, later ones RuntimeError."""
        await self._close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._close()

    async def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Completion:
        """Complete a prompt.

        Args:
            prompt: Text, used as it is; token ids; or the turns of a conversation.
            timeout: Deadline in seconds.
            **options: See :class:`~turret.clients.requests.GenerateOptions`.

        Raises:
            AnswerCutError: The server stopped during the call, and no other server completed the
                answer. The error contains the partial answer.
            TurretRpcError: The server rejected the call or failed.
            TypeError: An option is unknown or has the wrong type.
            ValueError: A value does not fit its field.
        """
        return await self._generate(prompt, timeout, options)

    def generate_stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerationStream:
        """Complete a prompt, chunk by chunk. The request starts at once.

        Arguments and errors are those of :meth:`generate`. If the server rejects the request, the
        first iteration raises the error; ``AnswerCutError`` is raised after the last chunk.
        """
        return self._stream(prompt, timeout, options)

    async def chat(
        self,
        messages: str | Sequence[MessageLike],
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """Answer a conversation, or a user's single message, through the chat template.

        Other arguments and errors are those of :meth:`generate`.
        """
        return await self._generate(chat_messages(messages), timeout, options)

    def chat_stream(
        self,
        messages: str | Sequence[MessageLike],
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerationStream:
        """Answer as :meth:`chat` does, chunk by chunk."""
        return self._stream(chat_messages(messages), timeout, options)

    @_rpc("Score", Score)
    async def score(
        self,
        prompt: Prompt,
        *,
        adapters: AdaptersLike = (),
        top_n: int = 0,
        request_id: str = "",
        timeout: float | None = None,
    ) -> Score:
        """Compute the log probability of every token of a prompt.

        Args:
            prompt: As in :meth:`generate`.
            adapters: The mix; empty means the base model.
            top_n: How many of the likeliest tokens are reported for each position.
            request_id: Identifies the request in the server's log.
            timeout: Deadline in seconds.
        """
        ...

    @_rpc("Embed", Embeddings)
    async def embed(
        self,
        inputs: str | Sequence[Prompt],
        *,
        adapters: AdaptersLike = (),
        pooling: str | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        request_id: str = "",
        timeout: float | None = None,
    ) -> Embeddings:
        """Turn each input into a vector.

        Args:
            inputs: A text, or a list of prompts as in :meth:`generate`.
            adapters: The mix; empty means the base model.
            pooling: ``last`` (the final state of the last token, the server's default) or ``mean``.
            normalize: Whether each vector has length 1; None means yes.
            dimensions: How many leading numbers of each vector to keep; None means all.
            request_id: Identifies the request in the server's log.
            timeout: Deadline in seconds.
        """
        ...

    @_rpc("Classify", Classifications)
    async def classify(
        self,
        inputs: str | Sequence[Prompt],
        *,
        adapters: AdaptersLike,
        request_id: str = "",
        timeout: float | None = None,
    ) -> Classifications:
        """Label each input, using an adapter that has a classification head.

        Args:
            inputs: A text, or a list of prompts as in :meth:`generate`.
            adapters: The mix; exactly one member must have a head.
            request_id: Identifies the request in the server's log.
            timeout: Deadline in seconds.
        """
        ...

    @_rpc("Tokenize", Tokens)
    async def tokenize(
        self,
        prompt: Prompt,
        *,
        adapters: AdaptersLike = (),
        timeout: float | None = None,
    ) -> Tokens:
        """Convert text or a conversation to token ids, or token ids to text.

        Args:
            prompt: As in :meth:`generate`.
            adapters: The mix, one of whose adapters may have its own tokenizer.
            timeout: Deadline in seconds.
        """
        ...

    @_rpc("GetModel", Model)
    async def get_model(self, *, timeout: float | None = None) -> Model:
        """Describe the base model and the server."""
        ...


class _PartClient(ServiceClient):
    """A client that is part of another one, and uses its connection."""

    def __init__(
        self, connection: AsyncConnection | BlockingConnection, settings: CallSettings
    ) -> None:
        self._connection = connection
        self._settings = settings

    async def _receive(
        self, rpc: Any, request: Any, timeout: float | None, take: Callable[[Any], None]
    ) -> None:
        """Pass each message of a stream to ``take``."""
        seconds = stream_timeout(timeout)
        call = rpc(request, timeout=seconds, metadata=self._settings.metadata)
        try:
            with waiting(self._settings):
                async for message in self._connection.responses(call):
                    take(message)
        except grpc.RpcError as error:
            raise self._settings.failure(error, seconds) from None
        finally:
            call.cancel()


class AdaptersBase(_PartClient):
    """The base class of the clients of the ``Adapters`` service."""

    _service = adapters_pb2.DESCRIPTOR.services_by_name["Adapters"]


class AsyncAdaptersClient(AdaptersBase):
    """Manages a server's adapters. Use it as ``client.adapters`` of an ``AsyncTurretClient``.

    Calls go to the client's ``admin_address``. Every method raises
    :class:`~turret.clients.errors.TurretRpcError` if the server rejects the call or fails.
    ``timeout`` is a deadline in seconds.
    """

    @_rpc("LoadAdapter", Adapter)
    async def load(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        pinned: bool = False,
        task: int | None = None,
        chat_template: str | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Register the adapter in ``path``.

        The path is a directory relative to the server's adapter root, or begins with ``hub:``,
        ``s3://`` or ``oci://``. If the files contain several tasks, ``task`` chooses one of them.
        ``chat_template`` is a Jinja template to use instead of the one in the files.
        """
        ...

    @_rpc("UploadAdapter", Adapter, make=upload_messages)
    async def upload(
        self,
        name: str,
        directory: str | os.PathLike[str],
        *,
        pinned: bool = False,
        replace: bool = False,
        expected_generation: int | None = None,
        task: int | None = None,
        chat_template: str | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Send an adapter's files and register it, or with ``replace`` a new generation of it.

        Raises:
            FileNotFoundError: The directory contains no adapter.
            ValueError: One of the files is empty.
        """
        ...

    @_rpc("ReplaceAdapter", Adapter)
    async def replace(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        expected_generation: int | None = None,
        task: int | None = None,
        chat_template: str | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Make the weights in ``path`` (as in :meth:`load`) the adapter's new generation.

        With ``expected_generation``, the call succeeds only if that is the current generation: if
        two callers replace the same generation, the second gets
        :class:`~turret.clients.errors.FailedPreconditionError`.
        """
        ...

    @_rpc("RollbackAdapter", Adapter)
    async def rollback(
        self,
        name: str,
        *,
        generation: int | None = None,
        expected_generation: int | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Make a kept generation the adapter's current one again.

        The default ``generation`` is the highest kept one below the current one.
        ``expected_generation`` is as in :meth:`replace`.
        """
        ...

    @_rpc("GetAdapter", Adapter)
    async def get(
        self, name: str, *, generation: int | None = None, timeout: float | None = None
    ) -> Adapter:
        """Return one adapter, with its current generation or the given one."""
        ...

    def list(
        self,
        *,
        method: str | None = None,
        residency: str | None = None,
        page_size: int = 0,
        timeout: float | None = None,
    ) -> AsyncIterator[Adapter]:
        """Iterate over the adapters by name; pages are fetched as they are needed.

        Args:
            method: A method such as ``lora``; None means any.
            residency: ``disk``, ``host`` or ``device``; None means any.
            page_size: Adapters per call; 0 means the server's default.
            timeout: Deadline in seconds of each page.

        Raises:
            ValueError: The residency is unknown.
        """
        values = {"method": method, "residency": residency, "page_size": page_size}
        return self._pages(self._request("ListAdapters", **values), timeout)

    async def _pages(
        self, request: adapters_pb2.ListAdaptersRequest, timeout: float | None
    ) -> AsyncIterator[Adapter]:
        while True:
            page = await self._answer("ListAdapters", timeout, lambda: request)
            for adapter in page.adapters:
                yield Adapter.from_proto(adapter)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    @_rpc("UnloadAdapter", None)
    async def unload(
        self,
        name: str,
        *,
        mode: str = "drain",
        drain_seconds: float | None = None,
        expected_generation: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Unregister an adapter.

        Args:
            name: A registered name.
            mode: ``drain`` lets the requests that use it finish, ``force`` aborts them.
            drain_seconds: Longest wait for these requests; None means the server's default.
            expected_generation: As in :meth:`replace`.
            timeout: Deadline in seconds.

        Raises:
            ValueError: The mode is unknown.
        """
        ...

    @_rpc("PinAdapter", Adapter)
    async def pin(self, name: str, *, timeout: float | None = None) -> Adapter:
        """Keep an adapter in memory and registered until it is unpinned."""
        ...

    @_rpc("UnpinAdapter", Adapter)
    async def unpin(self, name: str, *, timeout: float | None = None) -> Adapter:
        """Allow an adapter to be evicted and unloaded again."""
        ...

    async def set_alias(
        self, name: str, targets: AdaptersLike, *, timeout: float | None = None
    ) -> Alias:
        """Point a name at one or several generations, among which requests are divided.

        Args:
            name: The name that requests use.
            targets: One or several adapters with their generations and weights, such as
                ``AdapterWeight("sql", generation=7)``. A target without a generation gets the one
                that is current now.
            timeout: Deadline in seconds.
        """
        request = self._request("SetAlias", name=name)
        for target in to_mix(targets):
            made = request.targets.add(name=target.name)
            if target.HasField("weight"):
                # A mix's weights have single precision: send 0.9, not 0.8999999761581421.
                made.weight = float(f"{target.weight:.7g}")
            if target.HasField("generation"):
                made.generation = target.generation
        return Alias.from_proto(await self._answer("SetAlias", timeout, lambda: request))

    @_rpc("DeleteAlias", None)
    async def delete_alias(self, name: str, *, timeout: float | None = None) -> None:
        """Delete an alias."""
        ...

    @_rpc("ListAliases", Alias, "aliases")
    async def list_aliases(self, *, timeout: float | None = None) -> tuple[Alias, ...]:
        """Return all aliases, by name."""
        ...

    @_rpc("FuseAdapters", Fusion)
    async def fuse(
        self,
        name: str,
        adapters: AdaptersLike,
        *,
        combination: str | None = None,
        rank: int | None = None,
        energy: float | None = None,
        density: float | None = None,
        majority_sign_method: str | None = None,
        seed: int | None = None,
        timeout: float | None = None,
    ) -> Fusion:
        """Fuse a mix into a new adapter; arguments are the fields of ``FuseAdaptersRequest``."""
        ...

    @_rpc("MergeAdapters", MergeState)
    async def merge(
        self,
        adapters: AdaptersLike,
        *,
        precision: str = "auto",
        timeout: float | None = None,
    ) -> MergeState:
        """Merge a mix into the base model.

        ``precision`` is that of the merged weights: ``nf4``, ``bf16``, or ``auto``, which chooses
        ``nf4`` if that keeps the update, and otherwise ``bf16``.

        Raises:
            ValueError: The precision is unknown.
        """
        ...

    @_rpc("UnmergeAdapters", MergeState)
    async def unmerge(self, *, timeout: float | None = None) -> MergeState:
        """Restore the base model."""
        ...

    @_rpc("GetMergeState", MergeState)
    async def get_merge_state(self, *, timeout: float | None = None) -> MergeState:
        """Return the mix that is merged into the base model."""
        ...

    async def export(
        self,
        name: str,
        directory: str | os.PathLike[str],
        *,
        generation: int | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Write an adapter's files, in PEFT's layout, to a new directory.

        Raises:
            FileExistsError: The directory already exists.
            ValueError: The received files are incomplete or damaged.
        """
        request = self._request("ExportAdapter", name=name, generation=generation)
        with ExportWriter(directory) as writer:
            await self._receive(
                self._connection.adapters.ExportAdapter, request, timeout, writer.write
            )
            return Adapter.from_proto(writer.finish())


class TrainingBase(_PartClient):
    """The base class of the clients of the ``Training`` service."""

    _service = training_pb2.DESCRIPTOR.services_by_name["Training"]


class AsyncTrainingClient(TrainingBase):
    """Trains adapters on a server with ``--training``; use it as ``client.training``.

    The calls for one model run one after the other, in the order in which they arrive. Every method
    raises :class:`~turret.clients.errors.TurretRpcError` if the server rejects the call or fails.
    ``timeout`` is a deadline in seconds. The server completes a call that it has accepted, even
    after the deadline.
    """

    @_rpc("CreateModel", TrainedModel)
    async def create_model(
        self,
        *,
        rank: int,
        method: str = "lora",
        seed: int | None = None,
        alpha: float | None = None,
        targets: Sequence[str] = (),
        train_attn: bool = True,
        train_mlp: bool = True,
        train_unembed: bool = False,
        timeout: float | None = None,
    ) -> TrainedModel:
        """Create an adapter in training.

        Args:
            rank: The rank of the adapter.
            method: The method, such as ``lora``; see docs/tenants.md.
            seed: Determines the initial weights; None for random ones.
            alpha: The update is scaled by alpha divided by the rank; None for 32.
            targets: The trained modules, such as ``q_proj``; empty if the next three arguments
                choose them.
            train_attn: Whether the projections of attention are trained.
            train_mlp: Whether the projections of MLPs are trained.
            train_unembed: Whether the head is trained.
            timeout: Deadline in seconds.
        """
        ...

    @_rpc("ListModels", TrainedModel, "models")
    async def list_models(self, *, timeout: float | None = None) -> tuple[TrainedModel, ...]:
        """Return the models of the client's bearer token."""
        ...

    @_rpc("DeleteModel", None)
    async def delete_model(self, model_id: str, *, timeout: float | None = None) -> None:
        """Drop a model, and the adapter that ``publish_model`` registered."""
        ...

    async def forward_backward(
        self,
        model_id: str,
        data: Sequence[TrainingDatum],
        *,
        loss: str = "cross_entropy",
        loss_config: Mapping[str, float] | None = None,
        forward_only: bool = False,
        timeout: float | None = None,
    ) -> PassResult:
        """Compute losses, and add their gradients to those since the last ``optim_step``.

        A long list is sent in several calls. If one fails, the gradients of earlier calls are kept.

        Args:
            model_id: The model.
            data: The sequences.
            loss: ``cross_entropy``, ``importance_sampling``, ``ppo``, ``cispo`` or ``dro``.
            loss_config: Settings of the loss.
            forward_only: Whether to compute no gradients.
            timeout: Deadline of each call in seconds.

        Raises:
            TypeError: A value has the wrong type.
            ValueError: A value does not fit its field.
        """
        results, total = [], 0.0
        for request in pass_requests(model_id, data, loss, loss_config, forward_only):
            answer = await self._answer("ForwardBackward", timeout, lambda each=request: each)
            found = PassResult.from_proto(answer)
            results += found.results
            total += found.loss
        return PassResult(tuple(results), total)

    @_rpc("OptimStep", StepResult)
    async def optim_step(
        self,
        model_id: str,
        *,
        learning_rate: float,
        beta1: float | None = None,
        beta2: float | None = None,
        eps: float | None = None,
        weight_decay: float = 0.0,
        grad_clip_norm: float = 0.0,
        timeout: float | None = None,
    ) -> StepResult:
        """Update the weights with AdamW, using the gradients added since the last step.

        Args:
            model_id: The model.
            learning_rate: The learning rate.
            beta1: The decay of the mean of gradients; None for 0.9.
            beta2: The decay of the mean of squared gradients; None for 0.95.
            eps: The number that is added to the denominator; None for 1e-12.
            weight_decay: The weight decay.
            grad_clip_norm: The norm to which larger gradients are clipped; 0 for no clipping.
            timeout: Deadline in seconds.
        """
        ...

    @_rpc("SaveCheckpoint", Checkpoint)
    async def save_checkpoint(
        self, model_id: str, name: str, *, overwrite: bool = False, timeout: float | None = None
    ) -> Checkpoint:
        """Save a model with its optimizer; ``overwrite`` replaces a checkpoint of that name."""
        ...

    @_rpc("LoadCheckpoint", TrainedModel)
    async def load_checkpoint(
        self, model_id: str, path: str, *, optimizer: bool = True, timeout: float | None = None
    ) -> TrainedModel:
        """Continue a model from a checkpoint of the same config, by default with its optimizer."""
        ...

    @_rpc("ListCheckpoints", Checkpoint, "checkpoints")
    async def list_checkpoints(self, *, timeout: float | None = None) -> tuple[Checkpoint, ...]:
        """Return the checkpoints of the client's bearer token, the newest first."""
        ...

    async def export_checkpoint(
        self, path: str, directory: str | os.PathLike[str], *, timeout: float | None = None
    ) -> None:
        """Write the adapter of a checkpoint, in PEFT's layout, to a new directory.

        Raises:
            FileExistsError: The directory already exists.
        """
        request = self._request("ExportCheckpoint", path=path)
        rpc = self._connection.training.ExportCheckpoint
        with NewDirectory(directory) as writer:
            await self._receive(
                rpc, request, timeout, lambda piece: writer.append(piece.file, piece.data)
            )
            writer.complete()

    @_rpc("DeleteCheckpoint", None)
    async def delete_checkpoint(self, path: str, *, timeout: float | None = None) -> None:
        """Delete a checkpoint."""
        ...

    async def publish_model(self, model_id: str, *, timeout: float | None = None) -> AdapterWeight:
        """Register the current weights for sampling; returns a member for ``adapters``."""
        request = self._request("PublishModel", model_id=model_id)
        answer = await self._answer("PublishModel", timeout, lambda: request)
        return AdapterWeight(answer.adapter, generation=answer.generation)
