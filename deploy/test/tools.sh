#!/usr/bin/env bash
# The tests' tools that are not packages of the tests' own environment: promtool, kubectl and
# Chromium, from Debian, and lmms-eval, a Python package that wants an environment of its own.
#
#   deploy/test/tools.sh [FOLDER]     FOLDER: programs of the environment, default .venv/bin
#
# What is there already stays. promtool and kubectl need no root: they are unpacked out of their
# packages, without the service that the package `prometheus` would start. Chromium needs its
# libraries, and so a real installation. With CI=true a missing tool is an error; elsewhere it is
# named, and the tests that need it are skipped.
set -euo pipefail

folder=${1:-$(dirname "$0")/../../.venv/bin}
packages_fresh=
# A mirror may fail once, and another program may be installing packages.
apt=(apt-get -qq -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300)

has() {
    [[ -x "$folder/$1" ]] || command -v "$1" >/dev/null
}

as_root() {
    if [[ $EUID -eq 0 ]]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo -n "$@"
    else
        return 1
    fi
}

# The package lists, fetched at most once, and only where a package is not known.
know() {
    apt-cache show "$1" >/dev/null 2>&1 && return
    [[ -z $packages_fresh ]] || return 1
    packages_fresh=tried
    as_root "${apt[@]}" update && apt-cache show "$1" >/dev/null 2>&1
}

# unpack PROGRAM PACKAGE: one program out of a package.
unpack() {
    local program=$1 package=$2 work status=0
    # apt's own user may not write to the folder made here.
    local download=("${apt[@]}" -o APT::Sandbox::User=root download "$package")
    has "$program" && return
    know "$package" || return 1
    work=$(mktemp -d)
    (
        cd "$work"
        # A list that is out of date names a version the mirror no longer has: one more try.
        "${download[@]}" ||
            { as_root "${apt[@]}" update && "${download[@]}"; }
        dpkg-deb --extract ./*.deb .
    ) && mkdir -p "$folder" && install -m 0755 "$work/usr/bin/$program" "$folder/" || status=1
    rm -rf "$work"
    return $status
}

# install_package PROGRAM PACKAGE: a package with all it needs.
install_package() {
    has "$1" && return
    know "$2" || return 1
    local install=(env DEBIAN_FRONTEND=noninteractive
        "${apt[@]}" install -y --no-install-recommends "$2")
    as_root "${install[@]}" >/dev/null ||
        { as_root "${apt[@]}" update && as_root "${install[@]}" >/dev/null; }
}

missing=()
unpack promtool prometheus || missing+=("promtool (Debian, Ubuntu: package prometheus)")
unpack kubectl kubernetes-client || missing+=("kubectl (package kubernetes-client)")
install_package chromium chromium || missing+=("chromium (package chromium)")
"$folder/python" "$(dirname "$0")/../../examples/eval/install.py" ||
    missing+=("lmms-eval (from the package index, by examples/eval/install.py)")

[[ ${#missing[@]} -gt 0 ]] || exit 0
echo "not installed, and could not be installed here:" >&2
printf '  %s\n' "${missing[@]}" >&2
if [[ ${CI:-} == true ]]; then
    exit 1
fi
echo "the tests that need them will be skipped" >&2
