#!/usr/bin/env bash
# bash scripts/test.sh: install what the tests need and run them, in two processes. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/venv.sh" requirements-dev.txt
exec python -m pytest -q -n 2 --dist loadfile tests "$@"
