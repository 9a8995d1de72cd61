"""A mirror of the hub on loopback, with a port and a path; to absolute URLs it is a proxy."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

COMMIT = "c" * 40
MODEL = "/mirror/hf/owner/model/resolve/"


@contextmanager
def mirror(files: dict[str, bytes]) -> Iterator[SimpleNamespace]:
    """Serves `files` as those of owner/model. `asked`: what it was asked; `status`, `hub`: answer
    with another status, without what tells a hub."""
    state = SimpleNamespace(asked=[], status=200, hub=True)

    class Mirror(BaseHTTPRequestHandler):
        def do_HEAD(self) -> bytes:
            state.asked.append(f"{self.command} {self.path}")
            _, found, rest = self.path.partition(MODEL)
            content = files.get(rest.partition("/")[2]) if found else None
            self.send_response(404 if content is None and state.status == 200 else state.status)
            self.send_header("Content-Length", str(len(content or b"")))
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            if state.hub:
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{hashlib.sha1(content or b"").hexdigest()}"')
            self.end_headers()
            return content or b""

        def do_GET(self) -> None:
            self.wfile.write(self.do_HEAD())

        def do_CONNECT(self) -> None:
            state.asked.append(f"CONNECT {self.path}")
            self.send_error(403, "not for you")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        state.at = f"127.0.0.1:{serving.server_port}"
        yield state
        serving.shutdown()
