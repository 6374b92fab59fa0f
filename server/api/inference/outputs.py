"""What the engine gives back to a request, counted for its call."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from turret.server.api.backend import Backend
from turret.server.api.call import Call
from turret.server.engine.scheduling.request import FinishReason, Output, Request
from turret.server.errors import DeadlineExceededError


async def outputs_of(
    backend: Backend, request: Request, call: Call
) -> AsyncGenerator[Output, None]:
    """Run a request on behalf of a call; however the call ends, the engine lets go of it.

    Raises:
        DeadlineExceededError: After the last output, if the deadline ended the request.
    """
    call.rename(request.request_id)
    call.adapters = tuple(ref.name for ref in request.adapters)
    stream = await backend.engine.submit(request)
    # Also covers a call that dies while nobody iterates.
    call.at_end(stream.cancel)
    is_counted = False
    try:
        async for output in stream:
            # A call may ask for several answers.
            if not is_counted:
                call.prompt_tokens += len(request.prompt_token_ids)
                is_counted = True
            call.generated_tokens += len(output.token_ids)
            yield output
            if output.finish is not None and output.finish.reason is FinishReason.DEADLINE:
                raise DeadlineExceededError("the deadline passed before the request finished")
    finally:
        stream.cancel()
