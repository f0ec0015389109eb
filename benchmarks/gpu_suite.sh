#!/usr/bin/env bash
# bash benchmarks/gpu_suite.sh: everything that needs a GPU, in eight minutes, offline. Arguments go to benchmarks/gpu_suite.py.
# Installs nothing: PYTHON, else the repository's .venv, else python3 has torch, pytest and requirements.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && default=.venv/bin/python || default=python3
exec "${PYTHON:-$default}" benchmarks/gpu_suite.py "$@"
