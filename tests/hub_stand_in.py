"""A stand-in for the Hub on this machine: one public repository, of a data set or a model, read with HTTP ranges."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import huggingface_hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubStandIn(ThreadingHTTPServer):
    """Serves the files of a folder, without those of its subfolders, as the data set `repo`.

    Attributes:
        sent: (file, number of bytes) of every answer with a part of a file.
        asked: every file that was asked for.
        closed: whether every request from now on finds nothing.
    """

    daemon_threads = True

    def __init__(self, folder, repo):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repo = repo
        self.files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
        self.sent: list[tuple[str, int]] = []
        self.asked: set[str] = set()
        self.closed = False


@contextlib.contextmanager
def hub_stand_in(folder, repo, monkeypatch):
    """Has the libraries of this process take a `HubStandIn` for the Hub."""
    with HubStandIn(folder, repo) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(Path(folder, "cache")))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            huggingface_hub.HfFileSystem.clear_instance_cache()  # it knows the server's files
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        path, repo, files = self.path.partition("?")[0], self.server.repo, self.server.files
        place, found, rest = path.partition(f"/{repo}")
        kind, _, rest = rest.strip("/").partition("/")
        if self.server.closed or not found or place not in ("", "/datasets", "/api/datasets", "/api/models"):
            self._answer(404, b"")
        elif kind in ("", "revision"):
            siblings = [{"rfilename": name} for name in files]
            facts = {"_id": "0", "id": repo, "private": False, "tags": [], "sha": COMMIT, "siblings": siblings}
            self._json(facts)
        elif kind == "tree" and "/" not in rest:
            tree = [{"type": "file", "path": name, "size": len(data), "oid": COMMIT} for name, data in files.items()]
            self._json(tree)
        elif kind == "resolve" and (name := rest.partition("/")[2]) in files:
            self._file(name)
        else:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def _file(self, name):
        data = self.server.files[name]
        self.server.asked.add(name)
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        if "Range" not in self.headers:
            self._answer(200, data, headers)
            return
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = data[int(first) : int(last) + 1]
        self.server.sent.append((name, len(part)))
        self._answer(206, part, headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def _json(self, value):
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status, data, headers=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
