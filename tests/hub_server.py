"""A hub on the loopback interface: those endpoints of the Hugging Face hub that its client calls to share plans.

Small text lives in commits, as the hub has it; tensors and pictures go through git LFS, and are handed out from another
path after a redirect.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".png")


class Hub:
    """Repositories, each a list of commits.

    Attributes:
        repositories: name -> commits, oldest first, as (identifier, path -> content).
        calls: method and path of every request.
        down: the status that every request gets instead of an answer; 0 = none.
        before_commit: called once before the next commit, as somebody else who commits meanwhile.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.stored: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.calls: list[tuple[str, str]] = []
        self.down = 0
        self.before_commit: Any = None
        self.url = ""
        self.store = ""  # on another host than the hub itself, or its client would take the redirect for its own

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        commits = self.repositories.setdefault(name, [])
        tree = {**(commits[-1][1] if commits else {}), **files}
        known = "".join(f"{path}{hashlib.sha1(content).hexdigest()}" for path, content in sorted(tree.items()))
        identifier = hashlib.sha1(f"{name}{len(commits)}{known}".encode()).hexdigest()
        commits.append((identifier, tree))
        return identifier

    def tree(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repositories.get(name, [])
        if revision == "main":
            return commits[-1]
        return next((commit for commit in commits if commit[0] == revision), None)


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that runs inside the `with`; its address is `url`, for HF_ENDPOINT."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    port = server.server_address[1]
    hub.url, hub.store = f"http://127.0.0.1:{port}", f"http://localhost:{port}/store"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def do_POST(self) -> None:
        body = self._body()
        path = self._path()
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}"
            if name in self.hub.repositories:
                return self._json(
                    {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409
                )
            self.hub.commit(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
            return self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": "1"})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if "/preupload/" in path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.hub.store}/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")
        if "/commit/" in path:
            return self._commit(path.split("/api/models/")[1].split("/commit/")[0], body)
        return self._missing("RepoNotFound")

    def do_PUT(self) -> None:
        body, digest = self._body(), self._path().split("/")[-1]
        if hashlib.sha256(body).hexdigest() != digest:
            return self._json({"error": "the content is not what it was said to be"}, 400)
        self.hub.stored[digest] = body
        return self._json({})

    def _commit(self, name: str, body: bytes) -> None:
        if self.hub.before_commit:
            other, self.hub.before_commit = self.hub.before_commit, None
            other()
        rows = [json.loads(line) for line in body.splitlines() if line]
        files: dict[str, bytes] = {}
        for row in rows:
            value = row["value"]
            if row["key"] == "header":
                parent = value.get("parentCommit")
                if parent and parent != self.hub.repositories[name][-1][0]:
                    return self._json({"error": "A commit has happened since. Please refresh and try again."}, 412)
            elif row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.hub.stored[value["oid"]]
        identifier = self.hub.commit(name, files)
        url = f"{self.hub.url}/{name}/commit/{identifier}"
        return self._json({"success": True, "commitOid": identifier, "commitUrl": url})

    def _get(self) -> None:
        path = self._path()
        if self.hub.down:
            return self._json({"error": "come back later"}, self.hub.down)
        if path.startswith("/store/"):
            return self._send(self.hub.stored[path.split("/")[-1]], {})
        if path.startswith("/api/models/"):
            name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            if name not in self.hub.repositories:
                return self._missing("RepoNotFound")
            found = self.hub.tree(name, revision or "main")
            if found is None:
                return self._missing("RevisionNotFound")
            files = [{"rfilename": file} for file in found[1]]
            return self._json({"id": name, "modelId": name, "sha": found[0], "siblings": files, "private": False})
        name, _, rest = path[1:].partition("/resolve/")
        revision, _, file = rest.partition("/")
        if name not in self.hub.repositories:
            return self._missing("RepoNotFound")
        found = self.hub.tree(name, revision)
        if found is None:
            return self._missing("RevisionNotFound")
        commit, tree = found
        if file not in tree:
            return self._missing("EntryNotFound", {"X-Repo-Commit": commit})
        content = tree[file]
        digest = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if not file.endswith(LARGE):
            return self._send(content, headers)
        self.hub.stored[digest] = content
        linked = {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        return self._send(b"", {**headers, **linked, "Location": f"{self.hub.store}/{digest}"}, 302)

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.calls.append((self.command, path))
        return path

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self, values: Any, status: int = 200, kind: str = "application/json") -> None:
        self._send(json.dumps(values).encode(), {"Content-Type": kind}, status)

    def _missing(self, code: str, more: dict[str, str] | None = None) -> None:
        self._send(b"{}", {"X-Error-Code": code, "X-Error-Message": code, **(more or {})}, 404)

    def _send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
