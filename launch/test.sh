#!/usr/bin/env bash
# Set up and run the test suite on 2 cores. Arguments go to pytest.
#   bash launch/test.sh
#   bash launch/test.sh tests/pure -k wire
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python3 "$root/launch/setup.py" --extras run,test
cd "$root"
# loadgroup keeps the tests that start several ranks on one worker, one after another.
exec .venv/bin/python -m pytest -n 2 --dist loadgroup "$@"
