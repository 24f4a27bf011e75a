#!/usr/bin/env bash
# Record N ranks with Nsight Systems, one report a rank: DIR/rank0.nsys-rep, ...
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

help() {
  cat <<'TEXT'
usage: bash launch/nsys.sh [options] VERB [flags of tpinfer VERB]

Records every rank with Nsight Systems and says how to read what comes out. Steps and ops carry their names
(NVTX domain tpinfer). On GPUs only the recorded steps are kept, and kernels inside CUDA graphs one by one: without
--cuda-graph-trace=node a replay is a single row.

  --ranks N    tensor-parallel ranks (1)
  --out DIR    where the reports go (reports)
  --steps A-B  engine steps A to B alone, counted from 0 (3-12); on a CPU all are recorded
  --help

NSYS names another nsys than the one on PATH.

  bash launch/nsys.sh --ranks 2 --out reports generate --prompt "Once upon a time" --max-tokens 40
TEXT
}

refuse() { echo "launch/nsys.sh: $1; see --help" >&2; exit 2; }

ranks=1 reports=reports steps=""
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) help; exit 0 ;;
    --ranks | --out | --steps)
      [ $# -ge 2 ] || refuse "$1 needs a value"
      case $1 in --ranks) ranks=$2 ;; --out) reports=$2 ;; --steps) steps=$2 ;; esac
      shift 2 ;;
    -*) refuse "option '$1' is unknown" ;;
    *) break ;;
  esac
done
if [[ ${1:-} =~ ^[0-9]+$ && $# -ge 2 ]]; then  # N and the directory in front, as it was before there were options
  ranks=$1 reports=$2
  shift 2
fi
[[ $ranks =~ ^[0-9]+$ && $ranks -ge 1 ]] || refuse "--ranks '$ranks' must be a whole number from 1 on"
[ $# -ge 1 ] || refuse "a verb of tpinfer must follow, such as generate"
chosen=()
if [ -n "$steps" ]; then
  [[ $steps =~ ^([0-9]+)(-([0-9]+))?$ ]] || refuse "--steps '$steps' must be a number or A-B, such as 8-9"
  first=${BASH_REMATCH[1]} last=${BASH_REMATCH[3]:-${BASH_REMATCH[1]}}
  [ "$first" -le "$last" ] || refuse "--steps $steps must rise"
  chosen=(--profile-skip "$first" --profile-steps $((last - first + 1)))
fi
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
  extra+=(--profile "$reports/kineto" ${chosen[@]+"${chosen[@]}"})
else
  options+=(--trace=nvtx)
  [ -z "$steps" ] || echo "launch/nsys.sh: no GPU here, so all steps are recorded, not $steps alone" >&2
fi
"$root/.venv/bin/torchrun" --standalone --nproc-per-node "$ranks" --no-python \
  "$nsys" profile "${options[@]}" --output "$reports/rank%q{RANK}" "$root/.venv/bin/python" -m tpinfer "$@" "${extra[@]}"
cat >&2 <<TEXT
Reports: $reports/rank0.nsys-rep and so on, to open together in nsys-ui. For tpprof:
  for report in $reports/*.nsys-rep; do $nsys export --type sqlite --force-overwrite true "\$report"; done
  $root/.venv/bin/tpprof analyze $reports
TEXT
