# What the scripts of this folder have in common. They read it; it does nothing by itself. It takes from them:
#
#   LIMIT    seconds that everything may take
#   PYTHONS  minor versions of Python 3 that will do, oldest first

summary=""

fail() { printf 'CI: %s\n' "$*" >&2; exit 1; }

stage() {  # stage NAME COMMAND: run it in the copy, within what is left of the time; end everything if it fails
  local name=$1 command=$2 started=$SECONDS code=0 left
  left=$((LIMIT - SECONDS))
  ((left > 0)) || fail "no time left for $name"
  printf '\n=== %s: %s\n' "$name" "$command"
  timeout --kill-after=15 "$left" bash -euo pipefail -c "$command" </dev/null || code=$?
  printf '=== %s: %d s, exit code %d\n' "$name" $((SECONDS - started)) "$code"
  summary+=$(printf '%6d s  %s' $((SECONDS - started)) "$name")$'\n'
  if ((code == 124 || code == 137)); then
    echo "CI: $name was stopped after $LIMIT s in all" >&2
  fi
  ((code == 0)) || { printf '\n%sCI: FAILED in %s\n' "$summary" "$name" >&2; exit 1; }
}

passed() { printf '\n%sCI: passed in %d s\n' "$summary" "$SECONDS"; }

suitable() {  # suitable COMMAND: whether it is a Python that will do
  "$1" -c "import sys; sys.exit(sys.version_info[0] != 3 or str(sys.version_info[1]) not in '$PYTHONS'.split())" 2>/dev/null
}

install_packages() {  # by name, only where that is possible
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    fail "please install $* (not root, or no apt-get here)"
  fi
  DEBIAN_FRONTEND=noninteractive apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
}

find_browser() {  # a headless Chromium, for the pages; where none can be installed, tests of them are skipped, which pytest tells
  local name
  for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then return; fi
  done
  (install_packages chromium) || printf 'CI: no chromium: pages are not looked at in a browser\n' >&2
}

find_python() {  # sets python, a command that will do
  local minor
  if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
  else
    command -v python >/dev/null || command -v python3 >/dev/null || install_packages python3 python3-venv
    for python in python python3 $(for minor in $PYTHONS; do echo "python3.$minor"; done) ""; do
      if [ -z "$python" ] || suitable "$python"; then break; fi
    done
  fi
  if [ -z "$python" ] || ! suitable "$python"; then
    fail "no Python 3.x with x in $PYTHONS was found${python:+: $python is another}; set PYTHON="
  fi
  "$python" -c 'import ensurepip, venv' 2>/dev/null || install_packages python3-venv
}

copy_checkout() {  # copy_checkout TO: what is committed or could be: no build outputs, caches or environments
  cd "$repository"
  if git rev-parse --git-dir >/dev/null 2>&1; then
    git -c core.quotepath=off ls-files -z --cached --others --exclude-standard |
      while IFS= read -r -d '' file; do if [ -e "$file" ]; then printf '%s\0' "$file"; fi; done |
      tar --null --files-from=- --create | tar --extract --directory "$1"
  else
    tar --exclude=./.venv --exclude=./.git --exclude=./runs --create . | tar --extract --directory "$1"
  fi
}

begin() {  # go to a copy of the checkout in a temporary folder, so that nothing is reused and nothing is left behind
  repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  work=$(mktemp -d "${TMPDIR:-/tmp}/lightning-cap-ci.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  find_python
  copy_checkout "$work"
  cd "$work"
  # The README says `python`; some systems call it python3.
  mkdir "$work/.bin"
  printf '#!/bin/sh\nexec "%s" "$@"\n' "$(command -v "$python")" >"$work/.bin/python"
  chmod +x "$work/.bin/python"
  export MPLBACKEND=Agg PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
  unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
}

enter_environment() {  # the one that the stage before has made
  rm -r "$work/.bin"
  # shellcheck disable=SC1091
  . .venv/bin/activate
}
