# One image for all ranks of a run on NVIDIA GPUs (driver 580 or newer). Not built in CI and not run on a GPU yet.
#   docker build -t prime-lightning .
#   docker run --gpus all --ipc host -v $PWD/runs:/work/runs prime-lightning fit --config conf/prime.yaml
# Ranks and vLLM pass weights through shared memory, which docker limits to 64 MB without `--ipc host`. The sandbox of code rewards needs
# user namespaces or Landlock: `docker run prime-lightning doctor` says which tier this machine has.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
RUN apt-get update \
 && apt-get install -y --no-install-recommends bubblewrap g++ git python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/prime
ENV PATH=/opt/prime/bin:$PATH
WORKDIR /work
COPY . .
RUN pip install --no-cache-dir ".[all]"
ENTRYPOINT ["prime-lightning"]
CMD ["doctor"]
