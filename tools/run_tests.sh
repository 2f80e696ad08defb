#!/usr/bin/env bash
# Set everything up and run the tests. Arguments go to pytest: bash tools/run_tests.sh tests/core -k scan
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_env.sh

# One torch thread per worker: the tests are tiny, and two workers on two cores beat two threads in one.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
workers="$("$PYTHON" -c 'import os; print(min(8, os.cpu_count() or 1))')"

status=0
if [[ $# -eq 0 ]]; then
  "$PYTHON" -m ruff check . || status=1
fi
"$PYTHON" -m pytest -q -n "$workers" "$@" </dev/null || status=$?
exit "$status"
