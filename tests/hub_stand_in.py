"""A stand-in for the Hub on this machine: one public data set repository, read with HTTP ranges."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import huggingface_hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubStandIn(ThreadingHTTPServer):
    """Serves the files of a folder as the data set `repo`.

    Attributes:
        sent: (file, number of bytes) of every answer with file content.
        offline: from now on, every request fails as if the Hub were down.
    """

    daemon_threads = True

    def __init__(self, folder, repo):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repo = repo
        self.files = {path.name: path for path in Path(folder).iterdir()}
        self.sent: list[tuple[str, int]] = []
        self.offline = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def hub_stand_in(folder, repo, monkeypatch):
    """Makes the libraries of this process take a `HubStandIn` for the Hub."""
    with HubStandIn(folder, repo) as server:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            huggingface_hub.HfFileSystem.clear_instance_cache()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        print(self.command, self.path, self.headers.get("Range"))

    def do_GET(self):
        path, api, files = unquote(urlsplit(self.path).path), f"/api/datasets/{self.server.repo}", self.server.files
        content = f"/datasets/{self.server.repo}/resolve/"
        if self.server.offline:
            self._answer(404, b"")
        elif path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": name} for name in files]
            self._json({"_id": "0", "id": self.server.repo, "private": False, "tags": [], "sha": COMMIT, "siblings": siblings})
        elif path.startswith(f"{api}/tree/") and "/" not in path.removeprefix(f"{api}/tree/"):
            self._json([_entry(name, file) for name, file in files.items()])
        elif path.startswith(content) and (name := path.removeprefix(content).partition("/")[2]) in files:
            self._content(name)
        else:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        wanted = parse_qs(body).get("paths", [])
        self._json([_entry(name, file) for name, file in self.server.files.items() if name in wanted])

    def _content(self, name):
        data, headers = self.server.files[name].read_bytes(), {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        if "Range" not in self.headers:
            return self._answer(200, data, headers)
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = data[int(first) : int(last or len(data)) + 1]
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


def _entry(name, file):
    return {"type": "file", "path": name, "size": file.stat().st_size, "oid": COMMIT}
