"""A Hub of data sets on this machine: as much of its HTTP interface as an upload and `load_dataset` use.

Clients take the address from HF_ENDPOINT when they are imported, so they run in processes of their own.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What was uploaded.

    repositories  name -> path -> content
    private       name -> whether it was made so
    stored        SHA-256 -> content of large files
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.stored: dict[str, bytes] = {}
        self.url = ""

    def environment(self) -> dict[str, str]:
        """What makes a client turn here."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": "hf_stub", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


class Handler(BaseHTTPRequestHandler):
    def __init__(self, *args, hub: Hub, **kwargs):
        self.hub = hub
        super().__init__(*args, **kwargs)

    def log_message(self, *args) -> None:
        pass

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.repositories.setdefault(name, {})
            self.hub.private[name] = asked.get("private", False) or asked.get("visibility") == "private"
            self._answer({"url": f"{self.hub.url}/datasets/{name}"})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            # Data and pictures are large files, text is not.
            modes = [
                {"path": file["path"], "shouldIgnore": False, "oid": None}
                | {"uploadMode": "lfs" if file["path"].endswith((".parquet", ".png")) else "regular"}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": modes})
        elif path.endswith("/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.hub.url}/store/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/commit/main", path):
            files = self.hub.repositories[match[1]]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.stored[value["oid"]]
            url = f"{self.hub.url}/datasets/{match[1]}/commit/{COMMIT}"
            self._answer({"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None})
        elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/\w+", path):
            try:
                asked = json.loads(body)["paths"]
            except ValueError:
                asked = parse_qs(body.decode())["paths"]
            files = self.hub.repositories[match[1]]
            self._answer([_entry(name, files[name]) for name in asked if name in files])
        else:
            self._answer({"error": f"no {path}"}, 404)

    def do_PUT(self) -> None:
        content = self._body()
        oid = self.path.removeprefix("/store/")
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.stored[oid] = content
        self._answer({})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/\w+)?", path):
            files = self.hub.repositories.get(match[1])
            if files is None:
                self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
                return
            info = {"id": match[1], "sha": COMMIT, "private": self.hub.private[match[1]], "tags": [], "downloads": 0}
            self._answer({**info, "siblings": [{"rfilename": name} for name in files]})
        elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/\w+(?:/(.*))?", path):
            folder = f"{match[2]}/" if match[2] else ""
            found = {n: c for n, c in self.hub.repositories[match[1]].items() if n.startswith(folder)}
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() in ("true", "1")
            entries = [_entry(n, c) for n, c in found.items() if recursive or "/" not in n[len(folder) :]]
            inner = {folder + n[len(folder) :].split("/")[0] for n in found if "/" in n[len(folder) :]}
            entries += [{"type": "directory", "path": name, "oid": COMMIT, "size": 0} for name in sorted(inner)]
            self._answer(entries)
        elif match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/\w+/(.*)", path):
            content = self.hub.repositories.get(match[1], {}).get(match[2])
            if content is None:
                self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
                return
            about: dict[str, str] = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": COMMIT}
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
                about["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
                self._answer(content[first : last + 1], 206, **about)
            else:
                self._answer(content, 200, **about, Accept_Ranges="bytes")
        else:
            self._answer({"error": f"no {path}"}, 404)

    do_HEAD = do_GET


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers on 127.0.0.1 while the context lasts."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, hub=hub)) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
