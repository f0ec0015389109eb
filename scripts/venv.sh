# Sourced by demo.sh and test.sh: enter the repository's .venv, made or brought up to date with $1, a requirements file.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
if [ "$(cat requirements*.txt)" != "$(cat ".venv/installed-$1" 2>/dev/null)" ]; then
    echo "installing $1 into .venv" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1"
    cat requirements*.txt > ".venv/installed-$1"
fi
export PATH="$PWD/.venv/bin:$PATH"
