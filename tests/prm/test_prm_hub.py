"""`export --push_to_hub` against a stand-in of the hub's interface on this machine."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from prime_lightning.__main__ import main


class Hub(BaseHTTPRequestHandler):
    """What `create_repo` and `upload_folder` ask; files come within the commit."""

    def log_message(self, *_):
        pass

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def welcome(self):
        right = self.headers.get("Authorization") == "Bearer hf_right"
        if not right:
            self.answer(401, {"error": "Invalid username or password."})
        return right

    def do_GET(self):
        if self.welcome():
            self.answer(200, {"id": "somebody/my-prm", "sha": "0" * 40, "siblings": []})

    do_HEAD = do_GET

    def do_POST(self):
        body, server = self.rfile.read(int(self.headers["Content-Length"])), self.server
        place = f"http://127.0.0.1:{server.server_port}/somebody/my-prm"
        if not self.welcome():
            return
        if self.path == "/api/repos/create":
            server.made.append(json.loads(body))
            self.answer(200, {"url": place})
        elif "/preupload/" in self.path:
            asked = [file["path"] for file in json.loads(body)["files"]]
            self.answer(200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in asked]})
        elif "/commit/" in self.path:
            server.lines += [json.loads(line) for line in body.splitlines()]
            self.answer(200, {"commitUrl": f"{place}/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True})
        else:
            self.answer(200, {})


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.made, server.lines = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def words(run, out, *more):
    ckpt = str(run / "checkpoints" / "last.ckpt")
    return ["export", "--ckpt", ckpt, "--role", "prm", "--out", str(out), "--reference", str(run / "policy"), *more]


def export(hub, run, out, *more, token="hf_right"):
    """By a process of its own: the hub's address is read when its library is imported."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-m", "prime_lightning", *words(run, out, *more)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_model_is_uploaded_whole_and_privately(hub, prime_run, tmp_path):
    done = export(hub, prime_run, tmp_path / "prm", "--push_to_hub", "somebody/my-prm")
    assert done.returncode == 0, done.stderr
    assert hub.made[0]["name"] == "my-prm"
    assert hub.made[0].get("private", hub.made[0].get("visibility") == "private")
    sent = {line["value"]["path"]: line["value"]["content"] for line in hub.lines if line["key"] == "file"}
    there = {path.name: path.read_bytes() for path in (tmp_path / "prm").iterdir()}
    assert {name: base64.b64decode(content) for name, content in sent.items()} == there
    assert {"README.md", "implicit_prm.json", "model.safetensors"} <= sent.keys()
    assert "iterations" in there["README.md"].decode()
    assert "to somebody/my-prm (private): http://" in done.stdout


def test_a_dry_run_asks_no_network(prime_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    assert main(words(prime_run, tmp_path / "prm", "--push_to_hub", "somebody/my-prm", "--public", "--dry_run")) == 0
    said = capsys.readouterr().out
    assert "Would upload README.md" in said
    assert "to somebody/my-prm (public)." in said


@pytest.mark.parametrize("there", [True, False])
def test_a_hub_that_refuses_is_an_error_of_a_line_and_the_folder_stays(there, hub, prime_run, tmp_path):
    if not there:
        hub.server_close()
    done = export(hub, prime_run, tmp_path / "prm", "--push_to_hub", "somebody/my-prm", token="hf_wrong")
    assert done.returncode == 2
    assert "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "prm" / "model.safetensors").is_file()


def test_options_of_an_upload_want_one(prime_run, tmp_path, capsys):
    assert main(words(prime_run, tmp_path / "prm", "--dry_run")) == 2
    assert "Expected --push_to_hub" in capsys.readouterr().err
