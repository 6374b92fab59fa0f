"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

from turret.server.http.answers import (
    FINISH_REASONS,
    Ended,
    adapters_of,
    chat_logprobs,
    head,
    stop_reason,
    usage_of,
)
from turret.server.http.asked import Asked, asked_of, chat_of, read_request, tools_in
from turret.server.http.choices import Choices, Chunk, EventStream, make_readers
from turret.server.http.endpoint import Exchange
from turret.server.http.reply import HOLE
from turret.server.http.schemas.requests import ChatRequest
from turret.server.http.tools.calls import Said
from turret.server.http.tools.reader import AnswerReader, delta_of, message_of
from turret.v1 import inference_pb2


async def answer_chat(exchange: Exchange) -> None:
    """Answer a conversation."""
    info, body, mix = read_request(exchange, ChatRequest)
    asked = asked_of(body, mix, exchange.names)
    options = asked.message.options
    options.logprobs, options.top_n = body.logprobs, body.top_logprobs or 0
    prompt = inference_pb2.GenerateRequest(chat=chat_of(body.messages, body))
    use = tools_in(body, prompt.chat)
    del body
    make_reader = await make_readers(exchange, asked, use, prompt.chat)
    choices = Choices(exchange, asked, [prompt])
    answer_id = f"chatcmpl-{exchange.call.request_id}"
    if asked.is_stream:
        first = head(answer_id, "chat.completion.chunk", asked.model, info)
        await _Events(exchange, asked, first, make_reader).send(choices)
        return
    answers = await choices.whole()
    whole = head(answer_id, "chat.completion", asked.model, info)
    whole["usage"] = usage_of(answers, asked.num_choices)
    whole["adapters_used"] = adapters_of(answers)
    size = sum(len(answer.logprobs) for answer in answers) * (1 + options.top_n)
    await exchange.reply.made_json(
        lambda: whole | {"choices": _choices(asked, answers, make_reader)}, size
    )


class _Events(EventStream):
    growing: ClassVar = {"content": HOLE}

    def __init__(
        self,
        exchange: Exchange,
        asked: Asked,
        first: dict[str, Any],
        make_reader: Callable[[], AnswerReader],
    ) -> None:
        super().__init__(exchange, asked, first)
        self._make_reader = make_reader
        self._readers: dict[int, AnswerReader] = {}

    async def _chunk(self, index: int, chunk: Chunk, is_last: bool) -> None:
        if index not in self._readers:
            self._readers[index] = self._make_reader()
            await self._event(index, {"role": "assistant", "content": ""})
        reader = self._readers[index]
        pieces = reader.feed(chunk.text) + (reader.finish() if is_last else [])
        # Send the logprobs of tokens at once, even if their text is held back or becomes a call.
        logprobs = _logprobs(self._asked, chunk) if chunk.logprobs else None
        for piece in pieces or ([Said("")] if logprobs else []):
            if logprobs is None and isinstance(piece, Said):
                await self._text(index, piece.text)
            else:
                await self._event(index, delta_of(piece), logprobs=logprobs)
                logprobs = None
        if is_last:
            reason = _finish_reason(chunk, reader)
            await self._event(index, {}, finish_reason=reason, stop_reason=stop_reason(chunk))

    async def _event(self, index: int, delta: dict[str, Any], **more: Any) -> None:
        await self._reply.event(self._value(index, delta, **more))

    def _value(self, index: int, grown: Any, **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": grown, "logprobs": None, "finish_reason": None}
        return {**self._first, "choices": [choice | more], **self._nothing}


def _choices(
    asked: Asked,
    answers: Iterable[inference_pb2.GenerateResponse],
    make_reader: Callable[[], AnswerReader],
) -> Iterator[dict[str, Any]]:
    for index, answer in enumerate(answers):
        reader = make_reader()
        yield {
            "index": index,
            "message": message_of(reader, answer.text),
            "logprobs": _logprobs(asked, answer),
            "finish_reason": _finish_reason(answer, reader),
            "stop_reason": stop_reason(answer),
        }


def _finish_reason(answer: Ended, reader: AnswerReader) -> str:
    reason = FINISH_REASONS[answer.finish_reason]
    return "tool_calls" if reason == "stop" and reader.num_calls else reason


def _logprobs(asked: Asked, answer: Ended) -> dict[str, Any] | None:
    if not asked.message.options.logprobs:
        return None
    return chat_logprobs(answer.logprobs, names_ids=asked.names_ids)
