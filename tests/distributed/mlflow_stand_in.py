"""An HTTP server that answers as MLflow's tracking server does, as far as this project asks it; or hangs."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlparse


class MlflowStandIn(ThreadingHTTPServer):
    """One experiment, one run. A request that comes while `works` is unset is never answered."""

    daemon_threads = True

    def __init__(self, artifacts: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.artifacts = artifacts
        self.works = threading.Event()
        self.num_requests = 0
        self.num_answers = 0
        self.status = "none"
        self.points: dict[str, dict[int, float]] = defaultdict(dict)  # name: {step: value}

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, endpoint: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        ids = {"run_id": "r1", "experiment_id": "1"}
        run = {"info": {**ids, "status": "RUNNING", "artifact_uri": self.artifacts}}
        match endpoint:
            case "experiments/get-by-name":
                return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}
            case "experiments/create":
                return 200, {"experiment_id": "1"}
            case "runs/search":
                return 200, {}
            case "runs/create" | "runs/get":
                return 200, {"run": run}
            case "runs/update":
                self.status = body["status"]
                return 200, {"run_info": run["info"]}
            case "runs/log-batch":
                for point in body.get("metrics", []):
                    self.points[point["key"]][int(point["step"])] = point["value"]
                return 200, {}
        return 404, {"error_code": "ENDPOINT_NOT_FOUND", "message": endpoint}


class _Handler(BaseHTTPRequestHandler):
    server: MlflowStandIn

    def do_GET(self) -> None:
        self._serve({})

    def do_POST(self) -> None:
        self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _serve(self, body: dict[str, Any]) -> None:
        server = self.server
        server.num_requests += 1
        if not server.works.is_set():
            time.sleep(30)
            return
        endpoint = urlparse(self.path).path.split("/mlflow/", 1)[-1]
        code, answer = server.answer(endpoint, body)
        content = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        server.num_answers += 1

    def log_message(self, *_: Any) -> None:
        """The test's output is its own."""


@contextmanager
def mlflow_stand_in(artifacts: str) -> Iterator[MlflowStandIn]:
    with MlflowStandIn(artifacts) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
