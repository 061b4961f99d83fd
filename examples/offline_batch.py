"""Ask the same question about every video of a folder, offline; one JSON line per video.

    python examples/offline_batch.py videos/ "What happens?" --model Qwen/Qwen2.5-VL-7B-Instruct
    python examples/offline_batch.py videos/ "What happens?" --model MODEL --p-attn 0.8 --fps 1

Frames are read by qwen-vl-utils, as in Qwen's own examples (`pip install 'vllm-adaspark[video]'`).
A line has `video`, `answer`, `prompt_tokens` and `cost` (AdaSpark's shares), or `video` and
`error`.  Videos with an answer in the output are left out, so a run that was cut short can go on.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

ENDINGS = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v")
SHARES = ("attention_density", "ffn_density", "flops_ratio")


def videos_of(folder: Path) -> list[Path]:
    """The folder's videos, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)


def done_in(output: Path) -> set[str]:
    """Names of the videos that already have an answer; a line that was cut off is taken out."""
    if not output.exists():
        return set()
    *whole, cut = output.read_text(encoding="utf-8", errors="replace").split("\n")
    if cut:
        output.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
    lines = map(json.loads, whole)
    return {line["video"] for line in lines if "answer" in line}


def read_prompt(processor, path: Path, options: argparse.Namespace) -> dict:
    """vLLM's prompt about one video.

    qwen-vl-utils samples and resizes the frames; with their metadata, which vLLM asks for, the
    model knows how far apart they are.
    """
    from qwen_vl_utils import process_vision_info

    sampling = {"fps": options.fps, "max_frames": options.max_frames}
    sampling |= {"max_pixels": options.max_pixels, "min_pixels": options.min_pixels}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "video", "video": str(path), **sampling},
                {"type": "text", "text": options.question},
            ],
        }
    ]
    _, videos, keywords = process_vision_info(
        messages, return_video_kwargs=True, return_video_metadata=True
    )
    settings = {"p_attn": options.p_attn, "p_ffn": options.p_ffn, "flops": options.flops}
    settings = {name: value for name, value in settings.items() if value is not None}
    return {
        "prompt": processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        ),
        "multi_modal_data": {"video": videos},
        "mm_processor_kwargs": {**keywords, "adaspark": settings},
    }


def answers(llm, processor, paths: list[Path], options: argparse.Namespace) -> Iterator[dict]:
    """One line per video; the frames of one batch at a time are in memory."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=options.max_tokens, temperature=0)
    for start in range(0, len(paths), options.batch):
        asked = {}
        for path in paths[start : start + options.batch]:
            try:  # what is wrong with one video must not end the others
                prompt = read_prompt(processor, path, options)
                (request_id,) = llm.enqueue([prompt], sampling, use_tqdm=False)
            except Exception as error:
                yield {"video": path.name, "error": f"{type(error).__name__}: {error}"}
            else:
                asked[client_id(request_id)] = path
        outputs = llm.wait_for_completion(use_tqdm=False)
        costs = costs_by_id(llm)
        for output in outputs:
            yield {
                "video": asked[output.request_id].name,
                "answer": output.outputs[0].text,
                "prompt_tokens": len(output.prompt_token_ids),
                "cost": costs.get(output.request_id),
            }


def costs_by_id(llm) -> dict[str, dict]:
    """AdaSpark's shares of the last requests."""
    from vllm_adaspark.accounts.reports import merge_reports

    requests = merge_reports(llm.collective_rpc("adaspark_report"))["requests"]
    return {
        client_id(request["request_id"]): {share: request[share] for share in SHARES}
        for request in requests
    }


def client_id(request_id: str) -> str:
    """A request's id as its output has it: the engine's ends with a random suffix."""
    return request_id.rpartition("-")[0]


def check(options: argparse.Namespace) -> None:
    """End with a message before a model is loaded for nothing."""
    if not options.folder.is_dir():
        raise SystemExit(f"{options.folder}: no such folder")
    if not videos_of(options.folder):
        raise SystemExit(f"{options.folder}: no video in it ({', '.join(ENDINGS)})")
    if options.batch < 1:
        raise SystemExit(f"--batch {options.batch}: must be at least 1")
    try:
        import qwen_vl_utils  # noqa: F401
    except ImportError:
        raise SystemExit("qwen-vl-utils is missing: pip install 'vllm-adaspark[video]'") from None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help=f"with videos: {', '.join(ENDINGS)}")
    parser.add_argument("question")
    parser.add_argument("--model", required=True, help="checkpoint folder or name")
    parser.add_argument("--output", type=Path, help="default: FOLDER/answers.jsonl")
    parser.add_argument("--batch", type=int, default=4, help="videos at a time (default: 4)")
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer (default: 256)")
    parser.add_argument("--max-model-len", type=int, default=32768, help="tokens of video and text")
    sparsity = parser.add_argument_group("sparsity")
    sparsity.add_argument("--p-attn", type=float, help="mass of the preceding cubes a query keeps")
    sparsity.add_argument("--p-ffn", type=float, help="share of a cube's norm that runs the FFN")
    sparsity.add_argument("--flops", type=float, help="instead: at most this share of dense FLOPs")
    frames = parser.add_argument_group("frames, as in qwen-vl-utils")
    frames.add_argument("--fps", type=float, help="frames a second (default 2)")
    frames.add_argument("--max-frames", type=int, help="at most so many (default 768)")
    frames.add_argument("--max-pixels", type=int, help="of a frame; 784 make one token of a pair")
    frames.add_argument("--min-pixels", type=int, help="of a frame")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    check(options)
    output = options.output or options.folder / "answers.jsonl"
    done = done_in(output)
    paths = [path for path in videos_of(options.folder) if path.name not in done]
    print(f"{len(paths)} videos to ask about, {len(done)} done before; answers go to {output}")
    if not paths:
        return

    from transformers import AutoProcessor
    from vllm import LLM

    from vllm_adaspark import ARCHITECTURE

    llm = LLM(
        options.model,
        hf_overrides={"architectures": [ARCHITECTURE]},
        max_model_len=options.max_model_len,
        max_num_batched_tokens=options.max_model_len,  # a video must fit the encoder cache
        limit_mm_per_prompt={"video": 1, "image": 0},
    )
    processor = AutoProcessor.from_pretrained(options.model)
    failed = 0
    with output.open("a", encoding="utf-8") as file:
        for line in answers(llm, processor, paths, options):
            failed += "error" in line
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            print(f"{line['video']}: {line.get('answer') or line['error']}", flush=True)
    if failed:
        raise SystemExit(f"{failed} of {len(paths)} videos failed; see {output}")


if __name__ == "__main__":
    main()
