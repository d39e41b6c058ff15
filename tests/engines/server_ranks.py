"""Two ranks that share vLLM servers: `python server_ranks.py MODEL FOLDER URL URL`.

Files in FOLDER ask the test to kill the first one and to start it again.
"""

import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch
from shared_ranks import GREEDY, SAMPLING, error_of, prompts_of, samples, weights
from torch import distributed

from prime_lightning.engines.host_group import of_all_ranks, rank
from prime_lightning.engines.server.engine import ServerEngine


def wait_for(there, seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def main(model: str, folder: Path, urls: list[str]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    certificate = os.environ["PRIME_TEST_CERTIFICATE"]
    engine = ServerEngine(urls, api_key_variable="PRIME_TEST_KEY", certificate=certificate, in_flight=8)
    engine.start(model)
    mine, found = prompts_of(rank(), model), {}
    engine.load_weights(iter(weights(model, 1)), 1)
    found["draws"] = sorted(map(int, samples(engine.stream(mine, SAMPLING))))
    of_all_ranks()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        groups = engine.stream(mine, SAMPLING)
        first = [next(groups)]
        (folder / f"kill{rank()}").touch()
        wait_for((folder / "killed").exists)
        found["survived"] = sorted(map(int, samples([*first, *groups])))
        list(engine.stream(mine, SAMPLING))  # by now it was asked for a sample, if not before
    found["said"] = [str(warning.message) for warning in said]
    found["well"] = [server.well for server in engine.servers]

    of_all_ranks()
    engine.load_weights(iter(weights(model, 2)), 2)  # the other one alone gets them
    present = samples(engine.stream(mine, GREEDY))
    (folder / f"start{rank()}").touch()
    wait_for(lambda: engine.servers[0].well)
    both, engine.servers = engine.servers, engine.servers[:1]
    found["same"] = samples(engine.stream(mine, GREEDY)) == present
    engine.servers = both
    of_all_ranks()
    engine.load_weights(iter(weights(model, 3)), 3)
    found["versions"] = [server.client.get("/weight_info")["weight_version"] for server in engine.servers]
    found["wrong"] = error_of(lambda: engine.load_weights(iter(weights(model, 4)[:-1]), 4))
    found["after"] = len(samples(engine.stream(mine, GREEDY)))
    engine.close()
    (folder / f"rank{rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
