#!/usr/bin/env bash
# N ranks of this host under torchrun. The first argument is N, the rest is a tpinfer command.
#   bash launch/torchrun.sh 2 generate --prompt "Once upon a time" --table
# Several hosts: README, "On two hosts". `tpinfer generate --tp 2` starts the same ranks by itself, sooner: it imports torch once.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python3 "$root/launch/setup.py" --extras run
ranks=${1:?number of ranks, as in: bash launch/torchrun.sh 2 generate --prompt hello}
shift
# Each rank's share of the cores; torchrun alone would set 1.
threads=$(($(nproc) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
exec "$root/.venv/bin/torchrun" --standalone --nproc-per-node "$ranks" -m tpinfer "$@"
