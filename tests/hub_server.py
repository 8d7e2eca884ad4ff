"""Serve a Hub on this machine, in memory. Try a push with it: `python tests/hub_server.py` says what to set.

It answers what huggingface_hub asks when it pushes and pulls. A test starts it in its own process:

    with Hub({"a token": ("name", "write")}) as hub:  # set HF_ENDPOINT=hub.url before huggingface_hub is imported
        hub.faults.append(Fault("PUT", "/objects/", "cut"))

It has models and data sets, private ones, branches, tags and LFS, and fails on demand. It proves the client's side
only: the real Hub may answer otherwise. It does not speak Xet, so set HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", ".bin", ".pt", ".parquet", ".png")


@dataclass
class Blob:
    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """Return the name that git gives it; for LFS, the hash of the pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        content = pointer.encode() if self.lfs else self.content
        return sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def sha256(self) -> str:
        return sha256(self.content).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": self.oid, "size": len(self.content)}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}
        return entry


Files = dict[str, Blob]


@dataclass
class Repo:
    owner: str
    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # of branches and tags
    tags: set[str] = field(default_factory=set)

    def commit(self, files: Files, branch: str = "main") -> str:
        said = "".join(f"{path} {blob.oid}" for path, blob in sorted(files.items()))
        oid = sha1(f"{len(self.commits)} {said}".encode()).hexdigest()
        self.commits[oid], self.refs[branch] = files, oid
        return oid

    def files(self, revision: str = "main") -> Files:
        return self.commits[self.refs.get(revision, revision)]


@dataclass
class Fault:
    """Fail the next `times` requests of this method and path: a status, a `cut` half way, or a `flip` of a bit."""

    method: str
    path: str
    kind: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    def __init__(self, status: int, code: str, **headers: str) -> None:
        super().__init__(code)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": code, **headers}


class Hub:
    """
    Args:
        users: token -> (name, "read" or "write").
    """

    def __init__(self, users: dict[str, tuple[str, str]]) -> None:
        self.users = users
        self.repos: dict[str, Repo] = {}  # by "models/me/it" and "datasets/me/it"
        self.objects: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, Message]] = []  # method, path, headers
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = f"http://localhost:{self.server.server_port}"  # another host, as the Hub's is: no tokens there

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def put(self, name: str, files: dict[str, bytes], private: bool = False) -> str:
        """Make a repository with these files, without HTTP, and return its commit."""
        repo = self.repos.setdefault(name, Repo(name.split("/")[1], private))
        return repo.commit({path: Blob(content, path.endswith(LFS)) for path, content in files.items()})

    def put_folder(self, name: str, folder: Path) -> str:
        files = [file for file in folder.rglob("*") if file.is_file()]
        return self.put(name, {file.relative_to(folder).as_posix(): file.read_bytes() for file in files})

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.method == method and re.search(fault.path, path) and fault.times > 0:
                fault.times -= 1
                return fault
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    fault: Fault | None = None

    def answer_request(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append((self.command, unquote(url.path), self.headers))
        self.fault = self.hub.fault(self.command, unquote(url.path))
        length = int(self.headers.get("Content-Length", 0))
        if self.fault and self.fault.kind == "cut" and self.command not in ("GET", "HEAD"):
            self.rfile.read(length // 2)
            return self.cut()
        self.body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        try:
            if self.fault and isinstance(self.fault.kind, int):
                raise Refusal(self.fault.kind, "Fault", **self.fault.headers)
            for methods, pattern, route in ROUTES:
                if self.command in methods and (match := re.fullmatch(pattern, url.path)):
                    return route(self, **{name: unquote(part or "") for name, part in match.groupdict().items()})
            raise Refusal(404, "NotFound")
        except Refusal as refusal:
            error = json.dumps({"error": str(refusal)}).encode()
            self.answer(error, refusal.status, refusal.headers | {"Content-Type": "application/json"})

    do_GET = do_HEAD = do_POST = do_PUT = answer_request

    def answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        kind = self.fault.kind if self.fault else None
        if kind == "flip":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        self.wfile.write(content[: len(content) // 2] if kind == "cut" else content)
        if kind == "cut":
            self.cut()

    def cut(self) -> None:
        self.close_connection = True
        self.connection.close()

    def json(self, value: Any, status: int = 200) -> None:
        self.answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def log_message(self, *args: object) -> None:
        """Print nothing: `requests` has them all."""

    def user(self) -> tuple[str, str] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refusal(401, "Unauthorized", **{"X-Error-Message": "Invalid credentials in Authorization header"})
        return self.hub.users.get(token)

    def repo(self, kind: str, id: str, write: bool = False) -> Repo:
        user, repo = self.user(), self.hub.repos.get(f"{kind or 'models'}/{id}")
        if repo is None or (repo.private and (user is None or user[0] != repo.owner)):
            raise Refusal(404 if user else 401, "RepoNotFound")  # a private one is not known to exist
        if write and user is None:
            raise Refusal(401, "Unauthorized")
        if write and user != (repo.owner, "write"):
            raise Refusal(403, "Forbidden")
        return repo

    def at(self, repo: Repo, revision: str) -> str:
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            raise Refusal(404, "RevisionNotFound")
        return commit

    # Routes

    def whoami(self) -> None:
        if (user := self.user()) is None:
            raise Refusal(401, "Unauthorized")
        self.json({"type": "user", "name": user[0], "auth": {"accessToken": {"role": user[1]}}})

    def create(self) -> None:
        asked, user = json.loads(self.body), self.user()
        if user is None:
            raise Refusal(401, "Unauthorized")
        owner = asked.get("organization") or user[0]
        name = f"{asked.get('type') or 'model'}s/{owner}/{asked['name']}"
        url = f"{self.hub.url}/{name.removeprefix('models/')}"
        if user != (owner, "write"):
            raise Refusal(403, "Forbidden")
        if name in self.hub.repos:
            return self.json({"error": "You already created this repo", "url": url}, 409)
        repo = self.hub.repos[name] = Repo(owner, asked.get("visibility") == "private")
        repo.commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        self.json({"url": url, "name": f"{owner}/{asked['name']}"})

    def validate(self) -> None:
        self.json({"errors": [], "warnings": []})

    def preupload(self, kind: str, id: str, revision: str) -> None:
        self.at(self.repo(kind, id, write=True), revision)
        modes = {file["path"]: file["path"].endswith(LFS) for file in json.loads(self.body)["files"]}
        self.json(
            {
                "files": [
                    {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
                    for path, lfs in modes.items()
                ]
            }
        )

    def batch(self, kind: str, id: str) -> None:
        self.repo(kind, id, write=True)
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.storage}/objects/{entry['oid']}"}}
        self.json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "BadDigest")
        self.hub.objects[oid] = self.body
        self.answer(b"")

    def commit(self, kind: str, id: str, revision: str) -> None:
        """Move the branch when every line was understood and every object is there; otherwise change nothing."""
        repo = self.repo(kind, id, write=True)
        files = dict(repo.files(self.at(repo, revision)))
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refusal(400, "LfsObjectNotFound")
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], True)
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        oid = repo.commit(files, revision)
        self.json({"commitUrl": f"{self.hub.url}/{id}/commit/{oid}", "commitOid": oid})

    def branch(self, kind: str, id: str, branch: str) -> None:
        repo = self.repo(kind, id, write=True)
        if branch in repo.refs:
            raise Refusal(409, "RefExists")
        repo.refs[branch] = self.at(repo, json.loads(self.body).get("startingPoint", "main"))
        self.json({})

    def tag(self, kind: str, id: str, revision: str) -> None:
        repo, name = self.repo(kind, id, write=True), json.loads(self.body)["tag"]
        if name in repo.refs:
            raise Refusal(409, "RefExists")
        repo.refs[name] = self.at(repo, revision)
        repo.tags.add(name)
        self.json({})

    def list_refs(self, kind: str, id: str) -> None:
        repo = self.repo(kind, id)
        refs: dict[str, list] = {"branches": [], "tags": [], "converts": []}
        for name, commit in repo.refs.items():
            place, path = ("tags", "tags") if name in repo.tags else ("branches", "heads")
            refs[place].append({"name": name, "ref": f"refs/{path}/{name}", "targetCommit": commit})
        self.json(refs)

    def info(self, kind: str, id: str, revision: str) -> None:
        repo = self.repo(kind, id)
        commit = self.at(repo, revision or "main")
        siblings = [{"rfilename": path} for path in repo.files(commit)]
        about = {"id": id, "sha": commit, "private": repo.private, "tags": [], "downloads": 0, "likes": 0}
        self.json({**about, "siblings": siblings, "gated": False, "disabled": False})

    def tree(self, kind: str, id: str, revision: str, folder: str) -> None:
        repo = self.repo(kind, id)
        files, folder = repo.files(self.at(repo, revision)), f"{folder}/" if folder else ""
        inside = {path: blob for path, blob in files.items() if path.startswith(folder)}
        if folder and not inside:
            raise Refusal(404, "EntryNotFound")
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        names = {folder + path.removeprefix(folder).split("/")[0] for path in inside}
        folders = sorted(names - set(inside))
        entries = [blob.entry(path) for path, blob in inside.items() if deep or path in names]
        self.json([{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders] + entries)

    def paths(self, kind: str, id: str, revision: str) -> None:
        repo = self.repo(kind, id)
        files, asked = repo.files(self.at(repo, revision)), parse_qs(self.body.decode())["paths"]
        folders = [path for path in asked if any(file.startswith(f"{path}/") for file in files)]
        entries = [files[path].entry(path) for path in asked if path in files]
        self.json(entries + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders])

    def resolve(self, kind: str, id: str, revision: str, path: str) -> None:
        repo = self.repo(kind, id)
        commit = self.at(repo, revision)
        if (blob := repo.files(commit).get(path)) is None:
            raise Refusal(404, "EntryNotFound", **{"X-Repo-Commit": commit})
        if not blob.lfs:
            return self.content(blob.content, {"X-Repo-Commit": commit, "ETag": f'"{blob.oid}"'})
        self.hub.objects[blob.sha256] = blob.content
        linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        where = {"Location": f"{self.hub.storage}/objects/{blob.sha256}"}
        self.answer(b"", 302, {"X-Repo-Commit": commit, **linked, **where})

    def download(self, oid: str) -> None:
        self.content(self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def content(self, content: bytes, headers: dict[str, str]) -> None:
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            of = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
            return self.answer(content[first : last + 1], 206, headers | of)
        self.answer(content, headers=headers)


API = r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)"
PAGE = r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", API + "/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", PAGE + r"\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/objects/(?P<oid>[0-9a-f]{64})", Handler.upload),
    ("GET HEAD", "/objects/(?P<oid>[0-9a-f]{64})", Handler.download),
    ("POST", API + "/commit/(?P<revision>[^/]+)", Handler.commit),
    ("POST", API + "/branch/(?P<branch>[^/]+)", Handler.branch),
    ("POST", API + "/tag/(?P<revision>[^/]+)", Handler.tag),
    ("GET", API + "/refs", Handler.list_refs),
    ("GET", API + "(?:/revision/(?P<revision>[^/]+))?", Handler.info),
    ("GET", API + "/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", Handler.tree),
    ("POST", API + "/paths-info/(?P<revision>[^/]+)", Handler.paths),
    ("GET HEAD", PAGE + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]


def main() -> None:
    """Serve an empty Hub until Ctrl-C, and print what to set in another terminal to push to it."""
    with Hub({"hf_local": ("me", "write")}) as hub:
        print(
            f"A Hub in memory listens at {hub.url}. It forgets everything when it ends (Ctrl-C).\n"
            "In another terminal, before Python starts:\n\n"
            f"    export HF_ENDPOINT={hub.url} HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_local\n"
            "    unset HF_HUB_OFFLINE\n\n"
            "Then, in Python:\n\n"
            '    model.push_to_hub("me/my-model")\n'
            '    AutoModel.from_pretrained("me/my-model", trust_remote_code=True)',
            flush=True,
        )
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("The Hub has ended.")


if __name__ == "__main__":
    main()
