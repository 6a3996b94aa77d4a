"""A small Hub on 127.0.0.1: the endpoints that huggingface_hub's client calls to publish and fetch models.

    with LoopbackHub() as hub:
        hub.add("user/model", {"config.json": b"{}"})
        subprocess.run([...], env=hub.environment(home))

Requests are answered from memory. Weights and pictures are large files, as on the Hub: a redirect leads to another host
(here another name of this one), where they can be had by ranges. `fail` makes requests go wrong.
"""

import base64
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loopback_repository import Fault, Repository, file_entry, is_large
from werkzeug import Request, Response
from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map, Rule
from werkzeug.serving import WSGIRequestHandler, make_server

TOKENS = {"writes": "user", "reads": "reader"}
MODEL = "/api/models/<owner>/<name>"
SPACE = "/api/spaces/<owner>/<name>"
ROUTES = Map(
    [
        Rule("/api/whoami-v2", endpoint="whoami"),
        Rule("/api/validate-yaml", endpoint="validate"),
        Rule("/api/repos/create", endpoint="create"),
        Rule(MODEL, endpoint="info"),
        Rule(f"{MODEL}/revision/<revision>", endpoint="info"),
        Rule(f"{MODEL}/tree/<revision>", endpoint="tree"),
        Rule(f"{MODEL}/preupload/<revision>", endpoint="preupload"),
        Rule(f"{MODEL}/commit/<revision>", endpoint="commit"),
        Rule(f"{SPACE}/preupload/<revision>", endpoint="preupload"),
        Rule(f"{SPACE}/commit/<revision>", endpoint="commit"),
        Rule(f"{SPACE}/variables", endpoint="variables"),
        Rule("/spaces/<owner>/<name>.git/info/lfs/objects/batch", endpoint="batch"),
        Rule("/<owner>/<name>/resolve/<revision>/<path:path>", endpoint="resolve"),
        Rule("/<owner>/<name>.git/info/lfs/objects/batch", endpoint="batch"),
        Rule("/<owner>/<name>/large/<sha256>", endpoint="content", methods=["GET"]),
        Rule("/<owner>/<name>/large/<sha256>", endpoint="upload", methods=["PUT"]),
    ]
)


class Refused(HTTPException):
    """An error as the Hub words it: a status and a code in a header."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message or code}
        super().__init__(response=Response(json.dumps({"error": message or code}), status, headers))


class Silent(WSGIRequestHandler):
    """Keeps no log on the terminal."""

    def log(self, *args: object) -> None:
        pass


class LoopbackHub:
    """The server; a context manager that starts and stops it."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[tuple[str, str], bytes] = {}  # by repository and SHA-256
        self.faults: dict[str, list[Fault]] = {}
        self.requests: list[tuple[str, str, str]] = []  # repository, endpoint, Range
        self._lock = threading.Lock()

    def __enter__(self) -> "LoopbackHub":
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=Silent)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._server.port}"

    def environment(self, home: Path, token: str | None = None, **more: str) -> dict[str, str]:
        """Variables of a process for which this is the Hub; only in a fresh one, as they are read at import."""
        keep = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        hub = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**keep, **hub, **quiet, **({"HF_TOKEN": token} if token else {}), **more}

    def add(self, repo_id: str, files: dict[str, bytes], **properties: bool) -> Repository:
        """A repository with one commit."""
        repository = self.repositories[repo_id] = Repository(**properties)
        repository.commit(files)
        large = [files[name] for name in files if is_large(name)]
        self.large.update({(repo_id, hashlib.sha256(content).hexdigest()): content for content in large})
        return repository

    def fail(self, repo_id: str, endpoint: str, **fault: Any) -> None:
        """Lets requests to a repository go wrong, as [`Fault`] says."""
        self.faults.setdefault(repo_id, []).append(Fault(endpoint, **fault))

    # --- requests ----------------------------------------------------------------------------------------------------

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        request = Request(environ)
        request.get_data()
        endpoint, values = ROUTES.bind_to_environ(environ).match()
        repo_id = f"{values.pop('owner', '')}/{values.pop('name', '')}"
        if endpoint == "create":
            repo_id = f"{request.json['organization'] or self._user(request)}/{request.json['name']}"
        with self._lock:
            self.requests.append((repo_id, endpoint, request.headers.get("Range", "")))
            fault = self._fault(repo_id, endpoint, values.get("path", ""))
        if fault.drop:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        try:
            if fault.status is not None:
                raise Refused(fault.status)
            if endpoint not in ("whoami", "validate", "create", "content", "upload"):
                self._authorise(request, repo_id)
            response = getattr(self, f"_{endpoint}")(request, repo_id, **values)
        except HTTPException as error:
            response = error.get_response(environ)
        return _spoil(response, fault)(environ, start_response)

    def _fault(self, repo_id: str, endpoint: str, path: str) -> Fault:
        for fault in self.faults.get(repo_id, []):
            if fault.endpoint == endpoint and fault.times > 0 and fault.path in ("", path):
                if fault.skip == 0:
                    fault.times -= 1
                    return fault
                fault.skip -= 1
        return Fault(endpoint)

    @staticmethod
    def _user(request: Request) -> str | None:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def _authorise(self, request: Request, repo_id: str) -> None:
        repository, user = self.repositories.get(repo_id), self._user(request)
        if repository is None or (repository.private and user is None):
            raise Refused(401 if user is None else 404, "RepoNotFound")
        if repository.gated and user != repo_id.partition("/")[0] and "/resolve/" in request.path:
            raise Refused(401 if user is None else 403, "GatedRepo")
        if request.method == "POST" and user != repo_id.partition("/")[0]:
            raise Refused(403, message="You have no right to write here")

    def _files(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self.repositories[repo_id]
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise Refused(404, "RevisionNotFound")
        return commit, repository.commits[commit]

    # --- endpoints ---------------------------------------------------------------------------------------------------

    def _whoami(self, request: Request, repo_id: str) -> Response:
        user = self._user(request)
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        role = "write" if user == "user" else "read"
        return _json({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def _validate(self, request: Request, repo_id: str) -> Response:
        return _json({"errors": [], "warnings": []})

    def _create(self, request: Request, repo_id: str) -> Response:
        if self._user(request) != repo_id.partition("/")[0]:
            raise Refused(403, message="You have no right to create a model here")
        body = _json({"url": f"{request.host_url}{repo_id}", "name": repo_id})
        if repo_id in self.repositories:
            body.status_code = 409
        else:
            repository = self.add(repo_id, {".gitattributes": b""})
            repository.private = request.json.get("visibility") == "private"
            repository.sdk = request.json.get("sdk")
        return body

    def _info(self, request: Request, repo_id: str, revision: str = "main") -> Response:
        commit, files = self._files(repo_id, revision)
        repository = self.repositories[repo_id]
        siblings = [{"rfilename": name} for name in files]
        return _json({"id": repo_id, "sha": commit, "private": repository.private, "tags": [], "siblings": siblings})

    def _tree(self, request: Request, repo_id: str, revision: str) -> Response:
        return _json([file_entry(name, content) for name, content in self._files(repo_id, revision)[1].items()])

    def _resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Response:
        commit, files = self._files(repo_id, revision)
        if path not in files:
            raise Refused(404, "EntryNotFound")
        entry, headers = file_entry(path, files[path]), {"X-Repo-Commit": commit}
        if "lfs" not in entry:
            return Response(files[path], headers={**headers, "ETag": f'"{entry["oid"]}"'})
        headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(entry["size"])}
        elsewhere = request.host_url.replace("127.0.0.1", "localhost")
        headers["Location"] = f"{elsewhere}{repo_id}/large/{entry['lfs']['oid']}"
        return Response(status=302, headers=headers)

    def _content(self, request: Request, repo_id: str, sha256: str) -> Response:
        content = self.large[repo_id, sha256]
        response = Response(content)
        response.set_etag(sha256)
        return response.make_conditional(request, accept_ranges=True, complete_length=len(content))

    def _preupload(self, request: Request, repo_id: str, revision: str) -> Response:
        names = [file["path"] for file in request.json["files"]]
        modes = [{"path": name, "uploadMode": "lfs" if is_large(name) else "regular"} for name in names]
        return _json({"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]})

    def _batch(self, request: Request, repo_id: str) -> Response:
        objects = []
        for item in request.get_json(force=True)["objects"]:
            upload = {"upload": {"href": f"{request.host_url}{repo_id}/large/{item['oid']}"}}
            objects.append({**item, **({} if (repo_id, item["oid"]) in self.large else {"actions": upload})})
        return _json({"transfer": "basic", "objects": objects})

    def _upload(self, request: Request, repo_id: str, sha256: str) -> Response:
        if hashlib.sha256(request.data).hexdigest() != sha256:
            raise Refused(400, message="The content is not that of its name")
        self.large[repo_id, sha256] = request.data
        return Response()

    def _commit(self, request: Request, repo_id: str, revision: str) -> Response:
        changes = {}
        for line in request.data.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                changes[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile":
                changes[item["value"]["path"]] = self.large[repo_id, item["value"]["oid"]]
        commit = self.repositories[repo_id].commit(changes, revision)
        return _json({"commitUrl": f"{request.host_url}{repo_id}/commit/{commit}", "commitOid": commit})

    def _variables(self, request: Request, repo_id: str) -> Response:
        variables = self.repositories[repo_id].variables
        variables[request.json["key"]] = request.json["value"]
        return _json({key: {"value": value} for key, value in variables.items()})


def _json(value: Any) -> Response:
    return Response(json.dumps(value), mimetype="application/json")


def _spoil(response: Response, fault: Fault) -> Response:
    time.sleep(fault.delay)
    response.headers.update(fault.headers)
    if fault.body is not None:
        response.set_data(fault.body)
    if fault.cut_at is not None:
        length, content = response.headers["Content-Length"], response.get_data()[: fault.cut_at]
        response.response = _then_end(content)
        response.headers["Content-Length"] = length
    return response


def _then_end(content: bytes) -> Iterator[bytes]:
    yield content
