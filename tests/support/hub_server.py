"""A local server that stands in for the Hugging Face hub."""

import contextlib
import hashlib
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Serves a few small shards as the hub does: HEAD for the metadata, GET for the bytes, with ranges. `faults` lists
    what goes wrong with the next requests for a file; requests after those are served."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.requests, self.ranges, self.tokens = folder, [], [], set()
        self.faults: dict[str, list] = {}
        self.missing, self.hashes, self.sent, self.pace = set(), True, Counter(), 0.0
        self.elsewhere = ""  # address of another server that has the bytes

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the tests


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        server, name = self.server, self.path.rsplit("/", 1)[-1].split("?")[0]
        path = server.folder / name
        if "/resolve/" not in self.path:
            return self.reply(404, b"")  # the library also makes requests of its own
        server.requests.append((self.command, name))
        server.tokens.add(self.headers.get("Authorization"))
        if name in server.missing or not path.exists():
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = path.read_bytes()
        etag = hashlib.sha256(data).hexdigest() if server.hashes else "version-1"
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": "c" * 40, "Accept-Ranges": "bytes"}
        if server.elsewhere:
            headers |= {"ETag": '"of this answer"', "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
            return self.reply(302, b"", headers | {"Location": server.elsewhere + self.path})
        faults = server.faults.get(f"{self.command} {name}") or [None]
        fault = faults.pop(0)
        if isinstance(fault, int):
            return self.reply(fault, b"", {"Retry-After": "1"} if fault == 429 else {})
        if fault == "silent":
            time.sleep(3)
            return self.hang_up()
        if fault == "wrong":
            data = data[:1000] + b"\0" + data[1001:]
        if fault == "other":
            data = b"<html>You are on an airport</html>"
        start = 0
        if (match := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) and fault != "whole":
            start = int(match[1])
            server.ranges.append((name, start))
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if fault == "short":  # and Content-Length says so
            body = body[: len(body) // 2]
        cut = len(body) // 2 if fault in ("drop", "stall") else len(body)
        self.reply(206 if match and fault != "whole" else 200, body, headers, cut)
        if fault == "stall":
            time.sleep(3)
        if cut < len(body):
            self.hang_up()

    def reply(self, status, body, headers=None, cut=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        name, pace = self.path.rsplit("/", 1)[-1], self.server.pace
        body = body[:cut]
        for i in range(0, len(body), 4096):
            self.wfile.write(body[i : i + 4096])
            self.server.sent[name] += len(body[i : i + 4096])
            time.sleep(pace)

    def hang_up(self):
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(2)


@contextlib.contextmanager
def serving(folder):
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
