#!/usr/bin/env bash
# bash scripts/demo.sh: from a bare python3 to answers of the demo model, plain and with EAGLE. Arguments go to scripts/demo.py.
set -euo pipefail
source "$(dirname "$0")/venv.sh" requirements.txt
exec python scripts/demo.py "$@"
