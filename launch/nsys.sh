#!/usr/bin/env bash
# Record N ranks with Nsight Systems, one report a rank. The first two arguments are N and a directory for the reports.
#   bash launch/nsys.sh 2 reports generate --prompt "Once upon a time" --max-tokens 40
# Gives reports/rank0.nsys-rep, ...: open them together, or `nsys export --type sqlite` each and `tpprof analyze reports`.
# Steps and ops carry their names (NVTX domain tpinfer). On GPUs only the recorded steps are kept (--profile-steps,
# --profile-skip), and kernels inside CUDA graphs one by one: without --cuda-graph-trace=node a replay is a single row.
# NSYS names another nsys than the one on PATH.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ranks=${1:?number of ranks, as in: bash launch/nsys.sh 2 reports generate --prompt hello}
reports=${2:?directory for the reports, as in: bash launch/nsys.sh 2 reports generate --prompt hello}
shift 2
nsys=${NSYS:-nsys}
command -v "$nsys" >/dev/null || { echo "nsys is not on PATH: install Nsight Systems or set NSYS to its path" >&2; exit 1; }
python3 "$root/launch/setup.py" --extras run,nvtx
mkdir -p "$reports"
threads=$(($(nproc) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
options=(--sample=none --cpuctxsw=none --force-overwrite=true --trace-fork-before-exec=true)
extra=(--nvtx)
if compgen -G '/dev/nvidia[0-9]*' >/dev/null; then
  options+=(--trace=cuda,nvtx --cuda-graph-trace=node --capture-range=cudaProfilerApi --capture-range-end=stop)
  extra+=(--profile "$reports/kineto")
else
  options+=(--trace=nvtx)
fi
exec "$root/.venv/bin/torchrun" --standalone --nproc-per-node "$ranks" --no-python \
  "$nsys" profile "${options[@]}" --output "$reports/rank%q{RANK}" "$root/.venv/bin/python" -m tpinfer "$@" "${extra[@]}"
