"""Something else than a vLLM server answers at the URL: said at once, not after the time that a start may take."""

import http.server
import threading

import pytest

from prime_lightning.engines.server.engine import ServerEngine
from prime_lightning.prompts.arithmetic import write_model


@pytest.mark.parametrize("status", [200, 404])
def test_a_port_that_another_program_uses_is_told(tmp_path, status):
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"<html>It works!</html>")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        engine = ServerEngine([f"http://127.0.0.1:{server.server_port}"])
        with pytest.raises(ValueError, match=r"got the answer of another program.*\n.*port is in use") as raised:
            engine.start(str(write_model(tmp_path)))
        engine.close()
        server.shutdown()
    assert len(str(raised.value).splitlines()) == 2
