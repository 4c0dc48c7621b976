#!/usr/bin/env bash
# One job on several hosts. Run it on each of them, with the same arguments:
#
#   HEAD=host-a NUM_NODES=2 NODE=0 bash multi_node.sh train.py …     on host-a
#   HEAD=host-a NUM_NODES=2 NODE=1 bash multi_node.sh train.py …     on host-b
#
# HEAD must be a name or an address of host 0 that all hosts reach. LOCAL_ADDR: by which address
# the others reach this host, if its own name doesn't resolve to it.
set -euo pipefail

# Seconds that a rank has to save a checkpoint after SIGTERM.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"

exec torchrun \
    --nnodes="$NUM_NODES" \
    --nproc-per-node="${RANKS_PER_NODE:-gpu}" \
    --rdzv-backend=c10d \
    --rdzv-id="${JOB:-train}" \
    --rdzv-endpoint="$HEAD:${PORT:-29500}" \
    --rdzv-conf="is_host=$((NODE == 0))" \
    ${LOCAL_ADDR:+--local-addr="$LOCAL_ADDR"} \
    --max-restarts="${MAX_RESTARTS:-3}" \
    "$@"
