"""What SLURM's `srun` does, as far as Lightning sees it: one process a task, told by SLURM_* variables who it is.

Without killing the others when one fails: that is what the package has to do by itself.
"""

import os
import subprocess
import sys

if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--kill-on-bad-exit")]
    per_node = int(os.environ["SLURM_NTASKS_PER_NODE"])
    tasks = int(os.environ["SLURM_NNODES"]) * per_node
    numbers = [(task, task // per_node, task % per_node) for task in range(tasks)]
    running = []
    for task, node, local in numbers:
        told = {"SLURM_NTASKS": tasks, "SLURM_PROCID": task, "SLURM_NODEID": node, "SLURM_LOCALID": local}
        running.append(subprocess.Popen(words, env=os.environ | {name: str(value) for name, value in told.items()}))
    sys.exit(max(abs(process.wait()) for process in running))
