"""Errors in requests: their fields, their size and the names in them."""

TEXTS = {
    # Any field.
    "ONE_REQUIRED": "one of these is required: {choices}",
    "LACKS": "must include {required}",
    "NOT_IN_RANGE_ABOVE": "must be greater than {above:g} and at most {most:g}, not {value:g}",
    "EXCEEDS_FIELD": "must be at most {other} ({most}), not {value}",
    "TOO_MANY_ENTRIES": "must have at most {most} entries, not {found}",
    "TOO_MANY_BYTES": "must have at most {most} bytes, not {found}",
    "TOO_MANY_NUMBERS": "must have at most {most} entries, not {found}, because each result has"
    " {numbers} numbers and an answer may have at most {most_numbers}",
    "HOLDS_EMPTY_STRING": "must not contain an empty string",
    "HOLDS_TOO_LONG_STRING": "contains a string of {found} characters, more than the limit of"
    " {most}",
    "HOLDS_NUL": "must not contain a NUL character",
    "NOT_PRINTABLE_ASCII": "must be at most {most} printable ASCII characters",
    "NOT_MATCHING": "must match {pattern}, not {value!q:.80}",
    "NOT_AN_ADAPTER_NAME": "{value!q} is not a valid adapter name; a name has at most 128 ASCII"
    ' letters, digits, ".", "_", "-" and "/", starts and ends with a letter or digit, and does not'
    ' contain "//", "/./" or "/../"',
    "NAME_OF_BASE": "{value!q} means the base model; choose another name",
    "NOT_A_HUB_ID": "{value!q} is not of the form org/name or org/name@revision",
    "NOT_A_PAGE_TOKEN": "is not a next_page_token that was returned for the same filters",
    "NO_WEIGHT": "must include an adapter whose weight is not 0",
    # Messages of a call.
    "MESSAGE_MALFORMED": "the message is not valid protobuf, or a string in it is not UTF-8",
    "MESSAGE_MISSING": "the call ended without a request message",
    "NO_MESSAGE_IN_TIME": "no message arrived within {seconds:.0f} seconds",
    "TEXT_NOT_ENCODED": "the model's tokenizer cannot encode this text: {problem}",
    "UPLOAD_TOO_SLOW": "the upload took longer than {seconds:.0f} seconds",
    "NOT_FIRST": "must be the first message of an upload",
    "NOT_A_CHUNK": "every message of an upload after the first must be a chunk",
    "NOT_A_DIGEST": "must be empty or 64 lower-case hexadecimal digits",
    "MORE": "and {count} more",
    # Prompts and answers.
    "NO_TOKENS": "has no tokens",
    "PROMPT_TOO_LONG": "the prompt has {length} {unit}, more than the limit of {limit}",
    "CONTEXT_TOO_SHORT": "the prompt has {prompt_tokens} tokens, too many for the context length"
    " of {max_model_len}, which includes any answer",
    "MAX_TOKENS_TOO_LARGE": "{max_tokens} tokens were requested, but this prompt leaves room for"
    " only {room} within the context length of {max_model_len}",
    "NOTHING_TO_TRAIN": "must be true if train_mlp and train_unembed are false",
    "OTHER_ADAPTER_CONFIG": "contains an adapter with a different method, rank or set of modules",
    "TRAINING_FULL": "training the adapter needs {bytes!b} of memory, but this client already uses"
    " {used!b} of its {most!b}, and all clients use {all_used!b} of {training_bytes!b}",
    "NOT_A_TOKEN": "token {value} is not in the vocabulary of {size} tokens",
    "ANSWER_COMPLETE": "already has {found!n:token}, and {other} ({most}) allows no more",
    "ANSWER_ENDED": "the token at index {index} already ends the answer",
    "TOKEN_FORBIDDEN": "the constraint does not allow the token at index {index}",
    "NO_CHAT_TEMPLATE": "this model has no chat template; send a prompt instead, or start the"
    " server with --chat-template",
    "TEMPLATE_NOT_TRUSTED": "is not accepted; the server was started without"
    " --trust-request-chat-template",
    "NO_DEFAULT_TEMPLATE": "the model has no default chat template; its templates are {found}",
    "CANNOT_CONTINUE": "the final message cannot be continued, because the chat template changes"
    " it",
    "CHAT_TEMPLATE_FAILED": "the chat template failed: {problem}",
    "TOOLS_UNSUPPORTED": "this model's chat template does not support tools",
    # Constraints.
    "KEYWORD_UNSUPPORTED": "is not supported",
    "FORMAT_UNSUPPORTED": "the format {value!q} is not supported",
    "REFERENCE_UNKNOWN": "refers to nothing in this schema",
    "ONE_OF_UNSUPPORTED": "is supported only if its members are mutually exclusive; use anyOf",
    "PATTERN_INVALID": "is not a valid regular expression: {problem}",
    "GRAMMAR_INVALID": "is neither a Lark nor a GBNF grammar: {problem}",
    "CONSTRAINT_INVALID": "cannot be compiled: {problem}",
    "CONSTRAINT_DEAD_END": "the model has no token that continues the answer under the constraint",
    "CONSTRAINT_TOO_SLOW": "the constraint takes too long to evaluate",
    "CONSTRAINT_TOO_COMPLEX": "the constraint is too complex: {problem}",
    "CONSTRAINT_UNTRIED": "the constraint could not be checked: {problem}",
    "CONSTRAINTS_FULL": "compiled constraints already take {held!b} of memory, and with this one"
    " they would exceed the limit of {most!b}",
    "COMPILATION_TOO_SLOW": "the constraint was not compiled within {seconds:.0f} seconds",
    "NO_END_TOKEN": "this model has no end token, so no answer under a constraint could end",
    "TOKENIZER_UNUSABLE": "this model's tokenizer does not support constraints: {problem}",
    # Mixes of adapters.
    "HEAD_MISSING": "none of the adapters has a classification head (SEQ_CLS)",
    "SEVERAL_HEADS": "only one adapter with a classification head can be used, not several:"
    " {adapters}",
    "ADAPTER_CLASSIFIES": "an adapter trained to classify (SEQ_CLS) cannot generate or score text:"
    " {adapters}",
    "PREFIX_NOT_ALONE": "only one adapter with soft tokens or a prefix can be used, and only with"
    " weight 1: {adapters}",
    "VOCABULARY_NOT_ALONE": "only one adapter with its own vocabulary can be used, and only with"
    " weight 1: {adapters}",
    "VOCABULARY_WITH_PARTIAL": "{adapter} has its own vocabulary, so it cannot be combined with"
    " {partial}, which uses keys and values that only the base model computes",
    "SEVERAL_FIRST_PASSES": "only one adapter that needs a first pass can be used, not several:"
    " {adapters}",
    "FIRST_PASS_WITH_PREFIX": "{adapter} needs a first pass over the prompt, so it cannot be"
    " combined with soft tokens or a prefix",
    "MIX_TOO_LARGE": "the adapters of this request need {bytes!b} on the device, but"
    " --adapter-device-bytes allows {budget_bytes!b} for them",
}
