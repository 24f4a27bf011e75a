#!/usr/bin/env bash
# The long tests that launch/test.sh leaves out: soak, chaos, full cross products. Arguments go to pytest.
#   bash launch/nightly.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python3 "$root/launch/setup.py" --extras run,test
cd "$root"
exec .venv/bin/python -m pytest -n 2 --dist loadgroup -m nightly "$@"
