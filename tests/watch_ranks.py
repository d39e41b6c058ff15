"""What the two processes of a test in `test_nodes.py` run: they only watch each other, so that they start soon."""

import os
import signal
import time

from torch.distributed import TCPStore

from prime_lightning.training.strategies.watch import Watch


def watch(run):
    return Watch(rank, 2, 4.0, lambda: print(f"rank {rank} closes", flush=True), run)


if __name__ == "__main__":
    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    kept = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) if rank == 0 else None
    good = watch("good")
    time.sleep(2.0 * rank)  # rank 0 comes to its end first
    good.finish()
    print(f"rank {rank} is done", flush=True)
    bad = watch("bad")
    time.sleep(2.0)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)  # like a node that is lost: no message, no closed connection
    time.sleep(60)
