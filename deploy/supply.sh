#!/usr/bin/env bash
# What a Python environment holds, and what is known to be wrong with it:
#
#   deploy/supply.sh sbom  [PYTHON [FILE]]   a CycloneDX bill of materials, default sbom.json
#   deploy/supply.sh audit [PYTHON]          known vulnerabilities, by pip-audit from the index
#
# PYTHON is the environment's interpreter, default .venv/bin/python.  The tools get an environment of
# their own, so that they are not among what they list.
set -euo pipefail

what=${1:-}
python=${2:-.venv/bin/python}
file=${3:-sbom.json}
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT

install() {
    python3 -m venv "$tools"
    "$tools/bin/pip" install --quiet "$1"
}

case $what in
sbom)
    install cyclonedx-bom==7.5.0
    "$tools/bin/cyclonedx-py" environment "$python" --of JSON --output-reproducible -o "$file"
    echo "$file"
    ;;
audit)
    install pip-audit==2.10.1
    # Skipped packages are named: those that the index does not know cannot be looked up.
    "$tools/bin/pip-audit" --progress-spinner off \
        --path "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    ;;
*)
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
