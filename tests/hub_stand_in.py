"""A stand-in for the Hub on this machine: repositories that are read and written with the real client."""

import contextlib
import hashlib
import os
import threading
from collections.abc import Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path

import datasets
import huggingface_hub
from hub_handler import HubHandler

TOKENS = {"hf_write": ("me", "write"), "hf_read": ("me", "read"), "hf_someone": ("someone", "write")}
MEMBERS = {"lab": {"me"}}  # of organisations


class Repository:
    """Files by commit; a branch is the name of one. The same whether of a model or a data set."""

    def __init__(self, private=False, files: Mapping[str, bytes] | None = None):
        self.private = private
        self.gated = False
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.messages: list[str] = []
        self.commit("main", files or {".gitattributes": b"*.safetensors filter=lfs\n"}, message="initial commit")

    def commit(self, branch: str, added: Mapping[str, bytes], deleted: set[str] = frozenset(), message="") -> str:
        files = (self.files(branch) if branch in self.branches else {}) | added
        self.messages.append(message)
        oid = hashlib.sha1(f"{len(self.commits)} {branch} {message} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = {name: data for name, data in files.items() if name not in deleted}
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, or one by its number."""
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None

    def files(self, revision="main") -> dict[str, bytes]:
        return self.commits[self.resolve(revision)]


class HubStandIn(ThreadingHTTPServer):
    """The Hub of `repositories`, for the users of `TOKENS`.

    Attributes:
        repositories: by their ids.
        objects: large files that were uploaded, committed or not, by SHA-256.
        stored: the SHA-256 of every large file that came in whole, in their order; what is sent twice stands twice.
        log: (method, path) of every request.
        sent: (file, number of bytes) of every answer with a part of a file.
        asked: every file that was asked for.
        closed: whether every request from now on finds nothing.
        gone: whether the network is: connections are closed without an answer.
        silent: whether no request is answered at all.
        gone_after_requests, gone_after_bytes: it goes after so many more requests, or bytes of large files.
        gone_with: it goes before the answer to a request with this in its path, once that is done.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.stored: list[str] = []
        self.log: list[tuple[str, str]] = []
        self.sent: list[tuple[str, int]] = []
        self.asked: set[str] = set()
        self.closed = False
        self.ended = threading.Event()
        self.back()

    def back(self) -> None:
        """The network is there again."""
        self.gone = self.silent = False
        self.gone_after_requests: int | None = None
        self.gone_after_bytes: int | None = None
        self.gone_with: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def files(self) -> dict[str, bytes]:
        """Those of the first repository."""
        return next(iter(self.repositories.values())).files()

    def add(self, repo_id: str, files: Mapping[str, bytes] | None = None, private=False) -> Repository:
        self.repositories[repo_id] = Repository(private, files)
        return self.repositories[repo_id]

    def environment(self, folder, token: str | None = None) -> dict[str, str]:
        """That of a process which takes this server for the Hub; `folder` is its home of Hub caches and tokens."""
        names = ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HF_TOKEN_PATH")
        kept = {name: value for name, value in os.environ.items() if name not in names}
        changes = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder)}
        return kept | changes | ({} if token is None else {"HF_TOKEN": token})

    def user(self, token: str | None) -> str | None:
        return TOKENS[token][0] if token in TOKENS else None

    def may_read(self, token: str | None, namespace: str) -> bool:
        """A private repository."""
        user = self.user(token)
        return user is not None and (user == namespace or user in MEMBERS.get(namespace, ()))

    def may_write(self, token: str | None, namespace: str) -> bool:
        return self.may_read(token, namespace) and TOKENS[token][1] == "write"


@contextlib.contextmanager
def writable_hub(folder, monkeypatch, token: str | None = "hf_write"):
    """Has the libraries of this process take a `HubStandIn` for the Hub, logged in with a token of `TOKENS`.

    Args:
        folder: for the libraries' caches.
    """
    with HubStandIn() as server:
        _take_for_the_hub(server.url, Path(folder), monkeypatch)
        if token is None:
            monkeypatch.delenv("HF_TOKEN", raising=False)
        else:
            monkeypatch.setenv("HF_TOKEN", token)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            huggingface_hub.HfFileSystem.clear_instance_cache()  # it knows the server's files
            huggingface_hub.close_session()  # with its connections, and the timeouts that hfkd gave it
            server.ended.set()
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def hub_stand_in(folder, repo, monkeypatch):
    """The same, not logged in, with the files of a folder, without those of its subfolders, as repository `repo`."""
    with writable_hub(Path(folder, "cache"), monkeypatch, token=None) as server:
        server.add(repo, {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()})
        yield server


def _take_for_the_hub(url, folder, monkeypatch):
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))  # not that of whoever runs the tests
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # made once, for the endpoint of then
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
