#!/usr/bin/env bash
# One machine: a process for each GPU (for each core where there is none), or NPROC of them.
#   launch/torchrun_one_node.sh --mode fsdp --max-steps 2000 --out-dir runs/docs
set -euo pipefail
exec "${PYTHON:-python}" -m torch.distributed.run --standalone \
  --nproc-per-node "${NPROC:-auto}" --max-restarts "${MAX_RESTARTS:-3}" \
  -m llm_book.distributed "$@"
