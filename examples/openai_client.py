"""Ask one question about one video, with the OpenAI client.

    python examples/openai_client.py lecture.mp4 "When is the second graph shown?" --p-attn 0.8
    python examples/openai_client.py https://example.com/talk.mp4 "Who speaks?" --flops 0.4 --fps 1

A local file travels inside the request (base64); a URL is fetched by the server.  The options that
change the request need a server with `--trust-request-mm-kwargs`; the cost of the answer is in its
usage if the server runs AdaSpark's HTTP plugin.
"""

import argparse
import base64
import os
import sys
from pathlib import Path

import openai


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Where to ask."""
    url = os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1")
    parser.add_argument("--base-url", default=url, help=f"the server's API (default: {url})")
    parser.add_argument("--model", help="default: the first the server names")
    parser.add_argument("--timeout", type=float, default=600, help="seconds (default: 600)")
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer (default: 256)")


def add_request_options(parser: argparse.ArgumentParser) -> None:
    """How much of the video is looked at, and how closely."""
    sparsity = parser.add_argument_group("sparsity of this request")
    sparsity.add_argument("--p-attn", type=float, help="mass of the preceding cubes a query keeps")
    sparsity.add_argument("--p-ffn", type=float, help="share of a cube's norm that runs the FFN")
    sparsity.add_argument("--flops", type=float, help="instead: at most this share of dense FLOPs")
    sparsity.add_argument("--off", action="store_true", help="instead: dense, as the stock model")
    frames = parser.add_argument_group("frames")
    frames.add_argument("--fps", type=float, help="frames a second (the model's default is 2)")
    frames.add_argument("--max-frames", type=int, help="at most so many (default 768)")
    frames.add_argument("--max-pixels", type=int, help="of a frame; 784 make one token of a pair")
    decoders = ("adaspark", "adaspark_opencv", "adaspark_decord")
    frames.add_argument("--decoder", choices=decoders, help="PyAV (default), OpenCV or decord")
    parser.add_argument(
        "--by-path", action="store_true",
        help="send a local file's path instead of its bytes; for a server on this machine with "
        "--allowed-local-media-path",
    )  # fmt: skip


def request_fields(options: argparse.Namespace) -> dict:
    """vLLM's own fields of a request, for `extra_body`; empty if nothing was asked for.

    `media_io_kwargs` says which frames are read, `mm_processor_kwargs` what is made of them.
    """
    if options.off:
        adaspark = {"off": True}
    else:
        names = ("p_attn", "p_ffn", "flops")
        adaspark = {name: getattr(options, name) for name in names}
    processor = {"adaspark": _given(adaspark), "max_pixels": options.max_pixels}
    video = {
        "fps": options.fps,
        "max_frames": options.max_frames,
        "video_backend": options.decoder,
    }
    return _given(
        {
            "mm_processor_kwargs": _given(processor),
            "media_io_kwargs": _given({"video": _given(video)}),
        }
    )


def _given(fields: dict) -> dict:
    return {name: value for name, value in fields.items() if value not in (None, {})}


def video_part(video: str, by_path: bool = False) -> dict:
    """The part of a message that shows a video.

    Raises:
        SystemExit: there is no such file.
    """
    if video.startswith(("http://", "https://", "data:", "file://")):
        url = video
    else:
        path = Path(video)
        if not path.is_file():
            raise SystemExit(f"{video}: no such file")
        if by_path:
            url = path.resolve().as_uri()
        else:
            url = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    return {"type": "video_url", "video_url": {"url": url}}


def connect(options: argparse.Namespace) -> tuple[openai.OpenAI, str]:
    """The client and the name of the model to ask."""
    client = openai.OpenAI(
        base_url=options.base_url,
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        timeout=options.timeout,
        max_retries=0,
    )
    return client, options.model or client.models.list().data[0].id


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video", help="a file, or a URL that the server can fetch")
    parser.add_argument("question")
    add_server_options(parser)
    add_request_options(parser)
    options = parser.parse_args()

    video = video_part(options.video, options.by_path)
    client, model = connect(options)
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": [video, {"type": "text", "text": options.question}]}],
        max_tokens=options.max_tokens,
        temperature=0,
        extra_body=request_fields(options),
    )
    print(answer.choices[0].message.content)
    usage = answer.usage
    print(f"\n{usage.prompt_tokens} prompt tokens, {usage.completion_tokens} of answer")
    cost = (usage.model_extra or {}).get("adaspark")
    if cost:
        words = {
            "attention_density": "of the preceding cubes attended",
            "ffn_density": "of the video tokens through the FFN",
            "flops_ratio": "of the dense FLOPs",
        }
        shares = [f"{cost[key]:.1%} {text}" for key, text in words.items()]
        print("AdaSpark: " + ", ".join(shares))


if __name__ == "__main__":
    try:
        main()
    except openai.APIConnectionError as error:
        sys.exit(f"no answer from the server: {error.__cause__ or error}")
    except openai.APIStatusError as error:
        sys.exit(f"the server refused: {error.message}")
