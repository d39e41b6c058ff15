#!/usr/bin/env bash
# One run over several machines with torchrun. Start it on every machine, with the same arguments:
#   NODES=2 NODE_RANK=0 HEAD=10.0.0.1 docs/cluster/torchrun.sh --config conf/prime.yaml --config conf/engine/vllm.yaml
#   NODES=2 NODE_RANK=1 HEAD=10.0.0.1 docs/cluster/torchrun.sh --config conf/prime.yaml --config conf/engine/vllm.yaml
# It goes on from the run's last checkpoint where LAST names one that is there.
set -euo pipefail
: "${NODES:?number of machines}" "${NODE_RANK:?number of this machine, from 0}" "${HEAD:?address of machine 0}"
gpus=${GPUS:-8}
resume=()
if [ -f "${LAST:-}" ] || [ -f "${LAST:-}/lightning.pt" ]; then resume=(--ckpt_path "$LAST"); fi
exec torchrun --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "$gpus" \
  --master-addr "$HEAD" --master-port "${PORT:-29500}" --max-restarts 0 \
  -m prime_lightning fit "$@" --trainer.num_nodes "$NODES" --trainer.devices "$gpus" "${resume[@]}"
