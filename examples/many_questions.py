"""Ask many questions about one video, and see what the prefix cache saves.

    python examples/many_questions.py lecture.mp4 "Who speaks?" "What is on the board?" "How many?"
    python examples/many_questions.py lecture.mp4 --questions questions.txt

The video comes before the question, so every question after the first finds the video's KV blocks
in the cache: they are neither encoded nor prefilled again, and the cubes they hold are chosen from
as before.  Cached tokens are shown if the server runs with `--enable-prompt-tokens-details`.

Settings that differ never share blocks: keep them the same for all questions about a video.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import openai
from openai_client import (
    add_request_options,
    add_server_options,
    connect,
    request_fields,
    video_part,
)


@dataclass
class Answer:
    """One answer and what it took; `cached` is None where the server does not say."""

    text: str
    first_token: float  # seconds
    total: float  # seconds
    prompt_tokens: int
    cached: int | None


def ask(client: openai.OpenAI, model: str, video: dict, question: str, **request) -> Answer:
    """Stream an answer and take the time."""
    start = time.perf_counter()
    first, pieces, usage = None, [], None
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": [video, {"type": "text", "text": question}]}],
        stream=True,
        stream_options={"include_usage": True},
        **request,
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            if choice.delta.content:
                first = first or time.perf_counter()
                pieces.append(choice.delta.content)
    end = time.perf_counter()
    details = usage.prompt_tokens_details
    return Answer(
        text="".join(pieces),
        first_token=(first or end) - start,
        total=end - start,
        prompt_tokens=usage.prompt_tokens,
        cached=details.cached_tokens if details else None,
    )


def line(*cells: object) -> str:
    return "{:>2}  {:>7}  {:>7}  {:>12}  {:>8}  {}".format(*cells)


def summary(answers: list[Answer]) -> str:
    """First question against the others."""
    first, later = answers[0], answers[1:]
    if not later:
        return "one question: nothing to reuse yet"
    seconds = statistics.median(answer.first_token for answer in later)
    text = (
        f"first token after {first.first_token:.2f} s for the first question, "
        f"{seconds:.2f} s (median) for the {len(later)} after it"
    )
    if first.cached is None:
        return text + "; start the server with --enable-prompt-tokens-details to see cached tokens"
    cached, tokens = (sum(getattr(a, key) for a in later) for key in ("cached", "prompt_tokens"))
    return text + f"; {cached} of their {tokens} prompt tokens ({cached / tokens:.0%}) were cached"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video", help="a file, or a URL that the server can fetch")
    parser.add_argument("question", nargs="*", help="questions")
    parser.add_argument("--questions", type=Path, help="a text file, one question a line")
    add_server_options(parser)
    add_request_options(parser)
    options = parser.parse_args()
    questions = list(options.question)
    if options.questions:
        try:
            text = options.questions.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"--questions {options.questions}: cannot be read ({error})")
        questions += [row.strip() for row in text.splitlines() if row.strip()]
    if not questions:
        parser.error("no question: give some after the video, or a file with --questions")

    video = video_part(options.video, options.by_path)
    client, model = connect(options)
    print(line("", "prompt", "cached", "first token", "total", "question and answer"))
    answers = []
    for number, question in enumerate(questions, start=1):
        answer = ask(
            client,
            model,
            video,
            question,
            max_tokens=options.max_tokens,
            temperature=0,
            extra_body=request_fields(options),
        )
        answers.append(answer)
        times = (f"{answer.first_token:.2f} s", f"{answer.total:.2f} s")
        cached = "?" if answer.cached is None else answer.cached
        print(line(number, answer.prompt_tokens, cached, *times, question))
        print(line("", "", "", "", "", f"→ {answer.text}"), flush=True)
    print(f"\n{summary(answers)}")


if __name__ == "__main__":
    try:
        main()
    except openai.APIConnectionError as error:
        sys.exit(f"no answer from the server: {error.__cause__ or error}")
    except openai.APIStatusError as error:
        sys.exit(f"the server refused: {error.message}")
