#!/usr/bin/env bash
# Set up and run the main job: text from the embedded model on 2 ranks, then the table of where the time went.
#   bash launch/demo.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python3 "$root/launch/setup.py" --extras run
tpinfer="$root/.venv/bin/tpinfer"

ranks=2
gpus=$(find /dev -maxdepth 1 -name 'nvidia[0-9]*' | wc -l)
if [ "$gpus" -eq 1 ]; then
  ranks=1
  echo "This machine has one GPU: 1 rank on it, because two ranks need a GPU each."
elif [ "$gpus" -eq 0 ] && [ "$(nproc)" -eq 1 ]; then
  ranks=1
  echo "This machine has one core: 1 rank, because two would only wait for each other."
fi

echo "== A small trained model that comes with tpinfer, on $ranks rank(s)"
"$tpinfer" generate --tp "$ranks" --prompt "Once upon a time" --max-tokens 96 --table
echo
echo "== A slice of a 0.6B model's shape with random weights (its text means nothing), on $ranks rank(s)"
"$tpinfer" generate --tp "$ranks" --model shape:qwen3-0.6b-slice --prompt "Once upon a time" \
  --max-tokens 32 --ignore-eos --table
