"""A local stand-in for Weights & Biases: the part of its HTTP API that a run uses. It records all requests.

wandb client --GraphQL--> run: config, group, tags, alerts      --file_stream--> history, summary
             --GraphQL--> where to upload --PUT--> files
"""

import gzip
import json
import re
import secrets
import threading
from base64 import b64decode
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote, urlsplit

ENTITY = "tester"
OPERATION = re.compile(r"(?:query|mutation)\s+(\w+)")


@dataclass(frozen=True, slots=True)
class RecordedAlert:
    """An alert that a run sent."""

    title: str
    text: str
    level: str
    """INFO, WARN or ERROR."""


@dataclass(slots=True)
class RecordedRun:
    """Everything that a run has sent so far."""

    id: str
    project: str = ""
    name: str = ""
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Rows of the history by line number."""
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    """Uploaded content by the name within the run."""
    alerts: list[RecordedAlert] = field(default_factory=list)
    starts: int = 0
    """Times that a client asked whether the run exists, which each wandb.init(resume=...) does once."""
    exit_code: int | None = None
    events: int = 0

    @property
    def history(self) -> list[dict[str, Any]]:
        """Rows in order, without gaps for lines that never arrived."""
        return [self.rows[line] for line in sorted(self.rows)]

    def series(self, name: str) -> list[Any]:
        """Values of one metric, from the rows that have it."""
        return [row[name] for row in self.history if name in row]

    def table(self, name: str) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of the table logged last under `name`."""
        uploaded = json.loads(self.files[self.series(name)[-1]["path"]])
        return uploaded["columns"], uploaded["data"]


class WandbServer:
    """Serves until it is stopped. key: the only accepted API key, else 401; host: address to listen on."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.host, self.key = host, secrets.token_hex(20)
        self.runs: dict[str, RecordedRun] = {}
        self.operations: Counter[str] = Counter()
        """Requests by GraphQL operation, upload and stream."""
        self.lock = threading.Lock()
        server = self

        class Bound(_Handler):
            recorder = server

        self._http = ThreadingHTTPServer((host, port), Bound)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, name="wandb-server", daemon=True)

    @property
    def port(self) -> int:
        return self._http.server_address[1]

    @property
    def url(self) -> str:
        """Address for clients on this host."""
        return self.url_at("127.0.0.1" if self.host in ("", "0.0.0.0") else self.host)

    def url_at(self, host: str) -> str:
        return f"http://{host}:{self.port}"

    def environment(self, host: str | None = None) -> dict[str, str]:
        """Variables that make a process use this server. host: name of this host from there."""
        return {
            "WANDB_BASE_URL": self.url if host is None else self.url_at(host),
            "WANDB_API_KEY": self.key,
            "WANDB_MODE": "online",
            "WANDB_ENTITY": ENTITY,
            "WANDB_ERROR_REPORTING": "false",
        }

    def start(self) -> "WandbServer":
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the server; later connections are refused."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(10)

    def __enter__(self) -> "WandbServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, name: str) -> RecordedRun:
        """The run with this id; a new one if there is none yet."""
        return self.runs.setdefault(name, RecordedRun(name))

    @property
    def only_run(self) -> RecordedRun:
        """The only run; fails if there are others or none."""
        (run,) = self.runs.values()
        return run


class _Handler(BaseHTTPRequestHandler):
    """One request. Upload addresses name the host that the client used, so they work from every network."""

    recorder: WandbServer

    def do_POST(self) -> None:
        if not self._allowed():
            return
        body = self._body()
        with self.recorder.lock:
            if urlsplit(self.path).path == "/graphql":
                self._reply({"data": self._graphql(json.loads(body))})
            elif self.path.endswith("/file_stream"):
                self.recorder.operations["file_stream"] += 1
                _stream(self.recorder.run(unquote(self.path.split("/")[-2])), json.loads(body))
                self._reply({"exitcode": None, "limits": {}})
            else:
                self._reply({}, 404)

    def do_PUT(self) -> None:
        """An upload needs no key: on the real service its address is signed."""
        body = self._body()
        _, kind, run, name = unquote(urlsplit(self.path).path).split("/", 3)
        with self.recorder.lock:
            self.recorder.operations["upload"] += 1
            if kind == "run":
                self.recorder.run(run).files[name] = body
        self._reply({})

    def do_GET(self) -> None:
        self._reply({}, 404)

    def log_message(self, format: str, *args: Any) -> None:
        """Does nothing: tests print their own findings."""

    def _allowed(self) -> bool:
        scheme, _, encoded = self.headers.get("Authorization", "").partition(" ")
        if scheme == "Basic" and b64decode(encoded).decode() == f"api:{self.recorder.key}":
            return True
        self._body()
        self._reply({"errors": [{"message": "wrong API key"}]}, 401)
        return False

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, answer: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _upload_url(self, kind: str, run: str, name: str) -> str:
        return f"http://{self.headers['Host']}/{kind}/{quote(run, safe='')}/{quote(name)}"

    def _graphql(self, request: dict[str, Any]) -> dict[str, Any]:
        named = OPERATION.search(request["query"])
        operation = request.get("operationName") or (named.group(1) if named else "")
        self.recorder.operations[operation] += 1
        answer = getattr(self, f"_{operation}", None)
        return answer(request.get("variables") or {}) if answer is not None else {}

    # GraphQL operations, by their names

    def _Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {
            "viewer": {"id": "u", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": {"edges": []}}
        }

    def _ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _RunResumeStatus(self, query: dict[str, Any]) -> dict[str, Any]:
        run = self.recorder.runs.get(query["name"])
        project = _project(query.get("project"))
        if run is None:
            return {"model": {**project, "bucket": None}}
        run.starts += 1
        bucket = {
            "id": f"gid-{run.id}",
            "name": run.id,
            "displayName": run.name,
            "summaryMetrics": json.dumps(run.summary),
            "logLineCount": 0,
            "historyLineCount": max(run.rows, default=-1) + 1,
            "eventsLineCount": run.events,
            "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
            "eventsTail": "[]",
            "config": json.dumps({name: {"value": value} for name, value in run.config.items()}),
            "tags": run.tags,
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {**project, "bucket": bucket}}

    def _UpsertBucket(self, sent: dict[str, Any]) -> dict[str, Any]:
        name = sent["name"]
        inserted = name not in self.recorder.runs
        run = self.recorder.run(name)
        run.starts += inserted
        run.project = sent.get("project") or run.project
        run.name = sent.get("displayName") or run.name
        run.group = sent.get("groupName") or run.group
        run.job_type = sent.get("jobType") or run.job_type
        run.tags = sent.get("tags") or run.tags
        if sent.get("config"):
            run.config = {key: entry["value"] for key, entry in json.loads(sent["config"]).items()}
        bucket = {
            "id": f"gid-{name}",
            "name": name,
            "displayName": run.name,
            "description": None,
            "config": sent.get("config") or "{}",
            "sweepName": None,
            "historyLineCount": max(run.rows, default=-1) + 1,
            "project": _project(run.project),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _CreateRunFiles(self, query: dict[str, Any]) -> dict[str, Any]:
        run = query["run"]
        files = [{"name": name, "uploadUrl": self._upload_url("run", run, name)} for name in query["files"]]
        return {"createRunFiles": {"runID": f"gid-{run}", "uploadHeaders": [], "files": files}}

    def _NotifyScriptableRunAlert(self, sent: dict[str, Any]) -> dict[str, Any]:
        self.recorder.run(sent["runName"]).alerts.append(
            RecordedAlert(sent["title"], sent["text"], sent["severity"])
        )
        return {"notifyScriptableRunAlert": {"success": True}}

    def _ArtifactType(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": None}

    def _CreateArtifact(self, _: dict[str, Any]) -> dict[str, Any]:
        sequence = {"id": "sequence", "latestArtifact": None}
        return {
            "createArtifact": {
                "artifact": {"id": "artifact", "state": "PENDING", "artifactSequence": sequence}
            }
        }

    def _CreateArtifactManifest(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"createArtifactManifest": {"artifactManifest": self._manifest()}}

    def _UpdateArtifactManifest(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"updateArtifactManifest": {"artifactManifest": self._manifest()}}

    def _CreateArtifactFiles(self, query: dict[str, Any]) -> dict[str, Any]:
        edges = [
            {"node": self._artifact_file(f"file{i}", file["name"])}
            for i, file in enumerate(query.get("artifactFiles", []))
        ]
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _CommitArtifact(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": "artifact", "digest": "digest"}}}

    def _manifest(self) -> dict[str, Any]:
        return {"id": "manifest", "file": self._artifact_file("manifest-file", "wandb_manifest.json")}

    def _artifact_file(self, file_id: str, name: str) -> dict[str, Any]:
        url = self._upload_url("artifact", "any", name)
        where = {"uploadUrl": url, "uploadHeaders": [], "uploadMultipartUrls": None, "storagePath": name}
        return {"id": file_id, "name": name, "displayName": name, **where, "artifact": {"id": "artifact"}}


def _project(name: str | None) -> dict[str, Any]:
    return {"id": "p", "name": name or "uncategorized", "entity": {"id": "e", "name": ENTITY}}


def _stream(run: RecordedRun, sent: dict[str, Any]) -> None:
    """Records lines of the run's files from an offset on. A request that is sent twice changes nothing."""
    for name, chunk in (sent.get("files") or {}).items():
        lines, offset = chunk["content"], chunk.get("offset", 0)
        if name == "wandb-history.jsonl":
            run.rows |= {offset + i: json.loads(line) for i, line in enumerate(lines)}
        elif name == "wandb-summary.json":
            run.summary = json.loads(lines[-1])
        elif name == "wandb-events.jsonl":
            run.events = max(run.events, offset + len(lines))
    if sent.get("complete"):
        run.exit_code = sent.get("exitcode")
