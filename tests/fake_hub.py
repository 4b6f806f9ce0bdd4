"""A Hub on loopback, in memory, for the real client: create, upload, commit, list, download, model card.

Unusual here:
- every file is answered `uploadMode: regular`, so the client sends it inside the commit and uses neither LFS nor Xet;
- each commit keeps its own snapshot, because `from_pretrained` turns a revision into a commit once and reads that.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

Files = dict[str, bytes]
TOKEN = "hf_fake"
USER = "tester"


@dataclass
class Repository:
    """The snapshots of one repository by commit id, oldest first; every branch name means the newest."""

    snapshots: dict[str, Files] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return next(reversed(self.snapshots), "0" * 40)

    def files(self, revision: str) -> Files:
        return self.snapshots.get(revision, self.snapshots.get(self.head, {}))

    def commit(self, lines: list[dict]) -> str:
        """Apply the lines of a commit request; returns the commit id."""
        files = dict(self.files(self.head))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        commit = hashlib.sha1(f"{self.head}{len(self.snapshots)}".encode()).hexdigest()
        self.snapshots[commit] = files
        return commit


class FakeHub:
    """The server: `url` is its endpoint, `repositories` what was pushed, `requests` a log of method and path."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """Variables that point the client of a fresh process at this server, with its cache below `home`."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}

    def files(self, repo_id: str) -> Files:
        """What the newest commit of a repository holds, by path."""
        repository = self.repositories[repo_id]
        return repository.files(repository.head)


class Handler(BaseHTTPRequestHandler):
    """The calls of huggingface_hub 2.x that pushing and loading a model make."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_GET

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            for method, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    return answer(self, body, *match.groups())
        self._error("EntryNotFound", f"this server has no {self.command} {path}")

    def _repository(self, repo_id: str) -> Repository | None:
        repository = self.hub.repositories.get(repo_id)
        if repository is None:
            self._error("RepoNotFound", f"repository {repo_id} not found")
        return repository

    def whoami(self, body: bytes) -> None:
        self._json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_card(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def create(self, body: bytes) -> None:
        request = json.loads(body)
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        if repo_id in self.hub.repositories:
            return self._send(409, json.dumps({"error": "exists", "url": f"{self.hub.url}/{repo_id}"}).encode())
        self.hub.repositories[repo_id] = Repository()
        self._json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        if self._repository(repo_id):
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in paths]
            self._json({"files": files})

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        if repository := self._repository(repo_id):
            commit = repository.commit([json.loads(line) for line in body.splitlines() if line])
            self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit}"})

    def tree(self, body: bytes, repo_id: str, revision: str, folder: str | None) -> None:
        if repository := self._repository(repo_id):
            prefix = f"{folder.strip('/')}/" if folder else ""
            files = {path: data for path, data in repository.files(revision).items() if path.startswith(prefix)}
            if folder and not files:
                return self._error("EntryNotFound", f"no folder {folder}")
            self._json(
                [{"type": "file", "path": path, "size": len(files[path]), "oid": etag(files[path])} for path in files]
            )

    def info(self, body: bytes, repo_id: str, revision: str | None) -> None:
        if repository := self._repository(repo_id):
            files = repository.files(revision or repository.head)
            commit = revision if revision in repository.snapshots else repository.head
            card = card_data(files.get("README.md", b"").decode())
            info = {"id": repo_id, "modelId": repo_id, "sha": commit, "private": False, "tags": card.get("tags", [])}
            info |= {"siblings": [{"rfilename": path} for path in files], "cardData": card}
            self._json(info | {key: card[key] for key in ("pipeline_tag", "library_name") if key in card})

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        if repository := self._repository(repo_id):
            data = repository.files(revision).get(path)
            if data is None:
                return self._error("EntryNotFound", f"{repo_id} has no {path}")
            commit = revision if revision in repository.snapshots else repository.head
            self._send(200, data, {"X-Repo-Commit": commit, "ETag": f'"{etag(data)}"'})

    def _json(self, answer: object) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _error(self, code: str, message: str) -> None:
        self._send(404, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing on the terminal; `FakeHub.requests` keeps the log."""


NAME = r"([^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/validate-yaml", Handler.validate_card),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", rf"/api/models/{NAME}/preupload/([^/]+)", Handler.preupload),
    ("POST", rf"/api/models/{NAME}/commit/([^/]+)", Handler.commit),
    ("GET", rf"/api/models/{NAME}/tree/([^/]+)(/.*)?", Handler.tree),
    ("GET", rf"/api/models/{NAME}(?:/revision/([^/]+))?", Handler.info),
    ("GET HEAD", rf"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def card_data(text: str) -> dict:
    """The metadata block of a model card; empty when there is none."""
    match = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
    return yaml.safe_load(match[1]) or {} if match else {}


@contextmanager
def running() -> Iterator[FakeHub]:
    hub = FakeHub()
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A fresh server, with the client of this process pointed at it and its cache below `tmp_path`."""
    from huggingface_hub import constants, hf_api
    from transformers.utils import hub as transformers_hub

    with running() as hub:
        for name, value in hub.environment(tmp_path / "hf_home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf_home" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)  # made once, with the endpoint of its time
        yield hub
