"""A Hugging Face hub on loopback, with the parts of the API that ``huggingface_hub`` uses.

It supports ``GET /api/models/ORG/NAME/revision/REV``, and ``HEAD`` and ``GET
/ORG/NAME/resolve/REV/FILE``, with ETags, ranges, the hub's error codes, and network faults.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_of_a_test"
_INFO = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?")
_XET_TOKEN, _XET_STORAGE = "/xet-read-token", "/xet-storage"
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repo:
    """A repository: the files of each commit, and the commit of each branch.

    Attributes:
        commits: The files by name, by commit.
        refs: The commit by branch or tag.
        is_private: Whether it is visible only with the token.
        is_gated: Whether its files cannot be read.
        lied_sizes: Wrong sizes of files in the listing.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    is_private: bool = False
    is_gated: bool = False
    lied_sizes: dict[str, int] = field(default_factory=dict)

    def push(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Add a commit to a branch; returns its name."""
        digest = hashlib.sha1(f"{ref}{len(self.commits)}".encode())
        for name, data in sorted(files.items()):
            digest.update(name.encode() + data)
        commit = digest.hexdigest()
        self.commits[commit] = files
        self.refs[ref] = commit
        return commit


class FakeHub:
    """The hub.

    Attributes:
        repos: The repositories by ``org/name``.
        requests: The method, path and range of every request, in order.
        cuts: The number of answers whose connection breaks in the middle of a file.
        status: The status of all answers, if not None.
        seconds_per_chunk: The duration of each chunk of a file.
        has_xet: Whether weights are listed in Xet's storage, which is empty.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.cuts = 0
        self.status: int | None = None
        self.seconds_per_chunk = 0.0
        self.has_xet = False
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def repo(self, name: str, folder: Path | None = None) -> Repo:
        """Add a repository with the files of a folder."""
        repo = self.repos[name] = Repo()
        if folder is not None:
            files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
            repo.push({name: path.read_bytes() for name, path in files.items()})
        return repo

    def downloads(self) -> list[str]:
        """The names of the downloaded files."""
        return [
            line.rsplit("/", 1)[1]
            for line in self.requests
            if line.startswith("GET /") and "/resolve/" in line
        ]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def fake_hub(cache: Path, patch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub for this process's ``huggingface_hub``, with an empty cache in ``cache``."""
    hub = FakeHub()
    patch.setattr(constants, "ENDPOINT", hub.endpoint)
    patch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    patch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2)
    patch.delenv("HF_TOKEN", raising=False)
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    try:
        yield hub
    finally:
        hub.close()


def environment(hub: FakeHub, home: Path) -> dict[str, str]:
    """The variables of a process that uses this hub."""
    return {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def _answer(self, has_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        asked = self.headers.get("Range", "")
        self.hub.requests.append(f"{self.command} {path} {asked}".rstrip())
        if self.hub.status is not None:
            self._refuse(self.hub.status)
        elif path.endswith(_XET_TOKEN):
            storage = f"{self.hub.endpoint}{_XET_STORAGE}"
            until = str(int(time.time()) + 3600)
            access = {"X-Xet-Access-Token": "t", "X-Xet-Token-Expiration": until}
            self._head(200, {**access, "X-Xet-Cas-Url": storage}, 0)
        elif match := _INFO.fullmatch(path):
            found = self._find(match[1], match[2])
            if found is not None:
                self._info(match[1], *found)
        elif match := _RESOLVE.fullmatch(path):
            found = self._find(match[1], match[2])
            if found is not None:
                self._file(*found, match[3], has_body)
        else:
            self._refuse(404)

    def _find(self, name: str, ref: str | None) -> tuple[Repo, str] | None:
        """A repository and one of its commits; None if an error was sent instead."""
        repo = self.hub.repos.get(name)
        is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.is_private and not is_known):
            # Like the hub, hide the existence of private repositories.
            self._refuse(404 if is_known else 401, "RepoNotFound")
            return None
        ref = ref or "main"
        commit = repo.refs.get(ref, ref)
        if commit not in repo.commits:
            self._refuse(404, "RevisionNotFound")
            return None
        return repo, commit

    def _info(self, name: str, repo: Repo, commit: str) -> None:
        files = repo.commits[commit]
        siblings = [
            {"rfilename": file, "size": repo.lied_sizes.get(file, len(data))}
            for file, data in files.items()
        ]
        about = {"id": name, "sha": commit, "private": repo.is_private, "siblings": siblings}
        body = json.dumps(about).encode()
        self._head(200, {"Content-Type": "application/json"}, len(body))
        self.wfile.write(body)

    def _file(self, repo: Repo, commit: str, name: str, has_body: bool) -> None:
        if repo.is_gated:
            self._refuse(403, "GatedRepo")
            return
        data = repo.commits[commit].get(name)
        if data is None:
            self._refuse(404, "EntryNotFound")
            return
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}
        if self.hub.has_xet and name.endswith(".safetensors"):
            headers |= {"X-Xet-Hash": "a" * 64, "X-Linked-Size": str(len(data))}
            headers["X-Linked-ETag"] = headers["ETag"]
            token = f"{self.hub.endpoint}/api/models{_XET_TOKEN}"
            headers["Link"] = f'<{token}>; rel="xet-auth"'
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._head(206 if asked else 200, headers, len(data) - start)
        if has_body:
            self._send(data[start:])

    def _send(self, data: bytes) -> None:
        hub = self.hub
        if hub.cuts and len(data) > 1:
            hub.cuts -= 1
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        step = max(len(data) // 8, 1) if hub.seconds_per_chunk else max(len(data), 1)
        for begin in range(0, len(data), step):
            time.sleep(hub.seconds_per_chunk)
            self.wfile.write(data[begin : begin + step])

    def _refuse(self, status: int, code: str = "") -> None:
        self._head(status, {"X-Error-Code": code} if code else {}, 0)

    def _head(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
