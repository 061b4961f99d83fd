"""Which of the engine's requests belong to a request that a client knows.

vLLM makes the engine's ids from the client's: a random suffix after it; for n > 1 a number before
it; and a beam search sends one request per step and beam, ``<client's id>-<16 hex>-beam-<nth>``.
(vllm/v1/engine/input_processor.py, parallel_sampling.py, entrypoints/generate/beam_search.)

A client may choose its id, so it can be anything and of any length.  Standard library only.
"""

from __future__ import annotations

import re

_NUMBER = re.compile(r"[0-9]+_")
_SUFFIX = re.compile(r"(?:-[0-9a-f]{8})?")
_BEAM = re.compile(r"-[0-9a-f]{16}-beam-[0-9]+(?:-[0-9a-f]{8})?\Z")
_SEARCH = "-beam"
LONGEST = 256  # characters of an id that are written down


def brief(request_id: str) -> str:
    """An id for a log or a file: cut if long, and on one line, whatever its client made of it.

    The end stays, because vLLM's suffix makes the id unique.
    """
    if len(request_id) > LONGEST:
        request_id = f"{request_id[: LONGEST - 50]}…{request_id[-49:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in request_id)


def search_name(request_id: str) -> str | None:
    """The name that all requests of a beam search share; None for a request of another kind."""
    beam = _BEAM.search(request_id)
    return request_id[: beam.start()] + _SEARCH if beam else None


def unnumbered(name: str, client_id: str) -> str | None:
    """``name`` without the number of an answer among n; None if it is another client's.

    Args:
        name: an engine's request id, or a :func:`search_name`.
        client_id: the id that the client knows.  An engine's id stands for itself.
    """
    number = _NUMBER.match(name)
    for start in (0, number.end()) if number else (0,):
        end = start + len(client_id)
        if name.startswith(client_id, start) and (
            _SUFFIX.fullmatch(name, end) or name[end:] == _SEARCH
        ):
            return name[start:]
    return None
