"""A Hub on this machine: as much of its HTTP interface as uploads, `from_pretrained` and `load_dataset` use.

It knows owners from strangers by their tokens, keeps every commit, and can break a connection half-way. Clients take
the address from HF_ENDPOINT when they are imported, so they run in processes of their own.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

OWNER = "hf_" + "ownerOwner" * 3
STRANGER = "hf_" + "strangerStranger" * 2
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
NAME = "([^/]+/[^/]+)"


@dataclass
class Repository:
    """What was uploaded: commit -> path -> content, the last commit being `head`."""

    kind: str
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    head: str = ""

    def __post_init__(self) -> None:
        self.commit({".gitattributes": b""})

    def commit(self, files: dict[str, bytes]) -> str:
        content = b"".join(name.encode() + files[name] for name in sorted(files))
        self.head = hashlib.sha1(content).hexdigest()
        self.commits[self.head] = files
        return self.head

    @property
    def files(self) -> dict[str, bytes]:
        """Those of the last commit, but the one that a repository is made with."""
        return {name: content for name, content in self.commits[self.head].items() if name != ".gitattributes"}


class Hub:
    """The state of the Hub, and what a test wants to happen.

    repositories  name -> what is in it
    stored        SHA-256 -> content of large files
    requests      (method, path, Range header) of all requests, in order
    broken        end of a path -> bytes after which the next transfer of it breaks off, once; a POST is read, and
                  neither carried out nor answered
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.broken: dict[str, int] = {}
        self.url = ""

    def environment(self, home: Path, token: str | None = OWNER) -> dict[str, str]:
        """What makes a client turn here, as somebody, with a cache of its own."""
        settings = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return settings | {"HF_TOKEN": token or "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def break_after(self, path: str) -> int | None:
        """Bytes after which this transfer is to break off; None if it is not."""
        ending = next((ending for ending in self.broken if path.endswith(ending)), None)
        return None if ending is None else self.broken.pop(ending)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *args, hub: Hub, **kwargs):
        self.hub = hub
        super().__init__(*args, **kwargs)

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        path = self._begin()
        if path == "/api/whoami-v2":
            self._answer({"type": "user", "name": "org", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        elif path.endswith("/auth-check/write"):
            if self._may_write():
                self._answer({})
        elif match := re.fullmatch(rf"/api/(\w+)/{NAME}(?:/revision/([^/]+))?", path):
            if repository := self._readable(match[2], KINDS[match[1]]):
                about = {"id": match[2], "sha": repository.head, "private": repository.private, "tags": []}
                self._answer({**about, "siblings": [{"rfilename": name} for name in repository.files]})
        elif match := re.fullmatch(rf"/api/(\w+)/{NAME}/tree/([^/]+)(?:/(.*))?", path):
            if repository := self._readable(match[2], KINDS[match[1]]):
                self._answer(self._tree(self._at(repository, match[3]), match[4]))
        elif match := re.fullmatch(rf"/(?:(datasets|spaces)/)?{NAME}/resolve/([^/]+)/(.+)", path):
            if repository := self._readable(match[2], KINDS[match[1] or "models"]):
                self._send_file(repository, match[3], match[4])
        else:
            self._answer({"error": f"no {path}"}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = self._begin()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.hub.break_after(path) is not None:
            self._break_off()
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(rf"/api/(\w+)/{NAME}/paths-info/([^/]+)", path):
            if repository := self._readable(match[2], KINDS[match[1]]):
                asked = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
                files = self._at(repository, match[3])
                self._answer([_entry(name, files[name]) for name in asked if name in files])
        elif not self._may_write():
            return
        elif re.fullmatch(rf"/api/(\w+)/{NAME}/preupload/main", path):
            # Data and pictures are large files, text is not.
            large = (".parquet", ".png", ".safetensors", ".npy")
            modes = [
                {"path": file["path"], "shouldIgnore": False, "oid": None}
                | {"uploadMode": "lfs" if file["path"].endswith(large) else "regular"}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": modes})
        elif path.endswith("/objects/batch"):
            # Without an action for what is there already.
            objects = [
                item
                if item["oid"] in self.hub.stored
                else {**item, "actions": {"upload": {"href": f"{self.hub.url}/store/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(rf"/api/(\w+)/{NAME}/commit/main", path):
            self._commit(match[1], match[2], [json.loads(line) for line in body.splitlines()])
        else:
            self._answer({"error": f"no {path}"}, 404)

    def do_PUT(self) -> None:
        path, size = self._begin(), int(self.headers["Content-Length"])
        limit = self.hub.break_after(path)
        content = self.rfile.read(size if limit is None else limit)
        if limit is not None:
            self._break_off()
            return
        oid = path.removeprefix("/store/")
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.stored[oid] = content
        self._answer({})

    def _begin(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        return path

    def _who(self) -> str | None:
        return {OWNER: "org", STRANGER: "stranger"}.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _may_write(self) -> bool:
        """Whether the owner asks; else the refusal is sent."""
        who = self._who()
        if who is None:
            self._answer({"error": "Invalid username or password."}, 401)
        elif who != "org":
            self._answer({"error": "You don't have the rights to create or change this repository"}, 403)
        return who == "org"

    def _readable(self, name: str, kind: str) -> Repository | None:
        """The repository, if the client may see it; else the refusal is sent, which tells nobody that there is one."""
        repository, who = self.hub.repositories.get(name), self._who()
        if repository is not None and repository.kind == kind and (who == "org" or not repository.private):
            return repository
        if who is None:
            self._answer({"error": "Invalid username or password."}, 401, X_Error_Code="RepoNotFound")
        else:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        return None

    @staticmethod
    def _at(repository: Repository, revision: str) -> dict[str, bytes]:
        return repository.commits[repository.head if revision == "main" else revision]

    def _create(self, asked: dict[str, Any]) -> None:
        if not self._may_write():
            return
        name, kind = f"{asked['organization']}/{asked['name']}", asked.get("type", "model")
        address = {"url": f"{self.hub.url}/{'' if kind == 'model' else f'{kind}s/'}{name}"}
        if name in self.hub.repositories:
            self._answer({"error": "You already created this repository", **address}, 409)
            return
        if kind == "space" and asked.get("sdk") not in ("gradio", "docker", "static"):
            self._answer({"error": "a Space needs an sdk"}, 400)
            return
        private = asked.get("private", False) or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(kind, private)
        self._answer(address)

    def _commit(self, kinds: str, name: str, lines: list[dict[str, Any]]) -> None:
        repository = self.hub.repositories[name]
        files = dict(repository.commits[repository.head])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(files)
        url = f"{self.hub.url}/{'' if kinds == 'models' else f'{kinds}/'}{name}/commit/{oid}"
        self._answer({"commitUrl": url, "commitOid": oid, "pullRequestUrl": None})

    def _tree(self, files: dict[str, bytes], folder: str | None) -> list[dict[str, Any]]:
        """Entries below a folder, or only those in it."""
        start = f"{folder}/" if folder else ""
        found = {name: content for name, content in files.items() if name.startswith(start)}
        if parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() in ("true", "1"):
            return [_entry(name, content) for name, content in found.items()]
        inner = {start + name[len(start) :].split("/")[0] for name in found if "/" in name[len(start) :]}
        entries = [_entry(name, content) for name, content in found.items() if "/" not in name[len(start) :]]
        return entries + [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(inner)]

    def _send_file(self, repository: Repository, revision: str, name: str) -> None:
        commit = repository.head if revision == "main" else revision
        content = repository.commits.get(commit, {}).get(name)
        if content is None:
            self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        about = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
            about["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            self._answer(content[first : last + 1], 206, None, **about)
        else:
            limit = self.hub.break_after(name) if self.command == "GET" else None
            self._answer(content, 200, limit, **about)

    def _answer(self, content: Any, status: int = 200, limit: int | None = None, **headers: str) -> None:
        """Sends bytes, or anything else as JSON.

        limit  bytes after which the connection breaks
        """
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:limit])
        if limit is not None:
            self._break_off()

    def _break_off(self) -> None:
        self.wfile.flush()
        self.close_connection = True


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that answers on 127.0.0.1 while the context lasts."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, hub=hub)) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
