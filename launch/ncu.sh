#!/usr/bin/env bash
# Nsight Compute on one rank: DRAM bytes, arithmetic and occupancy of chosen kernels, under the names of our ops.
# The first three arguments are N, the rank to look at and the report's name.
#   bash launch/ncu.sh 2 0 rank0 generate --prompt "Once upon a time" --max-tokens 8
# KERNELS=regex:gemm picks kernels (default: all), COUNT=50 how many. The other ranks run as they are: ncu replays each
# kernel alone, so give it `--collective gloo` with more than one rank, or look at one rank's shapes with N=1.
# NCU names another ncu than the one on PATH.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
usage="as in: bash launch/ncu.sh 2 0 rank0 generate --prompt hello"
ranks=${1:?number of ranks, $usage}
chosen=${2:?rank to look at, $usage}
report=${3:?name of the report, $usage}
shift 3
ncu=${NCU:-ncu}
command -v "$ncu" >/dev/null || { echo "ncu is not on PATH: install Nsight Compute or set NCU to its path" >&2; exit 1; }
python3 "$root/launch/setup.py" --extras run,nvtx
export NCU="$ncu" CHOSEN="$chosen" REPORT="$report" KERNELS="${KERNELS:-regex:.*}" COUNT="${COUNT:-50}"
export PYTHON="$root/.venv/bin/python"
# Every rank runs this line; one of them through ncu.
each='if [ "$RANK" = "$CHOSEN" ]; then
  exec "$NCU" --nvtx --set roofline --kernel-name "$KERNELS" --launch-count "$COUNT" --graph-profiling node \
    --force-overwrite --export "$REPORT" "$PYTHON" -m tpinfer "$@"
fi
exec "$PYTHON" -m tpinfer "$@"'
exec "$root/.venv/bin/torchrun" --standalone --nproc-per-node "$ranks" --no-python bash -c "$each" rank "$@" --nvtx
