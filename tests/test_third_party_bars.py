"""What other packages show: Rich bars of real downloads and loads on a terminal, nothing in a log, and no tips."""

import http.server
import io
import logging
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import lightning.pytorch as pl
import pytest
import transformers

from prime_lightning.models.pretrained import load_causal_lm
from prime_lightning.models.third_party_bars import ThirdPartyBar, quiet_libraries


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def calmed(monkeypatch):
    quiet_libraries()
    monkeypatch.setenv("TERM", "xterm-256color")
    yield
    transformers.utils.logging.set_tqdm_hook(None)


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_terminal_sees_weights_load_and_gets_its_screen_back(calmed, model_folder, monkeypatch, tmp_path):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    load_causal_lm(str(model_folder)).save_pretrained(tmp_path)
    shown = screen.getvalue()
    assert re.search(r"Loading weights [━╸╺ ]+ 27/27", plain(shown))
    assert re.search(r"Writing model shards [━╸╺ ]+ 1/1", plain(shown))
    assert shown.count("\x1b[?25h") == shown.count("\x1b[?25l") > 0  # the cursor
    assert ThirdPartyBar._screen is None


def test_a_log_and_a_run_with_bars_of_its_own_see_nothing(calmed, model_folder, monkeypatch, tmp_path, capsys):
    load_causal_lm(str(model_folder)).save_pretrained(tmp_path)
    assert capsys.readouterr() == ("", "")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(ThirdPartyBar, "silent", True)
    load_causal_lm(str(model_folder))
    assert screen.getvalue() == ""


def test_bars_that_were_switched_off_stay_off(calmed, model_folder, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    transformers.utils.logging.disable_progress_bar()
    try:
        load_causal_lm(str(model_folder))
    finally:
        transformers.utils.logging.enable_progress_bar()
    assert screen.getvalue() == ""


def test_lightning_recommends_nothing(calmed, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        pl.Trainer(default_root_dir=tmp_path, accelerator="cpu")
    said = [record.getMessage() for record in caplog.records]
    assert any("GPU available" in words for words in said)
    assert not any("Tip" in words for words in said)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as it takes to give a model away."""

    folder = None

    def do_HEAD(self):
        path = self.folder / self.path.split("/")[-1].split("?")[0]
        if "/resolve/" not in self.path or not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return None
        self.send_response(200)
        for name, value in (("ETag", f'"{path.name}"'), ("X-Repo-Commit", "0" * 40)):
            self.send_header(name, value)
        self.send_header("Content-Length", str(path.stat().st_size))
        self.end_headers()
        return path

    def do_GET(self):
        path = self.do_HEAD()
        if path:
            self.wfile.write(path.read_bytes())

    def log_message(self, *_):
        pass


LOAD = """
from prime_lightning.models.third_party_bars import quiet_libraries
quiet_libraries()
from prime_lightning.models.pretrained import load_causal_lm
print(sum(p.numel() for p in load_causal_lm("some/model").parameters()), "weights")
"""


@pytest.mark.slow
def test_a_download_has_a_bar(model_folder, tmp_path, monkeypatch):
    """From a hub on this machine, in a terminal."""
    monkeypatch.setattr(Hub, "folder", Path(model_folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    ours, theirs = pty.openpty()
    try:
        started = subprocess.Popen(
            [sys.executable, "-c", LOAD], stdout=theirs, stderr=theirs, env=os.environ | hub | {"TERM": "xterm"}
        )
        os.close(theirs)
        shown = ""
        while part := read(ours):
            shown += part
        assert started.wait(60) == 0, shown
    finally:
        os.close(ours)
        server.shutdown()
    size = (Path(model_folder) / "model.safetensors").stat().st_size
    assert re.search(rf"model\.safetensors[: ]*[━╸╺ ]+ {size / 1000:.1f} kB/{size / 1000:.1f} kB", plain(shown)), shown
    assert "weights" in shown


def read(terminal):
    """What a terminal has to show next; empty at its end."""
    try:
        return os.read(terminal, 65536).decode(errors="replace")
    except OSError:  # Linux says so when the other side is closed
        return ""
