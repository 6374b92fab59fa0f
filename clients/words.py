"""Every sentence of the clients' own errors, by its reason."""

from turret.words import Text as Text
from turret.words import sayer

TEXTS = {
    # Files of examples.
    "PATH_MISSING": "{path} does not exist",
    "PATH_MISSING_BESIDE": "{path} does not exist; its directory has {names}",
    "PATH_IS_A_DIRECTORY": "{path} is a directory; name a file in it",
    "FILE_IS_UTF16": "is UTF-16 text; save it as UTF-8",
    "FILE_IS_COMPRESSED": "is compressed; run `gunzip` on it first",
    "FILE_IS_ZIP": "is a ZIP archive or a spreadsheet; write its rows as JSON objects, one per"
    " line",
    "FILE_IS_PARQUET": "is a Parquet file; write its rows as JSON objects, one per line",
    "FILE_IS_A_CONFIG": "is a config file; examples are JSON objects, one per line (.jsonl)",
    "FILE_IS_AN_ARRAY": "is a JSON array; every line must be a JSON object",
    "FILE_IS_AN_ARRAY_OF_OBJECTS": "is a JSON array; `{command}` writes one object per line",
    "FILE_IS_A_TABLE": "is a CSV table; `{command}` writes one JSON object per line",
    "EXAMPLE_KEYS": "messages, or prompt and completion, or labels instead of the answer",
    "TRAINING_EXAMPLE_KEYS": "messages, or prompt and completion, or text, or labels instead of"
    " the answer",
    "NO_EXAMPLES": "has no examples; every line must be a JSON object with {keys}",
    # Lines of such a file.
    "LINE_NOT_JSON": "is not valid JSON: {problem}; every line must be one JSON object",
    "SINGLE_QUOTES": "is not valid JSON: {problem}; put keys and texts in double quotes",
    "TRAILING_COMMA": "is not valid JSON: {problem}; remove the comma at the end of the line",
    "NOT_ONE_OBJECT": "is not valid JSON: {problem}; `{command}` writes one object per line",
    "DUPLICATE_KEY": "is in the object twice",
    "MISSING_KEY": "is missing; an example has {keys}",
    "UNEXPECTED_KEY": "is unexpected here; an example has {keys}",
    "NOT_AN_EXAMPLE": "must be a JSON object with {keys}",
    "HALF_CHARACTER": "contains half of a surrogate pair, {value}; add its other half",
    "NOT_A_MESSAGE": "must be an object with role and content",
    "MESSAGE_HAS_MORE": "must be an object with role and content and no other keys",
    "LAST_IS_NO_ANSWER": 'must be "assistant" in the last message, which is the answer',
    "LAST_IS_ANSWER": 'must not be "assistant" in the last message, because the labels are the'
    " answer",
    "NOTHING_BEFORE_ANSWER": "has only the answer; add the message before it",
    "MIXED_LABELS": "must be on every line or on none",
}

say = sayer(TEXTS)
