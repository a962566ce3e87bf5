"""A Hub of the tests on loopback: enough of the HTTP interface for an unmodified `huggingface_hub` client.

It stores repositories in memory, one dictionary of files per commit. Files whose name Git LFS would track (and big
ones) have to come by the LFS batch protocol, in parts above `PART` bytes, and are served by a redirect to another
path, as the real one does; a regular commit of such a file is refused. Writing needs the token.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_loopback_write_token"
USER = "tester"
LFS_NAMES = re.compile(r"\.(safetensors|bin|pt|parquet|png|model|arrow)$")
LFS_BYTES = 1_000_000
PART = 100_000
"""Bytes of one part of a multipart upload; the real value is larger, the protocol is the same."""


@dataclass
class Repo:
    """Commits in order: a hash and the files of that commit, each `(content, is_lfs)`."""

    commits: list[tuple[str, dict[str, tuple[bytes, bool]]]] = field(default_factory=list)
    private: bool = False

    def at(self, revision: str) -> tuple[str, dict[str, tuple[bytes, bool]]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


@dataclass
class Hub:
    """State of the server, for tests to look into."""

    url: str
    repos: dict[str, Repo] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)

    def files(self, repo_id: str) -> dict[str, bytes]:
        return {path: content for path, (content, _) in self.repos[repo_id].commits[-1][1].items()}

    def lfs_files(self, repo_id: str) -> set[str]:
        return {path for path, (_, is_lfs) in self.repos[repo_id].commits[-1][1].items() if is_lfs}


class HubServer:
    """`with HubServer() as hub:` serves on a free port of loopback until the block ends."""

    def __enter__(self) -> Hub:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.daemon_threads = True
        hub = Hub(f"http://127.0.0.1:{self.server.server_address[1]}")
        self.server.hub, self.server.lock = hub, threading.Lock()
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return hub

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()


def _oid(content: bytes, is_lfs: bool) -> str:
    if is_lfs:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET

    # The routes, first match wins: method, pattern, handler, whether it writes

    def _route(self) -> None:
        self.hub: Hub = self.server.hub
        self.body = self._read_body()
        path = unquote(urlsplit(self.path).path)
        self.query = parse_qs(urlsplit(self.path).query)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        for methods, pattern, name, writes in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match is None or self.command not in methods:
                continue
            with self.server.lock:
                self.hub.requests.append((self.command, path))
                if token:
                    self.hub.tokens.add(token)
                if writes and token != TOKEN:
                    return self._fail(401, "Invalid username or password.")
                return getattr(self, name)(*match.groups())
        self._fail(404, f"no route for {self.command} {path}", "EntryNotFound")

    def _read_body(self) -> bytes:
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            body = b""
            while size := int(self.rfile.readline().strip(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    # Accounts and repositories

    def whoami(self) -> None:
        self._json({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        exists = repo_id in self.hub.repos
        if not exists:
            attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
            repo = Repo(private=bool(wanted.get("private") or wanted.get("visibility") == "private"))
            repo.commits.append((hashlib.sha1(repo_id.encode()).hexdigest(), {".gitattributes": (attributes, False)}))
            self.hub.repos[repo_id] = repo
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if exists:
            return self._json({**answer, "error": "You already created this model repo"}, 409)
        self._json(answer)

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        header = content.split("---")[1] if content.startswith("---") else ""
        # What the real one refuses in a card: a base or a data set that is a path and no id.
        wrong = re.findall(r"^(?:base_model|datasets|- )\s*:?\s*(/\S+|\S+/\S+/\S+)$", header, re.MULTILINE)
        errors = [{"message": f"{name!r} is no id"} for name in wrong]
        self._json({"errors": errors, "warnings": [], "error": "bad YAML" if wrong else None}, 400 if wrong else 200)

    def _commit_at(self, repo_id: str, revision: str | None):
        if repo_id not in self.hub.repos:
            self._fail(404, "Repository not found", "RepoNotFound")
            return None
        commit = self.hub.repos[repo_id].at(revision or "main")
        if commit is None:
            self._fail(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def info(self, repo_id: str, revision: str | None = None) -> None:
        if (commit := self._commit_at(repo_id, revision)) is not None:
            siblings = [{"rfilename": path} for path in sorted(commit[1])]
            self._json({"id": repo_id, "sha": commit[0], "private": False, "tags": [], "siblings": siblings})

    def tree(self, repo_id: str, revision: str, folder: str | None = None) -> None:
        if (commit := self._commit_at(repo_id, revision)) is None:
            return
        prefix = f"{folder.strip('/')}/" if folder else ""
        inside = {path: file for path, file in commit[1].items() if path.startswith(prefix)}
        if prefix and not inside:
            return self._fail(404, f"{folder} does not exist", "EntryNotFound")
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries, folders = [], set()
        for path, (content, is_lfs) in sorted(inside.items()):
            *parents, _ = path.removeprefix(prefix).split("/")
            folders |= {prefix + "/".join(parents[: depth + 1]) for depth in range(len(parents))}
            if parents and not deep:
                continue
            lfs = {"oid": _oid(content, True), "size": len(content), "pointerSize": 134}
            entry = {"type": "file", "path": path, "size": len(content), "oid": _oid(content, False)}
            entries.append({**entry, **({"lfs": lfs} if is_lfs else {})})
        shown = [path for path in sorted(folders) if deep or "/" not in path.removeprefix(prefix)]
        self._json([*({"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in shown), *entries])

    # Upload

    def preupload(self, repo_id: str, revision: str) -> None:
        if (commit := self._commit_at(repo_id, revision)) is None:
            return
        answers = []
        for file in json.loads(self.body)["files"]:
            is_lfs = bool(LFS_NAMES.search(file["path"])) or file["size"] > LFS_BYTES
            answer = {"path": file["path"], "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
            if file["path"] in commit[1]:
                answer["oid"] = _oid(*commit[1][file["path"]])
            answers.append(answer)
        self._json({"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer = {"oid": oid, "size": size}
            if oid not in self.hub.lfs:
                upload = {"href": f"{self.hub.url}/lfs/{oid}"}
                if size > PART:
                    numbers = range(1, -(-size // PART) + 1)
                    parts = {str(n): f"{self.hub.url}/lfs/{oid}/part/{n}" for n in numbers}
                    upload = {
                        "href": f"{self.hub.url}/lfs/{oid}/complete",
                        "header": {"chunk_size": str(PART), **parts},
                    }
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/{oid}/verify"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _keep(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            return self._fail(400, "content does not have this hash")
        self.hub.lfs[oid] = content
        self._json({})

    def lfs_put(self, oid: str) -> None:
        self._keep(oid, self.body)

    def lfs_part(self, oid: str, number: str) -> None:
        self.hub.parts[oid, int(number)] = self.body
        self._send(200, headers={"ETag": hashlib.md5(self.body).hexdigest()})

    def lfs_complete(self, oid: str) -> None:
        wanted = json.loads(self.body)["parts"]
        self._keep(oid, b"".join(self.hub.parts[oid, part["partNumber"]] for part in wanted))

    def lfs_verify(self, oid: str) -> None:
        if len(self.hub.lfs.get(oid, b"")) != json.loads(self.body)["size"]:
            return self._fail(404, "not uploaded")
        self._json({})

    def commit(self, repo_id: str, revision: str) -> None:
        if (last := self._commit_at(repo_id, revision)) is None:
            return
        files = dict(last[1])
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "file":
                if LFS_NAMES.search(value["path"]):
                    return self._fail(400, f"{value['path']} has to be uploaded by LFS")
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    return self._fail(400, f"LFS pointer of {value['path']} points to nothing")
                files[value["path"]] = (self.hub.lfs[value["oid"]], True)
            elif key == "deletedFile":
                files.pop(value["path"])
            elif key == "deletedFolder":
                files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
        sha = hashlib.sha1(last[0].encode() + self.body).hexdigest()
        self.hub.repos[repo_id].commits.append((sha, files))
        url = f"{self.hub.url}/{repo_id}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    # Download

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        if (commit := self._commit_at(repo_id, revision)) is None:
            return
        headers = {"X-Repo-Commit": commit[0]}
        if path not in commit[1]:
            return self._send(404, headers={**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "no entry"})
        content, is_lfs = commit[1][path]
        if not is_lfs:
            return self._send(200, content, {**headers, "ETag": f'"{_oid(content, False)}"'})
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{_oid(content, True)}"'}
        self._send(
            302, headers={**headers, **linked, "Location": f"{self.hub.url}/cdn/{commit[0]}/{_oid(content, True)}"}
        )

    def cdn(self, sha: str, oid: str) -> None:
        # The client follows a redirect on one host and reads hash, size and commit from the last answer.
        content = self.hub.lfs[oid]
        self._send(200, content, {"X-Linked-Size": str(len(content)), "ETag": f'"{oid}"', "X-Repo-Commit": sha})


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (("GET",), r"/api/whoami-v2", "whoami", True),
    (("POST",), r"/api/repos/create", "create", True),
    (("POST",), r"/api/validate-yaml", "validate_yaml", False),
    (("POST",), rf"/api/models/{_REPO}/preupload/(.+)", "preupload", True),
    (("POST",), rf"/api/models/{_REPO}/commit/(.+)", "commit", True),
    (("GET",), rf"/api/models/{_REPO}/tree/([^/]+)(/.*)?", "tree", False),
    (("GET",), rf"/api/models/{_REPO}/revision/(.+)", "info", False),
    (("GET",), rf"/api/models/{_REPO}", "info", False),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch", True),
    (("PUT",), r"/lfs/(\w+)", "lfs_put", False),
    (("PUT",), r"/lfs/(\w+)/part/(\d+)", "lfs_part", False),
    (("POST",), r"/lfs/(\w+)/complete", "lfs_complete", False),
    (("POST",), r"/lfs/(\w+)/verify", "lfs_verify", True),
    (("GET", "HEAD"), r"/cdn/(\w+)/(\w+)", "cdn", False),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/([^/]+)/(.+)", "resolve", False),
]
