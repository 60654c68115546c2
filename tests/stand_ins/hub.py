"""A small stand-in for the Hugging Face Hub: the part of its protocol that huggingface_hub speaks, in memory.

It follows the client's source (2.4.0): repository info, tree and ``resolve`` with redirects of large files to another
host, creating repositories and branches, ``preupload``, LFS batches with upload and verification, commits as NDJSON,
and the error codes of missing, private and gated repositories. It is not the hub: what only the hub does (Xet
transfers, quotas, its own checks of model cards) is not seen by tests that use it. Use :func:`model_hub` in a fixture.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standin"
LARGE = (".safetensors",)
_LIMIT = 64 << 20  # bytes of a request; a test never comes near

_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+?)(?:/(?P<verb>[a-z]+)/(?P<rev>.+))?")
_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)")
_BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")


@dataclass
class Repository:
    """One repository: its commits, each all of its files, and where its branches stand."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Make the files the next commit of a branch."""
        content = repr((len(self.commits), sorted(files.items()))).encode()
        name = hashlib.sha1(content).hexdigest()
        self.commits[name], self.branches[branch] = dict(files), name
        return name

    def find(self, revision: str) -> str | None:
        """The commit of a branch or a commit's own name."""
        return self.branches.get(revision, revision if revision in self.commits else None)


class ModelHub(ThreadingHTTPServer):
    """The server; ``url`` is its address, ``other_host`` the same one under another name."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.other_host = f"http://localhost:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.tokens_elsewhere: list[str] = []
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ModelHub

    def log_message(self, *_):
        pass

    # -- verbs -----------------------------------------------------------------------------------

    def do_GET(self):
        path = self._path()
        if path.startswith("/elsewhere/"):
            return self._elsewhere(path.removeprefix("/elsewhere/"))
        if match := _RESOLVE.fullmatch(path):
            return self._resolve(match)
        if (match := _API.fullmatch(path)) and match["verb"] in (None, "revision", "tree"):
            return self._about(match)
        return self._error(404)

    do_HEAD = do_GET

    def do_PUT(self):
        path = self._path()
        body = self._body()
        if path.startswith("/upload/") and hashlib.sha256(body).hexdigest() == path[8:]:
            self.server.large[path[8:]] = body
            return self._send(200, b"", {"ETag": path[8:]})
        return self._error(400)

    def do_POST(self):
        path, body = self._path(), self._body()
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path.startswith("/verify/"):
            return self._json({}, 200 if path[8:] in self.server.large else 404)
        if not self._signed_in():
            return self._error(401, message="Invalid username or password.")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := _BATCH.fullmatch(path):
            return self._batch(json.loads(body))
        match = _API.fullmatch(path)
        repository = self.server.repositories.get(match["repo"]) if match else None
        if repository is None:
            return self._error(404, "RepoNotFound")
        if match["repo"].startswith("others/"):
            return self._error(403, message="You do not have the rights to write here")
        if match["verb"] == "branch":
            if unquote(match["rev"]) in repository.branches:
                return self._error(409)
            repository.branches[unquote(match["rev"])] = repository.branches["main"]
            return self._json({})
        if match["verb"] == "preupload":
            return self._preupload(json.loads(body))
        if match["verb"] == "commit":
            return self._commit(match["repo"], repository, unquote(match["rev"]), body)
        return self._error(404)

    # -- what they do ----------------------------------------------------------------------------

    def _about(self, match):
        repository = self._readable(match["repo"])
        if repository is None:
            return None
        commit = repository.find(unquote(match["rev"] or "main").split("?")[0])
        if commit is None:
            return self._error(404, "RevisionNotFound")
        files = repository.commits[commit]
        if match["verb"] == "tree":
            return self._json([self._entry(name, data) for name, data in files.items()])
        return self._json(
            {
                "id": match["repo"],
                "sha": commit,
                "private": repository.private,
                "gated": repository.gated,
                "siblings": [{"rfilename": name} for name in files],
            }
        )

    def _entry(self, name, data):
        entry = {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
        if name.endswith(LARGE):
            oid = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
        return entry

    def _resolve(self, match):
        repository = self._readable(match["repo"])
        if repository is None:
            return None
        if repository.gated:
            return self._error(403, "GatedRepo")
        commit = repository.find(unquote(match["rev"]))
        if commit is None:
            return self._error(404, "RevisionNotFound")
        data = repository.commits[commit].get(unquote(match["file"]))
        if data is None:
            return self._error(404, "EntryNotFound", commit=commit)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_blob(data)}"'}
        if not match["file"].endswith(LARGE):
            return self._send(200, data, headers)
        oid = hashlib.sha256(data).hexdigest()
        self.server.large[oid] = data
        headers |= {
            "X-Linked-ETag": f'"{oid}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{self.server.other_host}/elsewhere/{oid}",
        }
        return self._send(302, b"", headers)

    def _elsewhere(self, oid):
        """Where large files lie: another host, which must never see a token."""
        if self.headers.get("Authorization"):
            self.server.tokens_elsewhere.append(self.path)
        data = self.server.large.get(oid)
        return self._error(404) if data is None else self._send(200, data, {"ETag": f'"{oid}"'})

    def _create(self, asked):
        name = f"{asked['organization']}/{asked['name']}"
        if name.startswith("others/"):
            return self._error(403, message="You do not have the rights to create here")
        if name in self.server.repositories:
            return self._json({"url": f"{self.server.url}/{name}"}, 409)
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.server.repositories[name] = Repository(private=private)
        self.server.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self._json({"url": f"{self.server.url}/{name}"})

    def _preupload(self, asked):
        modes = [
            {
                "path": entry["path"],
                "uploadMode": "lfs" if entry["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for entry in asked["files"]
        ]
        return self._json({"files": modes})

    def _batch(self, asked):
        objects = []
        for entry in asked["objects"]:
            actions = {
                "upload": {"href": f"{self.server.url}/upload/{entry['oid']}"},
                "verify": {"href": f"{self.server.url}/verify/{entry['oid']}"},
            }
            objects.append({**entry, "actions": actions})
        return self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name, repository, branch, body):
        if branch not in repository.branches:
            return self._error(404, "RevisionNotFound")
        files = dict(repository.commits[repository.branches[branch]])
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files, branch)
        address = f"{self.server.url}/{name}/commit/{commit}"
        return self._json({"success": True, "commitOid": commit, "commitUrl": address})

    # -- parts of the above ----------------------------------------------------------------------

    def _readable(self, name):
        """The repository, where this request may see it; else the hub's answer was sent."""
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self._signed_in()):
            if self._signed_in():
                self._error(404, "RepoNotFound")
            else:
                self._error(401, message="Invalid username or password.")
            return None
        return repository

    def _signed_in(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _path(self):
        with self.server.lock:
            self.server.requests.append(f"{self.command} {self.path}")
        return urlsplit(self.path).path

    def _body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = bytearray()
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return bytes(data)
        return self.rfile.read(min(int(self.headers.get("Content-Length") or 0), _LIMIT))

    def _json(self, value, status=200):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status, code=None, *, message=None, commit=None):
        named = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        headers = {name: value for name, value in named.items() if value}
        self._send(status, json.dumps({"error": message or code or "stand-in"}).encode(), headers)

    def _send(self, status, data, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def environment(url: str, home: Path) -> dict[str, str]:
    """What points a new process at a hub; the client reads these when it is imported."""
    return {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


@contextlib.contextmanager
def model_hub(home: Path) -> Iterator[ModelHub]:
    """Run the stand-in, and point the client that is already imported at it, with its cache in ``home``."""
    from huggingface_hub import constants

    server = ModelHub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    settings = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    variables |= environment(server.url, home)
    try:
        with (
            mock.patch.multiple(constants, **settings),
            mock.patch.dict(os.environ, variables, clear=True),
        ):
            yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
