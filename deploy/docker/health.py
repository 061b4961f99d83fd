#!/usr/bin/env python3
"""The image's health check: exit code 0 when the server answers /health with 200, else 1.

vLLM answers 503 there once its engine is dead, and nothing before the model is loaded.
"""

import os
import sys
import urllib.request

SECONDS = 4  # less than the Dockerfile's --timeout


def main() -> int:
    # A proxy set for downloads is not asked for this machine's own server.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        port = os.environ.get("PORT") or "8000"
        opener.open(f"http://127.0.0.1:{port}/health", timeout=SECONDS).close()
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
