#!/usr/bin/env bash
# N ranks of this host under Open MPI. The first argument is N.
#   bash launch/mpirun.sh 2 generate --prompt "Once upon a time" --table
# Add --collective mpi to have MPI carry the sums too; on one host shared memory is faster.
# Installs the `mpi` extra (mpi4py and Open MPI) into .venv; an mpirun of your own on PATH comes second.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python3 "$root/launch/setup.py" --extras run,mpi
ranks=${1:?number of ranks, as in: bash launch/mpirun.sh 2 generate --prompt hello}
shift
export PATH="$root/.venv/bin:$PATH"
threads=$(($(nproc) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
# Not bound: Open MPI would tie each of two ranks to a single core, however many there are.
options=(-n "$ranks" --bind-to none)
if [ "$(id -u)" -eq 0 ]; then
  options+=(--allow-run-as-root) # containers
fi
if [ "$ranks" -gt "$(nproc)" ]; then
  options+=(--oversubscribe)
fi
exec mpirun "${options[@]}" python -m tpinfer "$@"
