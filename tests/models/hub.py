"""A Hugging Face hub on loopback: what huggingface_hub asks of one to download a model, and faults on request."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + 34 * "0"


@dataclass
class Hub:
    """One repository, `org/model`, with one commit.

    Attributes:
        files: by their names; those above 1000 bytes are large ones, with a sha256.
        cuts: how many answers of a file end before their last bytes come.
        etags: what is said instead of a file's digest when it is downloaded.
        listed: names that are listed beside the files.
        asked: method, path and range of all requests.
    """

    files: dict[str, bytes]
    cuts: dict[str, int] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    listed: list[str] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    address: str = ""

    @classmethod
    def of_folder(cls, folder: Path, **faults: Any) -> "Hub":
        """With the files of a folder."""
        names = [path for path in folder.rglob("*") if path.is_file()]
        return cls({path.relative_to(folder).as_posix(): path.read_bytes() for path in names}, **faults)

    def downloaded(self, name: str) -> int:
        """How many times the content of a file was asked for."""
        return sum(method == "GET" and path.endswith(f"/{name}") for method, path, _ in self.asked)

    @contextmanager
    def serving(self) -> Iterator[dict[str, str]]:
        """Serve it; gives the environment of a command that uses it."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def _info(self) -> dict[str, Any]:
        files: list[dict[str, Any]] = [{"rfilename": name} for name in self.listed]
        for name, data in self.files.items():
            stated = data + b"x" if name in self.wrong else data
            files.append({"rfilename": name, "size": len(data), "blobId": _blob(stated)})
            if len(data) > 1000:
                digest = hashlib.sha256(stated).hexdigest()
                files[-1]["lfs"] = {"size": len(data), "sha256": digest, "pointerSize": 100}
        return {"_id": "1", "id": "org/model", "modelId": "org/model", "sha": COMMIT, "tags": [], "siblings": files}

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.asked.append((self.command, path, self.headers.get("Range")))
                if path in ("/api/models/org/model", "/api/models/org/model/revision/main"):
                    self.reply(json.dumps(hub._info()).encode(), {"Content-Type": "application/json"}, body)
                elif path.startswith("/api/models/org/model/revision/"):
                    self.refuse(404, "RevisionNotFound")
                elif path.startswith(start := f"/org/model/resolve/{COMMIT}/") and path[len(start) :] in hub.files:
                    self.send_file(path[len(start) :], body)
                else:
                    self.refuse(404, "EntryNotFound" if path.startswith("/org/model/") else "RepoNotFound")

            def refuse(self, status: int, code: str) -> None:
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def reply(self, data: bytes, headers: dict[str, str], body: bool) -> None:
                self.send_response(200)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def send_file(self, name: str, body: bool) -> None:
                data = hub.files[name]
                asked = self.headers.get("Range")
                begin = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
                self.send_response(206 if asked else 200)
                self.send_header("X-Repo-Commit", COMMIT)
                large = len(data) > 1000
                etag = hub.etags.get(name, hashlib.sha256(data).hexdigest() if large else _blob(data))
                self.send_header("ETag", f'"{etag}"')
                self.send_header("Accept-Ranges", "bytes")
                if asked:
                    self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(data) - begin))
                self.end_headers()
                if not body:
                    return
                if hub.cuts.get(name, 0):
                    hub.cuts[name] -= 1
                    self.wfile.write(data[begin : begin + (len(data) - begin) // 2])
                    self.close_connection = True
                else:
                    self.wfile.write(data[begin:])

        return Handler


def _blob(data: bytes) -> str:
    """Git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
