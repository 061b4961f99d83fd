#!/usr/bin/env bash
# Everything to be measured on a GPU, in at most eight minutes: first whether the Triton kernels are
# right, then times.
#
#     benchmarks/gpu_session.sh [FOLDER]        # results; default benchmarks/results
#
# Needs python3 (or $PYTHON) with torch and Triton; vLLM's kernels take part where vLLM is installed.
# Results are JSON files, written as they come, so an interrupted session leaves what it had.
# --check runs all of it on tiny inputs and any machine; its times mean nothing.
set -u

check=()
if [ "${1-}" = --check ]; then
    check=(--check)
    shift
fi
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/results}
if [ "${out#-}" != "$out" ]; then
    echo "usage: $0 [--check] [FOLDER]" >&2
    exit 2
fi
python=${PYTHON:-python3}
mkdir -p "$out"

# What a step may take, in seconds, is more than what it is asked to take: it saves as it goes.
kernels_minutes=2 attention_minutes=4
if [ "${#check[@]}" -eq 0 ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no CUDA device (or no torch in $python): nothing was measured, namely"
    echo "  the Triton kernels against their twins on a real device (gpu_kernels.py)"
    echo "  the FFN at 50 % and VideoNSA's branches (gpu_kernels.py)"
    echo "  attention, dense against chosen blocks, at 32K to 128K tokens (gpu_attention.py)"
    exit 0
fi

failed=0
echo "== kernels against their twins, then FFN and VideoNSA"
timeout 180 "$python" "$here/gpu_kernels.py" --json "$out/gpu_kernels.json" \
    --minutes "$kernels_minutes" "${check[@]}" || failed=1
echo "== attention, ours against dense"
timeout 300 "$python" "$here/gpu_attention.py" --json "$out/gpu_attention.json" \
    --markdown "$out/gpu_attention.md" --minutes "$attention_minutes" "${check[@]}" || failed=1
[ "$failed" -eq 0 ] || echo "a step failed or ran out of time: see above, and $out for what it left"
exit "$failed"
