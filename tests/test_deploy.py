"""What is in ``deploy/kubernetes``: valid for the API, consistent in itself, and a command that serves and drains."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastserve
from support import LIMIT, without_slow_handlers

MANIFEST = Path(__file__).parent.parent / "deploy" / "kubernetes" / "fastserve.yaml"

pytestmark = pytest.mark.once

yaml = pytest.importorskip("yaml", reason="reads the manifest with PyYAML, which comes with kubernetes-validate")

APP = """
import http.server, time

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"begun")
        if self.path == "/slow":
            self.rfile.read(1)
        self.wfile.write(b" and done")
"""


def objects() -> dict[str, Any]:
    """Return the objects of the manifest, by their kind."""
    found = list(yaml.safe_load_all(MANIFEST.read_text()))
    assert len({loaded["kind"] for loaded in found}) == len(found) == 3
    return {loaded["kind"]: loaded for loaded in found}


def pod() -> Any:
    return objects()["Deployment"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("version", ["1.30", "1.34"])
@pytest.mark.parametrize("kind", ["Deployment", "Service", "PodDisruptionBudget"])
def test_each_object_is_one_of_the_api(kind: str, version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    loaded = objects()[kind]
    assert validator.validate(loaded, version, strict=True) == version
    loaded["spec"]["no-such-field"] = 1
    with pytest.raises(validator.ValidationError):  # or else the schema would let everything pass
        validator.validate(loaded, version, strict=True)


def test_the_objects_name_each_other_rightly() -> None:
    found = objects()
    deployment, service, budget = (found[kind]["spec"] for kind in ("Deployment", "Service", "PodDisruptionBudget"))
    labels = deployment["template"]["metadata"]["labels"]
    assert labels == deployment["selector"]["matchLabels"] == service["selector"] == budget["selector"]["matchLabels"]
    (container,) = pod()["containers"]
    (port,) = container["ports"]
    assert service["ports"][0]["targetPort"] == port["name"]
    for probe in "readinessProbe", "livenessProbe":
        assert container[probe]["httpGet"]["port"] == port["name"]
    assert option(container, "--bind") == f"0.0.0.0:{port['containerPort']}"
    assert budget["minAvailable"] < deployment["replicas"]


def test_there_is_time_to_drain() -> None:
    (container,) = pod()["containers"]
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    readiness = container["readinessProbe"]
    assert readiness["periodSeconds"] * readiness["failureThreshold"] <= before
    assert before + int(option(container, "--grace")) < pod()["terminationGracePeriodSeconds"]


def test_the_container_may_do_little() -> None:
    (container,) = pod()["containers"]
    whole, own = pod()["securityContext"], container["securityContext"]
    assert whole["runAsNonRoot"] and whole["runAsUser"] >= 1000 and whole["seccompProfile"]["type"] == "RuntimeDefault"
    assert own["readOnlyRootFilesystem"] and own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert set(container["resources"]["requests"]) == {"cpu", "memory"} and "memory" in container["resources"]["limits"]


def option(container: Any, name: str) -> str:
    arguments: list[str] = container["args"]
    return arguments[arguments.index(name) + 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
@pytest.mark.skipif(importlib.util.find_spec("greenlet") is None, reason="greenlet is not installed")
def test_the_command_serves_answers_the_probes_and_drains(tmp_path: Path) -> None:
    (container,) = pod()["containers"]
    program, *command = container["command"]
    assert program == "fastserve"
    file, _, handler = command.pop().partition(":")
    (tmp_path / Path(file).name).write_text(APP)
    # The port of the container may be somebody's here.
    arguments = ["127.0.0.1:0" if text == option(container, "--bind") else text for text in container["args"]]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    path = str(Path(fastserve.__file__).parent.parent)
    with subprocess.Popen(
        [sys.executable, "-m", program, *command, f"{Path(file).name}:{handler}", *arguments],
        cwd=tmp_path,
        env=os.environ | variables | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None and server.stderr is not None
            port = int(server.stdout.readline().split(" on 127.0.0.1:")[1].split()[0])
            for probe in "readinessProbe", "livenessProbe":
                assert get(port, container[probe]["httpGet"]["path"]) == (200, b"begun and done")
            with socket.create_connection(("127.0.0.1", port), LIMIT) as running:
                running.sendall(b"GET /slow HTTP/1.0\r\n\r\n")
                answer = b""
                while not answer.endswith(b"begun"):
                    answer += running.recv(4096)
                server.send_signal(signal.SIGTERM)
                with pytest.raises(subprocess.TimeoutExpired):  # it waits for the request
                    server.wait(1)
                running.sendall(b"x")
                assert running.recv(4096) == b" and done"
            assert server.wait(LIMIT) == 0
            errors = without_slow_handlers(server.stderr.read())
            shown = [line for line in errors.splitlines() if '"GET /' not in line]
            assert shown == [] and not (tmp_path / "__pycache__").exists()
        finally:
            server.kill()


def get(port: int, path: str) -> tuple[int, bytes]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)) as client:
        client.request("GET", path)
        answer = client.getresponse()
        return answer.status, answer.read()
