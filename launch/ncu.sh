#!/usr/bin/env bash
# Nsight Compute on one rank: DRAM bytes, arithmetic and occupancy of chosen kernels, of chosen steps or ops.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

help() {
  cat <<'TEXT'
usage: bash launch/ncu.sh [options] VERB [flags of tpinfer VERB]

Counts what chosen kernels of one rank really do, and writes a report that `ncu --import FILE` and ncu-ui read.

  --ranks N       tensor-parallel ranks (1)
  --rank R        the one to look at (0); the others run as they are
  --out FILE      the report (rankR)
  --kernels LIST  names, or one regex:PATTERN; such as few_rows,paged_attention (all)
  --steps A-B     kernels of engine steps A to B alone, or of step A; prompts come first, in chunks
  --ops LIST      kernels of ops alone, by the ids of `tpprof analyze --by op`, such as layers.0.mlp.down;
                  these run op by op, for a replayed graph has no ops
  --count N       kernels to look at, at most (50)
  --set NAME      ncu's set of metrics (roofline)
  --help

ncu replays each kernel alone. With several ranks give `--collective gloo`, or look at one rank's shapes with --ranks 1.
NCU names another ncu than the one on PATH.

  bash launch/ncu.sh --kernels few_rows,one_row --steps 8-9 generate --prompt "Once upon a time" --max-tokens 16
  bash launch/ncu.sh --ops layers.0.mlp.down,head bench latency --model shape:llama-3.1-8b
TEXT
}

refuse() { echo "launch/ncu.sh: $1; see --help" >&2; exit 2; }
need_number() { [[ $2 =~ ^[0-9]+$ ]] || refuse "$1 '$2' must be a whole number"; }

ranks=1 chosen=0 report="" kernels="regex:.*" steps="" ops="" count=${COUNT:-50} metrics=roofline
kernels=${KERNELS:-$kernels}
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) help; exit 0 ;;
    --ranks | --rank | --out | --kernels | --steps | --ops | --count | --set)
      [ $# -ge 2 ] || refuse "$1 needs a value"
      case $1 in
        --ranks) ranks=$2 ;; --rank) chosen=$2 ;; --out) report=$2 ;; --kernels) kernels=$2 ;;
        --steps) steps=$2 ;; --ops) ops=$2 ;; --count) count=$2 ;; --set) metrics=$2 ;;
      esac
      shift 2 ;;
    -*) refuse "option '$1' is unknown" ;;
    *) break ;;
  esac
done
if [[ ${1:-} =~ ^[0-9]+$ && $# -ge 3 ]]; then  # N, rank and report in front, as it was before there were options
  ranks=$1 chosen=$2 report=$3
  shift 3
fi
need_number --ranks "$ranks"; need_number --rank "$chosen"; need_number --count "$count"
[ "$ranks" -ge 1 ] || refuse "--ranks $ranks must be 1 or more"
[ "$chosen" -lt "$ranks" ] || refuse "--rank $chosen must be below --ranks $ranks"
[ $# -ge 1 ] || refuse "a verb of tpinfer must follow, such as generate"
[ -z "$steps" ] || [ -z "$ops" ] || refuse "--steps and --ops choose in two ways; give one"
report=${report:-rank$chosen}

include=() more=(--nvtx)
if [ -n "$steps" ]; then
  [[ $steps =~ ^([0-9]+)(-([0-9]+))?$ ]] || refuse "--steps '$steps' must be a number or A-B, such as 8-9"
  first=${BASH_REMATCH[1]} last=${BASH_REMATCH[3]:-${BASH_REMATCH[1]}}
  [ "$first" -le "$last" ] || refuse "--steps $steps must rise"
  [ $((last - first)) -lt 1000 ] || refuse "--steps $steps are more than 1000; choose fewer"
  include=(--nvtx-include "regex:tpinfer@tpinfer.step id=($(seq -s '|' "$first" "$last")) .*/")
elif [ -n "$ops" ]; then
  IFS=, read -ra named <<<"$ops"
  for op in "${named[@]}"; do
    [[ $op =~ ^[A-Za-z0-9_.]+$ ]] || refuse "--ops '$op' is no op's id; layers.0.mlp.down is one"
    include+=(--nvtx-include "tpinfer@tpinfer.op $op/")
  done
  more+=(--no-cuda-graphs)
fi
case $kernels in
  regex:*) ;;
  *)
    [[ $kernels =~ ^[A-Za-z0-9_,]+$ ]] || refuse "--kernels '$kernels' must be names with commas between, or regex:PATTERN"
    kernels="regex:^(${kernels//,/|})" ;;
esac
ncu=${NCU:-ncu}
command -v "$ncu" >/dev/null || { echo "ncu is not on PATH: install Nsight Compute or set NCU to its path" >&2; exit 1; }
python3 "$root/launch/setup.py" --extras run,nvtx
export CHOSEN="$chosen" PYTHON="$root/.venv/bin/python"
under=("$ncu" --nvtx ${include[@]+"${include[@]}"} --set "$metrics" --kernel-name "$kernels" --launch-count "$count")
under+=(--graph-profiling node --force-overwrite --export "$report")
if [ "$ranks" -eq 1 ]; then
  exec "${under[@]}" "$PYTHON" -m tpinfer "$@" "${more[@]}"
fi
# Every rank runs this line; one of them through ncu. What comes before `--` is ncu's.
each='before=()
while [ "$1" != -- ]; do before+=("$1"); shift; done
shift
if [ "$RANK" = "$CHOSEN" ]; then exec "${before[@]}" "$PYTHON" -m tpinfer "$@"; fi
exec "$PYTHON" -m tpinfer "$@"'
exec "$root/.venv/bin/torchrun" --standalone --nproc-per-node "$ranks" --no-python \
  bash -c "$each" rank "${under[@]}" -- "$@" "${more[@]}"
