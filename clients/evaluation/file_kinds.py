"""Files that are not there, or hold examples otherwise than as JSON Lines, and what is there."""

from __future__ import annotations

import codecs
import shlex
from pathlib import Path

from turret.closest import closest

_KINDS = {
    codecs.BOM_UTF16_LE: "is UTF-16 text; save it as UTF-8",
    codecs.BOM_UTF16_BE: "is UTF-16 text; save it as UTF-8",
    b"\x1f\x8b": "is compressed; `gunzip` it first",
    b"PK\x03\x04": "is a ZIP archive or a spreadsheet; write its rows as JSON, one object a line",
    b"PAR1": "is a Parquet file; write its rows as JSON, one object a line",
}
_CONFIGS = (".toml", ".yaml", ".yml")
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}

_FEW = 4


def near_files(path: Path) -> str:
    """The end of a sentence about a file that is not there: which its folder has of its kind."""
    folder = path.absolute().parent
    if not folder.is_dir():
        return f"; there is no directory {folder}"
    try:
        there = sorted(each.name for each in folder.glob(f"*{path.suffix}") if each.is_file())
    except OSError:
        return ""
    stems = {Path(name).stem: name for name in there}
    if near := closest(path.stem, stems):
        return f"; did you mean {stems[near]!r}?"
    more = ", …" if len(there) > _FEW else ""
    return f"; its directory has {', '.join(there[:_FEW])}{more}" if path.suffix and there else ""


def other_kind(path: Path, data: bytes) -> str:
    """What a file is and what to do with it, such as ``is compressed; …``; "" for JSON Lines.

    Args:
        path: As commands name it.
        data: All of it, or as much as its first two lines have.
    """
    if path.suffix in _CONFIGS:
        return "is a config by its name, and no examples; those are a JSON object a line (.jsonl)"
    for start, problem in _KINDS.items():
        if data.startswith(start):
            return problem
    text = data.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.startswith(b"["):
        of_objects = text[1:].lstrip().startswith((b"{", b"]"))
        step = f"`jq -c '.[]' {shlex.quote(str(path))} >NEW.jsonl` writes its objects one a line"
        return f"is a JSON array; {step if of_objects else 'every line must be a JSON object'}"
    first, _, rest = text.partition(b"\n")
    if first.startswith((b"{", b'"{')):
        return ""
    head, row = (line.decode("utf-8", "replace") for line in (first, rest.partition(b"\n")[0]))
    for delimiter, name in _DELIMITERS.items():
        if delimiter in head and delimiter in row:
            return _table(path, delimiter, name)
    return ""


def _table(path: Path, delimiter: str, name: str) -> str:
    given = "" if delimiter == "," else f", delimiter={delimiter!r}"
    reader = f"csv.DictReader(sys.stdin{given})"
    code = f"import csv, json, sys; [print(json.dumps(row)) for row in {reader}]"
    command = f'python3 -c "{code}" <{shlex.quote(str(path))} >NEW.jsonl'
    return f"is a table with {name} (CSV); `{command}` makes lines of it"
