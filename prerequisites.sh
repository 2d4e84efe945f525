#!/usr/bin/env bash
# Checks what the Makefile cannot install: Python >= 3.11 with venv, a C++ compiler, disk. Usage: prerequisites.sh PYTHON
set -u
python=$1
fail() { echo "error: $1" >&2; exit 1; }

[ -n "$python" ] || fail "no Python 3.11 or newer found. Install one (Debian: apt-get install python3 python3-venv), or name it: make PYTHON=/path/to/python3.12"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$python is older than 3.11. Install a newer one, or name it: make PYTHON=/path/to/python3.12"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
  fail "$python has no venv. Install it (Debian: apt-get install python3-venv)."
command -v g++ >/dev/null || command -v clang++ >/dev/null ||
  echo "note: no g++: training on CPU runs uncompiled, about 2.5 times slower. Install g++ to compile."
free_kib=$(df -Pk . | awk 'NR == 2 {print $4}')
[ "$free_kib" -ge 4000000 ] || fail "$((free_kib / 1024)) MiB of disk are free here: about 4 GB are needed. Free some, or clone elsewhere."
exit 0
