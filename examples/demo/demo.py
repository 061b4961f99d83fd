"""Serve a video model with AdaSpark, ask about a video, and show what was computed for the answer.

    make demo                                     # the small needle model, on the CPU
    make demo KEEP=1                              # and leave the server up, to look at its viewer
    python examples/demo/demo.py --model Qwen/Qwen2.5-VL-7B-Instruct --video my.mp4    # on a GPU

Without `--model` the model is the one in examples/needle, which answers questions about cards in a
made-up video, and the video hides a few such cards. `--random` takes larger random weights instead:
gibberish, computed just as really. Everything is written into the folder `.demo/`.
"""

import argparse
import json
import signal
import sys
import time
from pathlib import Path

from openai import OpenAI, OpenAIError
from progress import step
from report import read_last, render
from server import ServerFailed, VllmServer

NEEDLE = Path(__file__).resolve().parent.parent / "needle"
ARCHITECTURE = "AdaSparkQwen2_5_VLForConditionalGeneration"
NEEDLE_FRAME = (112, 168)  # pixels; at two frames a second a second of video is 24 tokens
START_SECONDS = 240  # for a small checkpoint on two cores it takes about 30
START_SECONDS_REAL = 1800  # gigabytes of weights may have to be fetched first
ANSWER_SECONDS = 120
REPORT_SECONDS = 10


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a real Qwen2.5-VL model, by name or folder")
    parser.add_argument("--video", type=Path, help="an mp4 of your own")
    parser.add_argument("--random", action="store_true", help="a model with random weights")
    parser.add_argument("--seconds", type=int, default=240, help="length of the video written")
    parser.add_argument("--seed", type=int, default=0, help="which video is written")
    parser.add_argument("--question", help="a question of your own")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--p-attn", type=float, default=0.5, help="Top-p over cubes, 0 < p <= 1")
    parser.add_argument("--p-ffn", type=float, default=0.5, help="Top-p over tokens, 0 < p <= 1")
    parser.add_argument("--stock", action="store_true", help="serve without AdaSpark, to compare")
    parser.add_argument("--keep-server", action="store_true", help="leave the server up")
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="for all files written")
    options = parser.parse_args()
    if options.video is not None and not options.video.is_file():
        parser.error(f"--video {options.video}: no such file")
    if options.seconds < 4:
        parser.error(f"--seconds {options.seconds}: expected at least 4")
    return options


def write_checkpoint(folder: Path) -> Path:
    # Imported here because it takes seconds, and a real model does not need it.
    from checkpoint import build
    from transformers.utils import logging

    logging.disable_progress_bar()
    return build(folder / "checkpoint")


def write_needle_video(path: Path, seconds: int, seed: int) -> tuple[str, str]:
    """Write a video with number cards hidden in it; returns a question about one, and its answer.

    The needle model has not seen it: the seed is from the held-out range.
    """
    sys.path.append(str(NEEDLE))
    import footage
    import scenes

    scene = scenes.make(
        scenes.HELD_OUT_SEEDS[seed], patches=seconds, size=NEEDLE_FRAME, motion="busy"
    )
    footage.write_mp4(footage.frames(scene), path)
    question = next(q for q in scenes.questions(scene) if q.skill == "basic")
    return question.text, question.answer


def make_server(options: argparse.Namespace, model: Path | str, video: Path) -> VllmServer:
    arguments = [
        *("--served-model-name", "demo"),
        *("--allowed-local-media-path", str(video.parent)),
        # A video's tokens must fit one step: the encoder cache has this size.
        *("--max-num-batched-tokens", "16384"),
        *("--max-model-len", "32768"),
    ]
    env = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if options.model is None:
        arguments.append("--enforce-eager")  # compiling takes longer than the whole demo
        env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    if not options.stock:
        settings = {
            "p_attn": options.p_attn,
            "p_ffn": options.p_ffn,
            "report_file": str(report_path(options)),
            "trace": True,  # every request; a client may also ask for it in one of its own
        }
        arguments += [
            *("--hf-overrides", json.dumps({"architectures": [ARCHITECTURE]})),
            *("--additional-config", json.dumps({"adaspark": settings})),
        ]
        env["VLLM_PLUGINS"] = "adaspark,adaspark_http"  # the second one serves traces and viewer
    return VllmServer(model, *arguments, log=options.folder / "server.log", env=env)


def report_path(options: argparse.Namespace) -> Path:
    return options.folder / "report.jsonl"


def ask(url: str, video: Path, question: str, max_tokens: int) -> tuple[str, str]:
    """Stream the answer to stdout as it comes, then print its time to first token (TTFT).

    Returns the answer's id and text.
    """
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=ANSWER_SECONDS, max_retries=0)
    content = [
        {"type": "video_url", "video_url": {"url": video.as_uri()}},
        {"type": "text", "text": question},
    ]
    print(f"\nquestion: {question}\nanswer:   ", end="", flush=True)
    start, first = time.monotonic(), None
    stream = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.monotonic()
            text += chunk.choices[0].delta.content
            print(chunk.choices[0].delta.content, end="", flush=True)
    end = time.monotonic()
    if first is None or usage is None:
        sys.exit("\nthe server sent no answer")
    tokens = usage.completion_tokens
    print(f"\n\nTTFT {first - start:.2f} s (decoding and encoding the video included), ", end="")
    print(f"{tokens} tokens in {end - start:.2f} s, {usage.prompt_tokens:,} prompt tokens")
    return chunk.id, text


def draw(url: str, answer: str, path: Path) -> str:
    """Save a picture of the frames that an answer's question attended most; returns the trace's id.

    The question's tokens are what chooses the answer's first one, and the needle model's answers
    have no other.
    """
    from vllm_adaspark.traces.picture import save_heatmap
    from vllm_adaspark.traces.reader import read_http

    trace = read_http(url, answer)
    save_heatmap(trace, path, source="question")
    return trace["id"]


def main() -> None:
    options = parse_arguments()
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    report_path(options).unlink(missing_ok=True)
    # Ending this script by a signal must end the server as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    model, video, question, expected = options.model, options.video, options.question, None
    if model is None and options.random:
        with step("writing a small Qwen2.5-VL checkpoint (random weights)"):
            model = write_checkpoint(options.folder)
    if video is None:
        video = options.folder / "video.mp4"
        with step(f"writing an mp4 of {options.seconds} seconds"):
            if model is None:
                asked, expected = write_needle_video(video, options.seconds, options.seed)
                question, expected = question or asked, expected if question is None else None
            else:
                from video import write_mp4

                write_mp4(video, seconds=options.seconds)
    model = model or NEEDLE / "checkpoint"
    question = question or "What happens in the video?"
    video = video.resolve()

    with make_server(options, model, video) as server:
        timeout = START_SECONDS if options.model is None else START_SECONDS_REAL
        with step("starting vllm serve" + (" without AdaSpark" if options.stock else "")):
            server.wait_until_ready(timeout)
        answer, text = ask(server.url, video, question, options.max_tokens)
        if expected is not None:
            right = text.strip() == expected
            print(f"the video shows {expected}: the answer is {'right' if right else 'wrong'}")
        viewer = None
        if not options.stock:
            print(f"\n{render(read_last(report_path(options), timeout=REPORT_SECONDS))}\n")
            picture = options.folder / "heatmap.png"
            trace = draw(server.url, answer, picture)
            print(f"picture of the frames that the question attended most: {picture}")
            viewer = f"{server.url}/adaspark/#{trace}"
        if options.keep_server:
            server.kept = True
            print(f"\nthe server stays up (model name: demo): {server.url}/v1")
            if viewer is not None:
                print(f"viewer: {viewer}")
            print(f"stop it with: kill {server.process.pid}", flush=True)
            return
        with step("stopping the server"):
            server.stop()


if __name__ == "__main__":
    try:
        main()
    except (ServerFailed, OpenAIError) as failure:  # not started, or the request refused
        sys.exit(f"\n{failure}")
    except KeyboardInterrupt:
        sys.exit(130)
