"""Certificates for tests, made with the command ``openssl``."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

LOCAL = "subjectAltName=DNS:localhost,IP:127.0.0.1"


def certify(
    folder: Path, name: str, *extensions: str, authority: str | None = None, days: int = 2
) -> None:
    """Write ``NAME.key`` and ``NAME.crt``, signed by an authority in the folder or by itself."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    signs = authority or name
    # Python 3.13 and newer require these extensions.
    own = ("authorityKeyIdentifier=keyid",)
    if authority is None:
        own = (
            "subjectKeyIdentifier=hash",
            "basicConstraints=critical,CA:TRUE",
            "keyUsage=digitalSignature,keyEncipherment,keyCertSign",
        )
    (folder / "extensions").write_text("\n".join((*extensions, *own)))
    request = ["req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}"]
    by = ["-CA", f"{signs}.crt", "-CAkey", f"{signs}.key", "-CAcreateserial"]
    for arguments in (
        [*request, "-keyout", f"{name}.key", "-out", "request"],
        [
            *("x509", "-req", "-in", "request", "-extfile", "extensions", "-days", str(days)),
            *(by if authority else ["-signkey", f"{name}.key"]),
            *("-out", f"{name}.crt"),
        ],
    ):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)
