"""Errors that only the HTTP API reports."""

TEXTS: dict[str, str] = {
    # Bodies.
    "BODY_NOT_JSON": "the body is not valid JSON: {problem}",
    "BODY_NOT_OBJECT": "the body must be a JSON object",
    "BODY_TOO_NESTED": "the body has more than {most} lists and objects",
    "REQUEST_TOO_LARGE": "the body must be at most {most} bytes",
    "REQUEST_TIMEOUT": "the body did not arrive within {seconds} seconds",
    "NOT_AN_ARCHIVE_TYPE": "the content type must be {wanted}",
    "ARCHIVE_UNREADABLE": "the body is not an uncompressed tar archive: {problem}",
    "ARCHIVE_TOO_LONG": "the archive has more than {most} entries",
    "UNSUPPORTED_MEDIA_TYPE": "the body must be uncompressed JSON with the header `content-type:"
    " application/json`",
    # Fields.
    "TOO_LONG": "must have at most {most} characters when written as JSON",
    "NUMBER_TOO_LARGE": "must not contain numbers above 1.8e308",
    "TOO_FEW_ENTRIES": "must have {least} or more entries",
    "NOT_TEXT": "must be a text part; this model accepts only text",
    "NOT_A_BIAS": "must map token ids to numbers from -100 to 100; the entry {token!q:.40} does"
    " not",
    "NOT_SUPPORTED": "is not supported; omit it",
    "NOT_SUPPORTED_USE": "is not supported; use {instead}",
    "NOTHING_STORED": "is not supported, because the server stores no conversations; send the"
    " whole conversation as input",
    "TOO_MANY_ANSWERS": "all prompts together may have at most {most} answers, not {found}",
    "UNKNOWN_TOOL": "names a function that is not in tools",
    "GBNF_BESIDE_TOOLS": "must be a Lark grammar, not GBNF, if the request has tools",
    "SCHEMA_TOO_NESTED": "cannot be combined with such a deeply nested schema",
    "UNENFORCEABLE_IN_XML": "is not supported, because this model writes tool calls as XML",
    "UNENFORCEABLE_SCHEMA": "must be {expected}, because this model writes tool calls as XML",
    # Models.
    "NEEDS_BASE_MODEL": "can be set only if model is the base model",
    "NO_SUCH_MODEL": "the model {model!q} does not exist",
    "MODEL_NOT_A_MIX": "the model {model!q} does not exist; write a mix like {step}",
    "MODEL_IS_A_MIX": "{model!q} is a mix; GET /v1/models/{step} describes its first adapter",
    "NOT_EQUAL": "must be equal to {other} ({expected})",
    "NOT_A_WEIGHT": "the weight of {name!q} is not a decimal number from -100 to 100: {weight!q}",
    # Requests.
    "HEAD_TOO_LARGE": "the path and headers together must be at most {most} bytes",
    "DUPLICATE_HEADER": "the request has more than one {header} header",
    "HOST_MISSING": "the request has no host header",
    "UNKNOWN_HOST": "unknown host {host!q}; use the server's address, or allow the host with"
    " --http-allowed-host",
    "UNKNOWN_URL": "unknown path: {method} {path}",
    "URL_ELSEWHERE": "{method} {path} is served only at the admin address, over gRPC",
    "METHOD_NOT_ALLOWED": "{path} does not support {method}; use {allowed}",
    "REQUEST_ENDED": "the server is shutting down and ended the request",
    # Training.
    "SESSION_NOT_FOUND": "the session {session!q} has ended or does not exist",
    "TRAINED_MODEL_NOT_FOUND": "the model {model!q} does not exist or is no longer in training",
    "TRAINING_RUN_NOT_FOUND": "the training run {run!q} does not exist",
    "SAMPLER_NOT_FOUND": "the sampler {sampler!q} has ended or does not exist",
    "CHECKPOINT_NOT_FOUND": "the checkpoint {path!q} does not exist",
    "CHECKPOINT_EXISTS": "the checkpoint {path!q} already exists",
    "CHECKPOINT_OF_OTHER_BASE": "the checkpoint {path!q} was trained on another base model",
    "CHECKPOINT_WITHOUT_OPTIMIZER": "is not in this checkpoint, which was saved for sampling",
    "RESULT_GONE": "this result does not exist or is no longer kept",
    "LINK_EXPIRED": "this link is invalid or has expired; request a new one",
    "COMMAND_MISSING": "the command with seq_id {number} did not arrive, so this one cannot run",
    "COMMANDS_WAITING": "this model has too many waiting commands; the limit is {most}",
    "TRAINING_ENDED": "the model was unloaded before this command ran",
    "GRADIENT_NOT_FINITE": "the gradient is infinite or not a number, so the weights are unchanged",
    "TRAINING_LIMIT_REACHED": "a client can have at most {most} {what}",
    "TRAINING_DISK_FULL": "checkpoints and samplers take {used!b} of the {most!b} for this"
    " client, and {all_used!b} of the {all_most!b} for all clients; delete some",
    "NOT_A_MESSAGE_TYPE": "the body must be uncompressed protobuf with the content type {wanted}",
    "NOT_A_VECTOR": "must be a dense tensor with one dimension",
    "NOT_AS_LONG": "must have one entry for each token ({expected}), not {found}",
    "NOT_WHOLE_NUMBERS": "has {found} bytes, which is not a multiple of {size}, the size of a"
    " number",
}
