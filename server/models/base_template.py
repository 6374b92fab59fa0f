"""The chat template that an operator sets for the base model."""

from __future__ import annotations

from pathlib import Path

from turret.server.adapters.chat_template import OwnTemplate
from turret.server.adapters.source import TEMPLATE_FILE, TOKENIZER_FILES
from turret.server.basics.files import read_regular, unreadable
from turret.server.errors import InvalidRequestError
from turret.server.models.chat_template import ChatTemplate
from turret.server.words import say

_CHATML = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# Templates that can be set by their names, with the tokens that end their turns.
_BUILT_IN = {"chatml": (_CHATML, "<|im_end|>")}


def base_template(path: Path) -> OwnTemplate:
    """The template in a file, or the built-in one of this name, compiled once to check it.

    Raises:
        InvalidRequestError: The file is not a template.
        UnavailableError: See ``ChatTemplate.render``.
    """
    # A name in a settings file arrives with the directory of that file.
    if path.name in _BUILT_IN and not path.exists():
        text, end = _BUILT_IN[path.name]
        return OwnTemplate(path.name, {"default": text}, {"eos_token": end})
    try:
        data = read_regular(path)
    except OSError as error:
        raise InvalidRequestError.of("chat-template", unreadable(path, error)) from None
    most = TOKENIZER_FILES[TEMPLATE_FILE]
    if len(data) > most:
        why = say("FILE_TOO_LARGE", most=most)
        raise InvalidRequestError.of("chat-template", why)
    try:
        text = data.decode()
        template = ChatTemplate(text, {})
        try:
            template.check()
        finally:
            template.close()
    except UnicodeDecodeError:
        raise InvalidRequestError.of("chat-template", say("NOT_UTF8")) from None
    except ValueError as error:
        why = say("CHAT_TEMPLATE_INVALID", problem=error)
        raise InvalidRequestError.of("chat-template", why) from None
    return OwnTemplate(str(path), {"default": text})
