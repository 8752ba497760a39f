"""A Hub on this machine: as much of its HTTP interface as huggingface_hub 2.4 uses for models, without xet.

    with Hub(folder) as hub:
        hub.add("lab/model", some_folder)                        # or {"config.json": b"{}"}; private=, gated=, ...
        run("inspect", "lab/model", **hub.environment(home))     # a process of its own: HF_ENDPOINT is read at import
        assert hub.downloads() == {"config.json": 612}           # path in the repository -> bytes sent
        hub.fail(503, times=2, method="GET", path="/resolve/")   # the next two such requests
        hub.drop(1000, path="/resolve/main/model.safetensors")   # the connection ends after 1,000 bytes of a body
        hub.repos["lab/model"].files("refs/pr/1")                # what a commit holds
        hub.log, hub.uploads(), hub.clear()                      # all requests; large files received; forget both

Who calls is said by a token: WRITER is the user "lab", READER the same user with a token that may only read, any
other token is refused. `hub.users[READER].accepted.add("lab/gated")` accepts a licence.
"""

import json
import re
import socket
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

import hub_reading
import hub_writing
from repositories import HubError, Repositories, User

WRITER, READER = "hf_local_writer", "hf_local_reader"
USER = "lab"


@dataclass
class Request:
    method: str
    path: str  # as it was sent, without the query
    status: int  # 0: the connection was dropped
    received: int  # bytes of the body
    sent: int


@dataclass
class Fault:
    """Spoil the next `times` requests of a method (any, if empty) whose path contains `path`."""

    times: int
    method: str
    path: str
    error: HubError | None = None  # to answer
    drop: int | None = None  # bytes of a body to let through, of one that comes or else of the answer


class Hub(Repositories):
    def __init__(self, folder):
        super().__init__(folder)
        self.users = {WRITER: User(USER), READER: User(USER, writes=False)}
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.page_size = 1000  # entries of one answer to `tree`
        self.serves_parts = True  # whether Range is followed
        self.redirects = False  # whether large files lie elsewhere
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.hub = True, self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """End the server: from now on connections are refused."""
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home, token: str | None = WRITER) -> dict[str, str]:
        """Say what a process needs to find this Hub, with its cache in `home` and nobody logged in but by `token`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(Path(home) / "hub"),
            "HF_TOKEN": token or "",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def add(self, name: str, source, revision: str = "main", private: bool = False, gated: bool = False) -> str:
        """Commit a folder, or bytes by their paths, to a repository that is made if need be; returns the commit."""
        repo = self.repos.get(name) or self.create(name, private, gated)
        if not isinstance(source, dict):
            paths = [path for path in Path(source).rglob("*") if path.is_file()]
            source = {path.relative_to(source).as_posix(): path.read_bytes() for path in paths}
        files = {path: self.store(path, content) for path, content in source.items()}
        return repo.commit(revision, repo.files(revision if revision in repo.refs else "main") | files, "add")

    def fail(self, status: int, times=1, method="", path="", message="The Hub is unwell", code=None, **headers):
        """Have requests answered by an error; `Retry_After="1"` adds a header of that name."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(times, method, path, HubError(status, message, code, **headers)))

    def drop(self, after: int, times=1, method="", path=""):
        """Have connections end in the middle of a body."""
        self.faults.append(Fault(times, method, path, drop=after))

    def next_fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            without_body = fault.drop is not None and method == "HEAD"
            if fault.times > 0 and fault.method in ("", method) and fault.path in path and not without_body:
                fault.times -= 1
                return fault
        return None

    def downloads(self) -> dict[str, int]:
        """Sum up the bytes sent of each file, by its path in its repository."""
        return self.total("GET", r"/.+/resolve/[^/]+/(.+)", "sent")

    def uploads(self) -> dict[str, int]:
        """Sum up the bytes received of each large file, by its SHA-256."""
        return self.total("PUT", r"/lfs/(.+)", "received")

    def total(self, method: str, pattern: str, count: str) -> dict[str, int]:
        sums = {}
        for request in self.log:
            if request.method == method and (found := re.fullmatch(pattern, request.path)):
                name = unquote(found[1])
                sums[name] = sums.get(name, 0) + getattr(request, count)
        return sums

    def clear(self):
        """Forget the log, and the faults that nothing ran into."""
        self.log.clear()
        self.faults.clear()
        self.serves_parts, self.redirects = True, False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer follows its headers at once

    def log_message(self, *_):
        pass

    def answer(self):
        hub, (path, _, query) = self.server.hub, self.path.partition("?")
        fault = hub.next_fault(self.command, path) or Fault(0, "", "")
        length = int(self.headers.get("Content-Length") or 0)
        if length and fault.drop is not None:
            received = len(self.rfile.read(min(fault.drop, length)))
            hub.log.append(Request(self.command, path, 0, received, 0))
            self.hang_up()
            return
        body = self.rfile.read(length)
        headers, content, status = {}, b"", 200
        try:
            if fault.error:
                raise fault.error
            status, headers, content = self.route(path, query, body)
        except HubError as error:
            status, headers, content = error.status, error.headers, {"error": str(error)}
        if not isinstance(content, bytes):
            headers, content = {"Content-Type": "application/json"} | headers, json.dumps(content).encode()
        wanted = content if self.command != "HEAD" else b""
        cut = min(fault.drop, len(wanted)) if fault.drop is not None else len(wanted)
        request = Request(self.command, path, status, len(body), cut)
        hub.log.append(request)  # before the answer: whoever has it may read the log
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(wanted[:cut])
        if fault.drop is not None:
            self.hang_up()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def hang_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def route(self, path: str, query: str, body: bytes):
        """Find who answers; what he returns are a status, headers and bytes or JSON."""
        for method, pattern, function in hub_reading.ROUTES + hub_writing.ROUTES:
            if self.command in method and (found := re.fullmatch(pattern, path)):
                parts = {name: unquote(part or "") for name, part in found.groupdict().items()}
                token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
                user = self.server.hub.user(token)
                options = {name: values[-1] for name, values in parse_qs(query).items()}
                return function(hub_reading.Call(self.server.hub, path, user, parts, options, body, self.headers))
        raise HubError(404, f"Sorry, we can't find {self.command} {path}")
