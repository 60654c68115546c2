"""A small stand-in for Cloud Storage: the part of its JSON API that TensorStore and gcsfs speak, in memory.

Use :func:`cloud_storage` in a fixture; it points both at the server and takes the settings back afterwards::

    with cloud_storage() as storage:
        storage.add_folder(tmp_path / "corpus", "bucket", "corpus")
        open_corpus("gs://bucket/corpus")

Objects are kept in ``storage.objects``: {(bucket, name): (bytes, generation)}; a test may change or remove them.
"""

from __future__ import annotations

import base64
import contextlib
import email.parser
import email.policy
import hashlib
import itertools
import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

_OBJECT = re.compile(r"/(?:download/)?storage/v1/b/(?P<bucket>[^/]+)/o/(?P<name>[^/]+)")
_COPY = re.compile(_OBJECT.pattern + r"/(?:rewriteTo|copyTo)/b/(?P<to>[^/]+)/o/(?P<target>[^/]+)")
_LIST = re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)/o/?")
_BUCKET = re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)/?")
_UPLOAD = re.compile(r"/(?:resumable/)?upload/storage/v1/b/(?P<bucket>[^/]+)/o/?")


class CloudStorage(ThreadingHTTPServer):
    """The server; ``url`` is its address."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.objects: dict[tuple[str, str], tuple[bytes, int]] = {}
        self.uploads: dict[str, tuple[str, str, bytearray]] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self._generations = itertools.count(1)

    def put(self, bucket: str, name: str, data: bytes) -> int:
        """Store an object and return its generation."""
        with self.lock:
            generation = next(self._generations)
            self.objects[bucket, name] = (bytes(data), generation)
        return generation

    def add_folder(self, folder: Path, bucket: str, prefix: str) -> None:
        """Store every file of a folder."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(bucket, f"{prefix}/{path.relative_to(folder)}", path.read_bytes())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: CloudStorage

    def log_message(self, *_):
        pass

    # -- verbs -----------------------------------------------------------------------------------

    def do_GET(self):
        path, query = self._parse()
        if match := _OBJECT.fullmatch(path):
            return self._get(match["bucket"], unquote(match["name"]), query, path)
        if match := _LIST.fullmatch(path):
            return self._list(match["bucket"], query)
        if match := _BUCKET.fullmatch(path):
            return self._json({"kind": "storage#bucket", "name": match["bucket"]})
        return self._error(404)

    def do_POST(self):
        path, query = self._parse()
        body = self._body()
        if path.startswith("/batch/"):
            return self._batch(body)
        if "upload_id" in query:
            return self._continue(query, body)
        if match := _COPY.fullmatch(path):
            return self._copy(match)
        if match := _UPLOAD.fullmatch(path):
            return self._upload(match["bucket"], query, body)
        return self._error(404)

    def do_PUT(self):
        _, query = self._parse()
        return self._continue(query, self._body())

    def _continue(self, query, body):
        """Take the next bytes of an upload in parts."""
        bucket, name, held = self.server.uploads[query["upload_id"]]
        held += body
        asked = self.headers.get("Content-Range", "")
        if asked.endswith("/*"):
            headers = {"Range": f"bytes=0-{len(held) - 1}"} if held else {}
            return self._send(308, b"", headers)
        del self.server.uploads[query["upload_id"]]
        self.server.put(bucket, name, bytes(held))
        return self._json(self._describe(bucket, name))

    def do_DELETE(self):
        path, query = self._parse()
        match = _OBJECT.fullmatch(path)
        key = (match["bucket"], unquote(match["name"])) if match else None
        if key not in self.server.objects:
            return self._error(404)
        if not self._allowed(key, query):
            return self._error(412)
        with self.server.lock:
            self.server.objects.pop(key, None)
        return self._send(204, b"")

    # -- what they do ----------------------------------------------------------------------------

    def _get(self, bucket, name, query, path):
        found = self.server.objects.get((bucket, name))
        if found is None:
            return self._error(404)
        if query.get("ifGenerationNotMatch") == str(found[1]):
            return self._send(304, b"")
        if not self._allowed((bucket, name), query):
            return self._error(412)
        if query.get("alt") != "media" and not path.startswith("/download"):
            return self._json(self._describe(bucket, name))
        data, status, headers = found[0], 200, {"x-goog-generation": str(found[1])}
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = match.groups()
            start = int(first) if first else max(0, len(data) - int(last))
            stop = min(int(last) + 1, len(data)) if first and last else len(data)
            if start >= len(data):
                return self._error(416)
            status = 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data = data[start:stop]
        return self._send(status, data, headers)

    def _list(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        low, high = query.get("startOffset", ""), query.get("endOffset")
        items, prefixes = [], set()
        for held, name in sorted(self.server.objects):
            if held != bucket or not name.startswith(prefix) or name < low:
                continue
            if high and name >= high:
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self._describe(bucket, name))
        return self._json({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def _upload(self, bucket, query, body):
        kind, name = query.get("uploadType", "media"), query.get("name")
        if kind == "multipart":
            text = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode() + body
            message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(text)
            about, _ = message.get_payload()
            name = name or json.loads(about.get_payload(decode=True))["name"]
            # Binary content must not pass through the mail parser's ideas of lines.
            boundary = message.get_boundary().encode()
            raw = body.split(b"--" + boundary)[2]
            body = raw.partition(b"\r\n\r\n")[2][:-2]
        elif kind == "resumable":
            name = name or json.loads(body)["name"]
            with self.server.lock:
                identifier = f"upload-{len(self.server.requests)}-{len(self.server.uploads)}"
                self.server.uploads[identifier] = (bucket, name, bytearray())
            address = f"{self.server.url}/upload/storage/v1/b/{bucket}/o?upload_id={identifier}"
            return self._send(200, b"", {"Location": address})
        if not self._allowed((bucket, name), query):
            return self._error(412)
        self.server.put(bucket, name, body)
        return self._json(self._describe(bucket, name))

    def _copy(self, match):
        source = (match["bucket"], unquote(match["name"]))
        if source not in self.server.objects:
            return self._error(404)
        target = unquote(match["target"])
        self.server.put(match["to"], target, self.server.objects[source][0])
        described = self._describe(match["to"], target)
        return self._json({"done": True, "resource": described, **described})

    def _batch(self, body):
        """Deletions sent together, as gcsfs does."""
        boundary = "batch_stand_in"
        parts = []
        for number, path in enumerate(re.findall(rb"DELETE (\S+) HTTP", body), 1):
            match = _OBJECT.fullmatch(urlsplit(path.decode()).path)
            key = (match["bucket"], unquote(match["name"])) if match else None
            with self.server.lock:
                status = "204 No Content" if self.server.objects.pop(key, None) else "404 Not Found"
            parts.append(
                f"--{boundary}\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>"
                f"\r\n\r\nHTTP/1.1 {status}\r\n\r\n\r\n"
            )
        answer = "".join(parts) + f"--{boundary}--"
        headers = {"Content-Type": f"multipart/mixed; boundary={boundary}"}
        return self._send(200, answer.encode(), headers)

    # -- parts of the above ----------------------------------------------------------------------

    def _allowed(self, key, query):
        """Whether the object has the generation that the request insists on; 0: there is none."""
        wanted = query.get("ifGenerationMatch")
        return wanted is None or int(wanted) == self.server.objects.get(key, (b"", 0))[1]

    def _describe(self, bucket, name):
        data, generation = self.server.objects[bucket, name]
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "etag": str(generation),
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
            "timeCreated": "2024-01-01T00:00:00.000Z",
            "updated": "2024-01-01T00:00:00.000Z",
            "contentType": "application/octet-stream",
        }

    def _parse(self):
        parts = urlsplit(self.path)
        with self.server.lock:
            self.server.requests.append(f"{self.command} {self.path}")
        query = parse_qs(parts.query, keep_blank_values=True)
        return parts.path, {name: values[0] for name, values in query.items()}

    def _body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = bytearray()
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return bytes(data)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self, value):
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status):
        answer = {"error": {"code": status, "message": "stand-in"}}
        self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, status, data, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(data)


@contextlib.contextmanager
def cloud_storage() -> Iterator[CloudStorage]:
    """Run the stand-in and point TensorStore and gcsfs at it; no credentials are looked for."""
    server = CloudStorage()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    settings = {
        "TENSORSTORE_GCS_HTTP_URL": server.url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "stand-in",
        "STORAGE_EMULATOR_HOST": server.url,
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    try:
        with mock.patch.dict(os.environ, settings):
            yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
