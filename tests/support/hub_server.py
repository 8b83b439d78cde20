"""A stand-in for a model hub: the part of its HTTP interface that huggingface_hub uses to write and read models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

TOKEN = "hf_owner"
READER = "hf_reader"


class Hub:
    """Repositories in memory: commits are snapshots of files, branches point at them.

    Attributes:
        repos: Name to ``{"private", "branches": {name: commit}, "commits": {id: {path: bytes}}}``.
        requests: ``METHOD path`` of everything asked.
        broken: Paths whose download breaks off in the middle, once.
    """

    def __init__(self, handler=None):
        self.repos = {}
        self.blobs = {}
        self.requests = []
        self.broken = set()
        self.down = False
        outer = self

        class Handler(handler or RepositoryHandler):
            hub = outer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def create(self, name, private=False):
        self.repos[name] = {"private": private, "branches": {}, "commits": {}}
        self.commit(name, "main", {}, [])

    def commit(self, name, branch, new, deleted):
        repo = self.repos[name]
        files = dict(repo["commits"].get(repo["branches"].get(branch), {}))
        files.update(new)
        for path in deleted:
            files.pop(path, None)
        digest = hashlib.sha1(repr((len(repo["commits"]), sorted(files))).encode()).hexdigest()
        repo["commits"][digest] = files
        repo["branches"][branch] = digest
        return digest

    def put(self, name, folder):
        """A repository with the files of a folder, as if somebody had pushed them."""
        self.create(name)
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return self.commit(name, "main", files, [])


class RepositoryHandler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _send(self, status, body=b"", headers=None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status, code):
        self._send(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def _user(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _repo(self, name):
        """The repository, if it is there and the caller may see it; else an answer has been sent."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo["private"] and self._user() not in (TOKEN, READER)):
            self._error(401 if not self._user() else 404, "RepoNotFound")
            return None
        return repo

    def _files(self, repo, revision):
        commit = repo["branches"].get(revision, revision)
        if commit not in repo["commits"]:
            self._error(404, "RevisionNotFound")
            return None, None
        return commit, repo["commits"][commit]

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.down:
            return self._send(503, {"error": "down for maintenance"})
        if path == "/api/whoami-v2":
            return self._send(200, {"name": "acme", "type": "user", "orgs": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|refs)(?:/([^/]+)(?:/(.*))?)?)?", path):
            return self._model(*match.groups())
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*match.groups())
        return self._error(404, "EntryNotFound")

    def _model(self, name, what, revision, below):
        repo = self._repo(name)
        if repo is None:
            return None
        commit, files = self._files(repo, revision or "main")
        if files is None:
            return None
        if what == "refs":
            refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo["branches"].items()]
            return self._send(200, {"branches": refs, "converts": [], "tags": []})
        if what == "tree":
            inside = [path for path in sorted(files) if path.startswith(below or "")]
            if below and not inside:
                return self._error(404, "EntryNotFound")
            rows = [{"type": "file", "path": p, "size": len(files[p]), "oid": _sha1(files[p])} for p in inside]
            return self._send(200, rows)
        siblings = [{"rfilename": path} for path in sorted(files)]
        return self._send(
            200,
            {"id": name, "modelId": name, "sha": commit, "private": repo["private"], "siblings": siblings, "tags": []},
        )

    def _resolve(self, name, revision, file):
        repo = self._repo(name)
        if repo is None:
            return None
        commit, files = self._files(repo, revision)
        if files is None:
            return None
        if file not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = files[file]
        headers = {"ETag": f'"{_sha1(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if (span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) and self.command == "GET":
            end = int(span[2]) + 1 if span[2] else len(data)
            headers["Content-Range"] = f"bytes {span[1]}-{end - 1}/{len(data)}"
            return self._send(206, data[int(span[1]) : end], headers)
        if self.command == "GET" and file in self.hub.broken:
            self.hub.broken.discard(file)
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.connection.close()
            return None
        return self._send(200, data, headers)

    def do_PUT(self):
        self.hub.requests.append(f"PUT {self.path}")
        self.hub.blobs[self.path.rsplit("/", 1)[-1]] = self._body()
        self._send(200)

    def do_POST(self):
        path, body = unquote(urlparse(self.path).path), self._body()
        self.hub.requests.append(f"POST {path}")
        if self.hub.down:
            return self._send(503, {"error": "down for maintenance"})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if self._user() not in (TOKEN, READER):
            return self._error(401, "Unauthorized")
        if self._user() == READER:
            return self._error(403, "Forbidden")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'acme'}/{asked['name']}"
            if name in self.hub.repos:
                return self._send(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
            self.hub.create(name, asked.get("private") or asked.get("visibility") == "private")
            return self._send(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            asked = json.loads(body)["files"]
            mode = lambda p: "lfs" if p.endswith(".safetensors") else "regular"  # noqa: E731
            rows = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in asked]
            return self._send(200, {"files": rows})
        if path.endswith(".git/info/lfs/objects/batch"):
            rows = [
                {**o, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]
            ]
            return self._send(200, {"transfer": "basic", "objects": rows})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", path):
            repo = self.hub.repos[match[1]]
            repo["branches"].setdefault(match[2], repo["branches"]["main"])
            return self._send(200, {})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            return self._commit(match[1], match[2], [json.loads(line) for line in body.splitlines() if line.strip()])
        return self._error(404, "EntryNotFound")

    def _commit(self, name, branch, operations):
        new, deleted = {}, []
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                new[value["path"]] = self.hub.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                deleted.append(value["path"])
        digest = self.hub.commit(name, branch, new, deleted)
        url = f"{self.hub.url}/{name}/commit/{digest}"
        return self._send(200, {"success": True, "commitOid": digest, "commitUrl": url, "hookOutput": ""})


def _sha1(data):
    return hashlib.sha1(data).hexdigest()
