#!/usr/bin/env bash
# bash scripts/demo.sh: from a bare python3 to an answer of the demo model. Arguments go to generate.py.
set -euo pipefail
source "$(dirname "$0")/venv.sh" requirements.txt
[ $# -gt 0 ] || set -- --prompt "Why is the sky blue?" --max-new-tokens 128
exec python generate.py "$@"
