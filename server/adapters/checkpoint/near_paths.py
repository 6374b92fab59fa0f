"""What was meant by a path below the adapter root at which there is nothing.

All of it is advice in a refusal, by the system's own look-ups: nothing is opened by what is found
here. What the server's user may not look into is passed over.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path, PurePosixPath

from turret.server.adapters.source import CONFIG_FILE
from turret.server.basics.closest import closest
from turret.server.basics.hub_id import HUB_SCHEME, HubId

# Most existing names to compare a missing one with; takes a millisecond or two.
MOST_COMPARED = 200
_MOST_SHOWN = 20  # most folders that a message lists if no name is close


def what_instead(root: Path, path: str) -> str:
    """Advice about a path that does not exist, as the end of a sentence."""
    parts = PurePosixPath(path).parts
    if meant := _repeats_root(root, parts) or _one_letter_off(root, parts):
        return f"; did you mean {meant!r}?"
    if os.path.isfile(root / CONFIG_FILE):
        return ", which is an adapter itself, whose path below it is '.'"
    names = _some_names(root)
    if below := _one_level_below(root, path, names):
        return f"; did you mean {below!r}?"
    # The path "." has no parts; it is missing if the root itself is gone.
    if parts and parts[0] not in names and (hint := hub_hint(path)):
        return hint
    folders = [n for n in sorted(names) if n[0] != "." and os.path.isdir(root / n)]
    more = " and others" if len(folders) > _MOST_SHOWN or len(names) == MOST_COMPARED else ""
    there = f"has {', '.join(folders[:_MOST_SHOWN])}{more}" if folders else "is empty"
    return (
        f", which {there}; put the adapter's folder there, or let `turret adapters upload NAME"
        " DIR` send it"
    )


def inside(root: Path, path: PurePosixPath) -> str:
    """The path below the root that an absolute path, or one with ``..``, leads to.

    Empty if it is not a directory below the root.
    """
    meant = Path(os.path.normpath(root / path))
    if meant.is_relative_to(root) and os.path.isdir(meant):
        return f"; from there it is {str(meant.relative_to(root))!r}"
    return ""


def hub_hint(path: str) -> str:
    """The hub path to use instead, if the path looks like a repository of the hub."""
    return f"; of the Hugging Face hub it is {HUB_SCHEME}{path}" if HubId.find(path) else ""


def folder_hint(path: PurePosixPath) -> str:
    """The directory to use instead of one of an adapter's files."""
    if path.suffix not in (".safetensors", ".json", ".bin"):
        return f"; an adapter is the directory that has its {CONFIG_FILE}"
    return f"; an adapter is the directory that holds its files, {str(path.parent)!r}"


def _repeats_root(root: Path, parts: tuple[str, ...]) -> str:
    """The path without its beginning, if that repeats the end of the root's own path."""
    for count in range(1, len(parts)):
        rest = "/".join(parts[count:])
        if root.parts[-count:] == parts[:count] and os.path.isdir(root / rest):
            return rest
    return ""


def _one_letter_off(root: Path, parts: tuple[str, ...]) -> str:
    """The directory whose path differs only slightly, in the first name that does not exist."""
    for number, name in enumerate(parts):
        before = root.joinpath(*parts[:number])
        if os.path.isdir(before / name):
            continue
        near = closest(name, _some_names(before))
        meant = "/".join((*parts[:number], near or name, *parts[number + 1 :]))
        return meant if near is not None and os.path.isdir(root / meant) else ""
    return ""


def _one_level_below(root: Path, path: str, names: list[str]) -> str:
    """The path inside the only directory of the root that contains it."""
    found = [name for name in names if os.path.isdir(root / name / path)]
    return f"{found[0]}/{path}" if len(found) == 1 else ""


def _some_names(directory: Path) -> list[str]:
    """Names in the directory, at most as many as are compared at once."""
    try:
        with os.scandir(directory) as entries:
            return [entry.name for entry in itertools.islice(entries, MOST_COMPARED)]
    except OSError:
        return []
