"""A Hub of one process on loopback: as much of its protocol as pushing a model and loading it again takes."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_a_writer"


class HubServer(ThreadingHTTPServer):
    """Repositories by name; each a dictionary of `private` and `refs`, which have the files' bytes by path."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos, self.blobs, self.requests, self.commits = {}, {}, [], 0
        self.broken = None  # a regular expression of requests, like "PUT /lfs", that get error 400
        # Closing waits for the next look, half a second by default, once in each test.
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return self.repos[repo_id]["refs"][revision]


def sha(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, value=None, status: int = 200, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value or {}).encode()
        self.send_response(status)
        for name, text in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(text))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self):
        server, path = self.server, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.requests.append(f"{self.command} {path}")
        if server.broken and re.match(server.broken, server.requests[-1]):
            return self.answer({"error": "out of order"}, 400)
        is_writer = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not is_writer and self.command != "PUT" and not self.is_public(path):
            return self.answer({"error": "Invalid username or password."}, 401)
        for pattern, method in ROUTES.items():
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return method(self, body, *found.groups())
        self.answer({"error": f"no route {self.path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def is_public(self, path: str) -> bool:
        named = re.match(r"/(?:api/models/)?(\w+/[\w.-]+)", path)
        repo = named and self.server.repos.get(named[1])
        return bool(repo) and not repo["private"] and self.command in ("GET", "HEAD")

    def files_of(self, repo_id: str, revision: str | None) -> dict[str, bytes] | None:
        refs = self.server.repos.get(repo_id, {"refs": {}})["refs"]
        hashes = {sha(files): files for files in refs.values()}
        return refs.get(revision or "main", hashes.get(revision))

    def whoami(self, _):
        self.answer({"name": "me", "type": "user"})

    def create_repo(self, body):
        asked = json.loads(body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        if repo_id in self.server.repos:
            return self.answer({"error": "exists", "url": f"{self.server.url}/{repo_id}"}, 409)
        private = asked.get("visibility") == "private"
        self.server.repos[repo_id] = {"private": private, "refs": {"main": {".gitattributes": b"lfs"}}}
        self.answer({"url": f"{self.server.url}/{repo_id}", "id": repo_id})

    def validate_yaml(self, _):
        self.answer({"warnings": [], "errors": []})

    def info(self, _, repo_id, revision=None):
        if (files := self.files_of(repo_id, revision)) is None:
            return self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")
        siblings = [{"rfilename": name} for name in files]
        private = self.server.repos[repo_id]["private"]
        self.answer({"id": repo_id, "sha": sha(files), "private": private, "siblings": siblings})

    def tree(self, _, repo_id, revision):
        files = self.files_of(repo_id, revision)
        self.answer([{"type": "file", "path": n, "size": len(c), "oid": sha({n: c})} for n, c in files.items()])

    def create_branch(self, _, repo_id, branch):
        refs = self.server.repos[repo_id]["refs"]
        if branch in refs:
            return self.answer({"error": "exists"}, 409)
        refs[branch] = dict(refs["main"])
        self.answer()

    def preupload(self, body, repo_id, revision):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer({"files": files})

    def lfs_batch(self, body, repo_id):
        objects = json.loads(body)["objects"]
        for each in objects:
            if each["oid"] not in self.server.blobs:
                each["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.blobs[oid] = body
        self.answer()

    def commit(self, body, repo_id, revision):
        lines = [json.loads(line) for line in body.splitlines()]
        refs = self.server.repos[repo_id]["refs"]
        files = dict(refs[revision])
        if lines[0]["value"].get("parentCommit") not in (None, sha(files)):
            return self.answer({"error": "the branch has moved on"}, 412)
        for value in (line["value"] for line in lines if line["key"] == "file"):
            files[value["path"]] = base64.b64decode(value["content"])
        for value in (line["value"] for line in lines if line["key"] == "lfsFile"):
            files[value["path"]] = self.server.blobs[value["oid"]]
        for value in (line["value"] for line in lines if line["key"] == "deletedFile"):
            del files[value["path"]]
        is_proposal = "create_pr=1" in self.path
        refs["refs/pr/1" if is_proposal else revision] = files
        self.server.commits += 1
        address = f"{self.server.url}/{repo_id}"
        self.answer(
            {
                "commitUrl": f"{address}/commit/{sha(files)}",
                "commitOid": sha(files),
                "pullRequestUrl": f"{address}/discussions/1" if is_proposal else None,
            }
        )

    def resolve(self, _, repo_id, revision, name):
        files = self.files_of(repo_id, revision)
        if files is None or name not in files:
            return self.answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
        self.answer(files[name], ETag=f'"{sha({name: files[name]})}"', X_Repo_Commit=sha(files))


REPO = r"(\w+/[\w.-]+)"
ROUTES = {
    r"GET /api/whoami-v2": Handler.whoami,
    r"POST /api/repos/create": Handler.create_repo,
    r"POST /api/validate-yaml": Handler.validate_yaml,
    rf"GET /api/models/{REPO}": Handler.info,
    rf"GET /api/models/{REPO}/revision/(.+)": Handler.info,
    rf"GET /api/models/{REPO}/tree/([^/]+)": Handler.tree,
    rf"POST /api/models/{REPO}/branch/(.+)": Handler.create_branch,
    rf"POST /api/models/{REPO}/preupload/(.+)": Handler.preupload,
    rf"POST /api/models/{REPO}/commit/(.+)": Handler.commit,
    rf"POST /{REPO}.git/info/lfs/objects/batch": Handler.lfs_batch,
    r"PUT /lfs/(\w+)": Handler.lfs_put,
    rf"(?:GET|HEAD) /{REPO}/resolve/([^/]+)/(.+)": Handler.resolve,
}
