"""All paths: their handlers, and the bodies of their requests and answers."""

from __future__ import annotations

from functools import partial

from turret.server.http import pages
from turret.server.http.archive import upload
from turret.server.http.completions import answer_chat, complete
from turret.server.http.console.state import health, metrics, state, version
from turret.server.http.endpoint import ADAPTERS, INFERENCE, Route
from turret.server.http.messages import (
    CountRequest,
    MessagesRequest,
    answer_messages,
    anthropic_refusal,
    count_tokens,
)
from turret.server.http.models import (
    get_model,
    list_models,
    load_adapter,
    pin_adapter,
    unload_adapter,
    unpin_adapter,
)
from turret.server.http.responses import respond
from turret.server.http.schemas import answers, requests
from turret.server.http.texts import classify, detokenize, embed, tokenize, tokenizer_info

_ask = partial(Route, service=INFERENCE)
# Metrics count these paths, which run on adapters.
_run = partial(_ask, is_counted=True)
_anthropic = partial(_ask, refuse=anthropic_refusal)
_manage = partial(Route, service=ADAPTERS)
_hidden = partial(Route, is_hidden=True)
_docs, _console = pages.docs(), pages.console()

ROUTES: tuple[Route, ...] = (
    _run("/v1/chat/completions", answer_chat, requests.ChatRequest, answers.ChatCompletion),
    _run("/v1/completions", complete, requests.CompletionRequest, answers.Completion),
    _run("/v1/responses", respond, requests.ResponseRequest, answers.Response),
    _run("/v1/embeddings", embed, requests.EmbeddingsRequest, answers.Embeddings),
    _run("/classify", classify, requests.ClassifyRequest, answers.Classification),
    _anthropic("/v1/messages", answer_messages, MessagesRequest, answers.Message, is_counted=True),
    _anthropic("/v1/messages/count_tokens", count_tokens, CountRequest, answers.TokenCount),
    _ask("/v1/models", list_models, answer=answers.ModelList),
    # Model names may contain slashes.
    _ask("/v1/models/{model:path}", get_model, answer=answers.ModelCard),
    _ask("/tokenize", tokenize, requests.TokenizeRequest, answers.Tokens),
    _ask("/detokenize", detokenize, requests.DetokenizeRequest, answers.Text),
    _ask("/tokenizer_info", tokenizer_info, answer=answers.TokenizerInfo),
    *(Route(path, health, answer=answers.Health) for path in ("/health", "/v1/health", "/ping")),
    Route("/version", version, answer=answers.Version),
    Route("/metrics", metrics, service="metrics"),
    _hidden("/docs", _docs),
    _hidden("/docs/{file}", _docs),
    _hidden("/", _console),
    # The state is open to every role. The handler itself rejects callers without a role.
    _hidden("/console/state", state),
    _hidden("/console/{file}", _console),
    _manage("/v1/load_lora_adapter", load_adapter, requests.LoadAdapter),
    _manage("/v1/unload_lora_adapter", unload_adapter, requests.AdapterName),
    _manage("/v1/pin_lora_adapter", pin_adapter, requests.AdapterName),
    _manage("/v1/unpin_lora_adapter", unpin_adapter, requests.AdapterName),
    _manage("/v1/upload_lora_adapter", upload, is_raw=True),
)
