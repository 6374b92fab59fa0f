"""Every sentence of the clients' own errors, by its reason."""

from turret.words import Text as Text
from turret.words import sayer

TEXTS = {
    # Arguments.
    "REQUIRED_WITH": "is required with a {other}",
    "NOT_ASCII": "must be printable ASCII",
    "INCLUDES_BEARER": "must not include the word Bearer",
    "NOT_A_PLAIN_NAME": "{value!q} is not an adapter name; pass a weight or a generation with"
    " AdapterWeight",
    "NOT_A_MIX_MEMBER": "{value!q} is not NAME[@GENERATION][=WEIGHT]",
    "UNFIT": "invalid value {value} ({problem})",
    "OUT_OF_RANGE": "{value} is out of range",
    "UNKNOWN_OPTION": "unknown option {name!q}",
    "UNKNOWN_MESSAGE_KEY": "unknown key {value!q}; known keys are {choices}",
    "SINGLE_MESSAGE": "must be a list of messages, not a single message",
    # Calls that no turret server has answered.
    "REQUEST_ABOVE_LIMIT": "the request has {size} bytes, more than the {most} that the server"
    " accepts",
    "ANSWER_TOO_LARGE": "the answer has {size} bytes, more than the {most} that the client accepts",
    "NOT_IN_TIME": "the call did not finish in time",
    "CONNECTION_LOST": "the connection was lost ({why})",
    "NOT_REACHED": "no turret server answers at {place} ({why})",
    "NOT_RESOLVED": "no turret server answers at {place} (the host or port is unknown)",
    "NOT_ANSWERED": "no turret server answers ({why})",
    "NOT_GRPC": "the server at {place} does not speak gRPC",
    "NOT_OFFERED": "the server does not offer this call",
    "TLS_FAILED": "cannot make a secure connection to {place} ({why})",
    "CONNECTION_CLOSED": "the server at {place} closed the connection",
    "CLOSED_DURING_CALL": "the client was closed while the call was running",
    "ANSWER_CUT": "the answer ended early; the server may be shutting down",
    # Clients and their addresses.
    "CLIENT_CLOSED": "the client is closed",
    "OTHER_EVENT_LOOP": "this AsyncTurretClient belongs to another event loop",
    "NO_EVENT_LOOP": "no event loop is running; use AsyncTurretClient inside an async function",
    "ADDRESS_WITHOUT_PORT": "{value!q} is not HOST:PORT; the port is missing",
    "ADDRESS_WITH_SCHEME": "{value!q} is not HOST:PORT; omit {scheme}",
    # Directories of adapters.
    "ADAPTER_FILES_MISSING": "{path} is not an adapter; it needs adapter_config.json and a"
    " .safetensors file",
    "FILE_EMPTY": "{path} is empty; copy or save it again",
    "PATH_EXISTS": "{path} already exists; choose another path or remove it",
    "EXPORT_FILE_NAME": "the export contains an unsafe file name, {name!q}",
    "EXPORT_OUT_OF_ORDER": "the export's messages arrived out of order",
    "EXPORT_WITHOUT_HEADER": "the export has no header",
    "EXPORT_FILE_DAMAGED": "the export's file {name} arrived incomplete or damaged",
    # The command line.
    "NOT_SECONDS": "must be a number of seconds, not {value!q:.40}",
    "NOT_POSITIVE": "must be an integer of at least 1, not {value!q:.40}",
    "STANDARD_INPUT_EMPTY": "standard input is empty",
    "NO_TEXTS": "no text; pass TEXT, - for standard input, or --file",
    "PROVENANCE_INVALID": "{path} is not a JSON object; repair or delete it",
    "UNKNOWN_CHAT_COMMAND": "unknown command {value!q}; /help lists the commands",
    "ANSWER_LOST": "the server closed the connection during the answer; see its log",
    # Evaluation.
    "IS_TEST_SET": "{path} is the test set; choose another file",
    "PATH_NOT_WRITABLE": "{path} is not a writable file",
    "LABELS_NEED_CLASSIFY": "requires --classify",
    "LABELS_NOT_DISTINCT": "must be distinct and not empty",
    "ANSWER_NOT_A_LABEL": "{value!q} is not one of --labels",
    "ANSWER_WITHOUT_TOKENS": "line {line}: the answer must contain at least one token",
    "NO_LABELS_OF_ADAPTER": "{place}: the adapter predicts numbers, not labels",
    "EVALUATION_CUT": "the server closed the connection {done}; see the server's log",
    # Files of examples.
    "PATH_MISSING": "{path} does not exist",
    "PATH_IS_A_DIRECTORY": "{path} is a directory; pass a file in it",
    "EXAMPLE_KEYS": 'messages, or prompt and completion (for several labels, use the key "labels"'
    " instead of the answer)",
    "TRAINING_EXAMPLE_KEYS": "messages, or prompt and completion, or text (for several labels, use"
    ' the key "labels" instead of the answer)',
    "NO_EXAMPLES": "has no examples; every line must be a JSON object with {keys}",
    # Lines of such a file.
    "LINE_NOT_JSON": "is not valid JSON: {problem}; every line must be one JSON object",
    "DUPLICATE_KEY": "appears twice in the object",
    "UNEXPECTED_KEY": "unknown key; an example has {keys}",
    "NOT_AN_EXAMPLE": "must be a JSON object with {keys}",
    "HALF_CHARACTER": "contains half of a surrogate pair, {value}; add its other half",
    "NOT_A_MESSAGE": "must be an object with role and content",
    "MESSAGE_HAS_MORE": "must be an object with only role and content",
    "LAST_IS_NO_ANSWER": 'must be "assistant", because the last message is the answer',
    "LAST_IS_ANSWER": 'must not be "assistant" in the last message, because the labels are the'
    " answer",
    "NOTHING_BEFORE_ANSWER": "has only the answer; add the message before it",
    "MIXED_LABELS": "must be on every line or on none",
}

say = sayer(TEXTS)
