"""The part of a hub's HTTP interface that ``datasets`` reads data sets by."""

from __future__ import annotations

import re
from urllib.parse import parse_qs, unquote, urlparse

from support.hub_server import RepositoryHandler


class DatasetHandler(RepositoryHandler):
    """Serves every repository as a data set: `RepositoryHandler` knows models alone, and no folders."""

    def do_GET(self):
        self.path = self.path.replace("/api/datasets/", "/api/models/").removeprefix("/datasets")
        return super().do_GET()

    def do_POST(self):
        path = unquote(urlparse(self.path).path)
        match = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/([^/]+)", path)
        if match is None:
            return super().do_POST()
        asked = parse_qs(self._body().decode())["paths"]
        _, files = self._files(self._repo(match[1]), match[2])
        return self._send(200, [row for path in asked for row in entries(files, path) if row["path"] == path])

    def _model(self, name, what, revision, below):
        if what != "tree":
            return super()._model(name, what, revision, below)
        _, files = self._files(self._repo(name), revision or "main")
        inside = f"{below}/" if below else ""
        rows = [row for row in entries(files, below or "") if row["path"].startswith(inside)]
        if "recursive=true" not in self.path.lower():
            rows = [row for row in rows if "/" not in row["path"].removeprefix(inside)]
        return self._send(200, rows) if rows else self._error(404, "EntryNotFound")


def entries(files, below):
    """Files and folders at a path or below it."""
    chosen = [path for path in files if not below or path == below or path.startswith(f"{below}/")]
    folders = {path[:end] for path in chosen for end in range(len(path)) if path[end] == "/"}
    rows = [{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in chosen]
    return rows + [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)]
