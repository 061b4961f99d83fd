#!/bin/sh
# Ask one question about one video, with curl.
#
#     examples/curl.sh lecture.mp4 "When is the second graph shown?"
#     examples/curl.sh https://example.com/lecture.mp4 "Who speaks?" '{"p_attn": 0.8, "p_ffn": 0.6}'
#
# A local file travels inside the request; a URL is fetched by the server. The third argument, if
# given, sets the request's sparsity, and needs a server with --trust-request-mm-kwargs.
# Environment: BASE_URL (default http://localhost:8000/v1), MODEL (default: the server's first),
# MAX_TOKENS of the answer (default 256), OPENAI_API_KEY.
set -eu

case "${1:-}" in
-h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
esac
if [ $# -lt 2 ] || [ $# -gt 3 ]; then
    echo "usage: $0 VIDEO QUESTION [SETTINGS]; $0 --help says more" >&2
    exit 2
fi
base_url=${BASE_URL:-http://localhost:8000/v1}
key=${OPENAI_API_KEY:-none}

# A text as a JSON string, quotes included.
quote() { printf '%s' "$1" | tr '\n\r\t' '   ' | sed 's/\\/\\\\/g; s/"/\\"/g; s/.*/"&"/'; }

ask() { curl --silent --show-error --fail-with-body -H "Authorization: Bearer $key" "$@"; }

if [ "${1#http*://}" = "$1" ] && [ ! -r "$1" ]; then
    echo "$1: cannot be read" >&2
    exit 1
fi
models=${MODEL:-$(ask "$base_url/models")}  # where nobody answers, that is the end
model=$(printf '%s' "$models" | sed 's/.*"data":\[{"id":"\([^"]*\)".*/\1/')

body() {
    printf '{"model": %s, "max_tokens": %d, "temperature": 0, ' \
        "$(quote "$model")" "${MAX_TOKENS:-256}"
    [ $# -lt 3 ] || printf '"mm_processor_kwargs": {"adaspark": %s}, ' "$3"
    printf '"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": '
    case "$1" in
    http://* | https://*) quote "$1" ;;
    *)
        printf '"data:video/mp4;base64,'
        base64 <"$1" | tr -d '\n'
        printf '"'
        ;;
    esac
    printf '}}, {"type": "text", "text": %s}]}]}' "$(quote "$2")"
}

body "$@" | ask -H "Content-Type: application/json" --data-binary @- "$base_url/chat/completions"
echo
