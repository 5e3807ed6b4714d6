"""What the Hub's stand-in answers; see hub_stand_in.py."""

import base64
import hashlib
import json
import re
import socket
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote

import yaml

LARGE = (".safetensors", ".bin", ".pt", ".png", ".parquet")  # uploaded as LFS objects
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
API = rf"/api/(?:models|datasets)/{REPO}"
ROUTES = [
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", r"/api/whoami-v2", "whoami"),
    ("GET", rf"{API}(?:/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", rf"{API}/auth-check(?P<write>/write)?", "auth_check"),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
    ("GET", rf"{API}/refs", "refs"),
    ("POST", rf"{API}/branch/(?P<branch>[^/]+)", "create_branch"),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/storage/(?P<oid>\w+)", "lfs_store"),  # the real one's addresses are signed, and need no token
    ("POST", rf"/lfs/{REPO}/verify", "lfs_verify"),
    ("GET", rf"(?:/datasets)?/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "file"),
]
WRITES = {"create_branch", "preupload", "commit", "lfs_batch", "lfs_verify"}


class Refusal(Exception):
    """An answer that is an error: status, the Hub's code for it, and its words."""


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        hub = self.server
        hub.log.append((self.command, self.path))
        if hub.gone_after_requests is not None:
            hub.gone = hub.gone or hub.gone_after_requests <= 0
            hub.gone_after_requests -= 1
        if hub.silent:
            hub.ended.wait(timeout=20)
        if hub.gone or hub.silent:
            self._hang_up()
            return
        try:
            self._route()
        except Refusal as refusal:
            status, code, message = refusal.args
            if not self.body_taken:  # else it would be read as the next request
                self._body()
            self._json({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})
        except ConnectionError:
            self._hang_up()

    do_HEAD = do_POST = do_PUT = do_GET

    def _route(self):
        self.body_taken = False
        path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        authorization = self.headers.get("Authorization")
        self.token = authorization.removeprefix("Bearer ") if authorization else None
        method = "GET" if self.command == "HEAD" else self.command
        routes = [] if self.server.closed else [route[1:] for route in ROUTES if route[0] == method]
        found = [(match, name) for pattern, name in routes if (match := re.fullmatch(pattern, path))]
        if not found:
            raise Refusal(404, "NotFound", "there is no such page")
        match, name = found[0]
        if self.token is not None and self.server.user(self.token) is None:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        arguments = {key: value and unquote(value) for key, value in match.groupdict().items()}
        if "repo" in arguments:
            self._enter(arguments.pop("repo"), writes=name in WRITES or bool(arguments.get("write")))
        if "revision" in arguments:
            arguments["revision"] = self._resolved(arguments["revision"])
        getattr(self, f"_{name}")(**arguments)

    def _enter(self, repo_id, writes):
        hub, namespace = self.server, repo_id.split("/")[0]
        self.repo_id, self.repo = repo_id, hub.repositories.get(repo_id)
        if self.repo is None or self.repo.private and not hub.may_read(self.token, namespace):
            raise Refusal(401 if self.token is None else 404, "RepoNotFound", "Repository not found")
        if writes and not hub.may_write(self.token, namespace):
            raise Refusal(403, "", f"Forbidden: you do not have write access to {repo_id}")

    def _resolved(self, revision):
        self.branch = revision or "main"
        oid = self.repo.resolve(self.branch)
        if oid is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    # ---- Repositories ----------------------------------------------------------------------------------------------

    def _create(self):
        asked = json.loads(self._body())
        user = self.server.user(self.token)
        if user is None:
            raise Refusal(401, "", "Invalid username or password.")
        namespace = asked.get("organization") or user
        if not self.server.may_write(self.token, namespace):
            raise Refusal(403, "", f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        repo_id = f"{namespace}/{asked['name']}"
        answer = {"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.server.repositories:
            self._json(answer | {"error": "You already created this model repo"}, 409)
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.add(repo_id, private=private)
        self._json(answer)

    def _whoami(self):
        user = self.server.user(self.token)
        if user is None:
            raise Refusal(401, "", "Invalid username or password.")
        self._json({"type": "user", "name": user, "orgs": []})

    def _auth_check(self, write):
        self._json({})

    def _info(self, revision):
        facts = {"_id": "0", "id": self.repo_id, "modelId": self.repo_id, "private": self.repo.private, "tags": []}
        siblings = [{"rfilename": name} for name in self.repo.commits[revision]]
        self._json(facts | {"gated": self.repo.gated, "sha": revision, "siblings": siblings})

    def _tree(self, revision, path):
        entries, prefix = {}, f"{path}/" if path else ""
        for name, data in self.repo.commits[revision].items():
            parents = [name[: index.start()] for index in re.finditer("/", name)]
            folders = {parent: {"type": "directory", "path": parent, "size": 0, "oid": "0" * 40} for parent in parents}
            entries |= folders | {name: {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}}
        inside = [entry for name, entry in entries.items() if name.startswith(prefix)]
        recursive = "recursive" in self.query and self.query["recursive"][0].lower() in ("1", "true")
        self._json([entry for entry in inside if recursive or "/" not in entry["path"].removeprefix(prefix)])

    def _refs(self):
        names = [{"name": name, "ref": name, "targetCommit": oid} for name, oid in self.repo.branches.items()]
        self._json({"branches": names, "tags": [], "converts": []})

    def _create_branch(self, branch):
        if branch in self.repo.branches:
            raise Refusal(409, "", "Reference already exists")
        self.repo.branches[branch] = self._resolved(json.loads(self._body()).get("startingPoint"))
        self._json({})

    # ---- Uploads ---------------------------------------------------------------------------------------------------

    def _validate_yaml(self):
        text = json.loads(self._body())["content"]
        found = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
        try:
            wrong = found and not isinstance(yaml.safe_load(found[1]), dict)
        except yaml.YAMLError:
            wrong = True
        errors = [{"message": "the metadata is no mapping"}] if wrong else []
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _preupload(self, revision):
        files, there = [], self.repo.commits[revision]
        for file in json.loads(self._body())["files"]:
            name = file["path"]
            large = name.endswith(LARGE)
            oid_of = sha256 if large else git_oid
            oid = oid_of(there[name]) if name in there else None
            mode = "lfs" if large else "regular"
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def _lfs_batch(self):
        objects = json.loads(self._body())["objects"]
        for entry in objects:
            entry["authenticated"] = True
            if entry["oid"] not in self.server.objects:
                hrefs = {"upload": f"storage/{entry['oid']}", "verify": f"lfs/{self.repo_id}/verify"}
                entry["actions"] = {name: {"href": f"{self.server.url}/{path}"} for name, path in hrefs.items()}
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_store(self, oid):
        data = self._body(counted=True)
        if sha256(data) != oid:
            raise Refusal(400, "", "the object is not the one announced")
        self.server.objects[oid] = data
        self.server.stored.append(oid)
        self._json({})

    def _lfs_verify(self):
        entry = json.loads(self._body())
        whole = len(self.server.objects.get(entry["oid"], b"")) == entry["size"]
        self._json({}, 200 if whole else 404)

    def _commit(self, revision):
        added, deleted, message = {}, set(), ""
        for line in self._body().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                added[value["path"]] = self.server.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                deleted.add(value["path"])
            else:  # deletedFolder
                deleted |= {name for name in self.repo.commits[revision] if name.startswith(value["path"])}
        oid = self.repo.commit(self.branch, added, deleted, message)
        url = f"{self.server.url}/{self.repo_id}/commit/{oid}"
        self._json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    # ---- Downloads -------------------------------------------------------------------------------------------------

    def _file(self, revision, path):
        data = self.repo.commits[revision].get(path)
        if self.repo.gated:
            raise Refusal(403, "GatedRepo", "Access to this model is restricted")
        if data is None:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        self.server.asked.add(path)
        headers = {"ETag": f'"{sha256(data)}"', "X-Repo-Commit": revision}
        if "Range" not in self.headers:
            self._answer(200, data, headers)
            return
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = data[int(first) : int(last or len(data)) + 1]
        self.server.sent.append((path, len(part)))
        last = int(first) + len(part) - 1
        self._answer(206, part, headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    # ---- HTTP ------------------------------------------------------------------------------------------------------

    def _body(self, counted=False):
        """The request's body; raises ConnectionError where the network goes while it comes in."""
        hub, parts, left = self.server, [], int(self.headers.get("Content-Length", 0))
        while left:
            parts.append(self.rfile.read(min(left, 2**12)))
            if not parts[-1]:
                raise ConnectionError
            left -= len(parts[-1])
            if counted and hub.gone_after_bytes is not None:
                hub.gone_after_bytes -= len(parts[-1])
                if hub.gone_after_bytes < 0:
                    hub.gone = True
                    raise ConnectionError
        self.body_taken = True
        return b"".join(parts)

    def _hang_up(self):
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other side was first
            pass

    def _json(self, value, status=200, headers=None):
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _answer(self, status, data, headers=None):
        hub = self.server
        if hub.gone_with is not None and hub.gone_with in self.path:
            hub.gone = True
            raise ConnectionError
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
