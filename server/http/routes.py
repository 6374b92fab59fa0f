"""All paths: their handlers, and the bodies of their requests and answers."""

from __future__ import annotations

from functools import partial

from turret.server.api.access import ADAPTERS, INFERENCE
from turret.server.http import answer_models as answers
from turret.server.http import completions, console, messages, models, pages, responses, texts
from turret.server.http import request_models as requests
from turret.server.http.endpoint import Route

_ask = partial(Route, service=INFERENCE)
# Metrics count these paths, which run on adapters.
_run = partial(_ask, is_counted=True)
_anthropic = partial(_ask, refuse=messages.anthropic_refusal)
_manage = partial(Route, service=ADAPTERS)
_hidden = partial(Route, is_hidden=True)
_docs, _console = pages.docs(), pages.console()

ROUTES: tuple[Route, ...] = (
    _run(
        "/v1/chat/completions",
        completions.answer_chat,
        requests.ChatRequest,
        answers.ChatCompletion,
    ),
    _run("/v1/completions", completions.complete, requests.CompletionRequest, answers.Completion),
    _run("/v1/responses", responses.respond, requests.ResponseRequest, answers.Response),
    _run("/v1/embeddings", texts.embed, requests.EmbeddingsRequest, answers.Embeddings),
    _run("/classify", texts.classify, requests.ClassifyRequest, answers.Classification),
    _anthropic(
        "/v1/messages",
        messages.answer_messages,
        requests.MessagesRequest,
        answers.Message,
        is_counted=True,
    ),
    _anthropic(
        "/v1/messages/count_tokens",
        messages.count_tokens,
        requests.CountRequest,
        answers.TokenCount,
    ),
    _ask("/v1/models", models.list_models, answer=answers.ModelList),
    # Model names may contain slashes.
    _ask("/v1/models/{model:path}", models.get_model, answer=answers.ModelCard),
    _ask("/tokenize", texts.tokenize, requests.TokenizeRequest, answers.Tokens),
    _ask("/detokenize", texts.detokenize, requests.DetokenizeRequest, answers.Text),
    _ask("/tokenizer_info", texts.tokenizer_info, answer=answers.TokenizerInfo),
    *(
        Route(path, console.health, answer=answers.Health)
        for path in ("/health", "/v1/health", "/ping")
    ),
    Route("/version", console.version, answer=answers.Version),
    Route("/metrics", console.metrics, service="metrics"),
    _hidden("/docs", _docs),
    _hidden("/docs/{file}", _docs),
    _hidden("/", _console),
    # The state is open to every role. The handler itself rejects callers without a role.
    _hidden("/console/state", console.state),
    _hidden("/console/{file}", _console),
    _manage("/v1/load_lora_adapter", models.load_adapter, requests.LoadAdapter),
    _manage("/v1/unload_lora_adapter", models.unload_adapter, requests.AdapterName),
    _manage("/v1/pin_lora_adapter", models.pin_adapter, requests.AdapterName),
    _manage("/v1/unpin_lora_adapter", models.unpin_adapter, requests.AdapterName),
    _manage("/v1/upload_lora_adapter", models.upload, is_raw=True),
)
