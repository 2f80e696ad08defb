#!/usr/bin/env bash
# The one set-up step behind quickstart.sh and run_tests.sh; a second run takes seconds.
#
#   bash tools/setup_env.sh     set up, and try again what failed before (for example Detectron2's build)
#   source tools/setup_env.sh   the same for scripts: leaves PYTHON, the interpreter of the environment, and
#                               MFUSER_D2_NO_DETECTRON2, the reason why Detectron2 is absent ("" where it is present)
#
# The environment is the active one (VIRTUAL_ENV, or a conda environment other than base), else .venv in this clone.
set -euo pipefail

MFUSER_D2_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

_find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
    if _new_enough "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  echo "No Python >= 3.10 found (python3 is $(python3 --version 2>&1 || echo absent))." \
    "Install one, or name it: PYTHON=/path/to/python3 bash tools/setup_env.sh" >&2
  return 1
}

_environment() {
  local venv="$MFUSER_D2_ROOT/.venv" python
  if [[ -n "${VIRTUAL_ENV:-}" && -x "${VIRTUAL_ENV:-}/bin/python" ]]; then
    venv="$VIRTUAL_ENV"
  elif [[ -n "${CONDA_PREFIX:-}" && "${CONDA_DEFAULT_ENV:-base}" != base && -x "${CONDA_PREFIX:-}/bin/python" ]]; then
    venv="$CONDA_PREFIX"
  elif ! [[ -x "$venv/bin/python" && -f "$venv/pyvenv.cfg" ]] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python="$(_find_python)" || return 1
    echo "[set-up] virtual environment .venv from $("$python" --version)" >&2
    if ! "$python" -m venv "$venv" >&2; then
      echo "$python cannot make a virtual environment; install its venv module (on Debian and Ubuntu: apt install" \
        "python3-venv), or activate an environment of your own, and run this again." >&2
      return 1
    fi
  fi
  if ! _new_enough "$venv/bin/python"; then
    echo "The environment $venv has $("$venv/bin/python" --version 2>&1), but Python >= 3.10 is needed;" \
      "deactivate or remove it and run this again." >&2
    return 1
  fi
  echo "$venv/bin/python"
}

PYTHON="$(_environment)"
if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
  MFUSER_D2_NO_DETECTRON2="$("$PYTHON" "$MFUSER_D2_ROOT/tools/setup_env.py" --retry </dev/null)"
  if [[ -n "$MFUSER_D2_NO_DETECTRON2" ]]; then
    echo "Set up without Detectron2: $MFUSER_D2_NO_DETECTRON2" >&2
    exit 1
  fi
  echo "Everything is set up. Use it with: source '$(dirname "$PYTHON")/activate'"
else
  MFUSER_D2_NO_DETECTRON2="$("$PYTHON" "$MFUSER_D2_ROOT/tools/setup_env.py" </dev/null)"
fi
export PYTHON MFUSER_D2_NO_DETECTRON2
