"""Run lmms-eval tasks under several settings against one running server, and set them side by side.

    PY=.venv/lmms-eval/bin/python    # examples/eval/install.py makes it
    $PY examples/eval/compare.py http://localhost:8000/v1 --tasks mlvu_dev --frames 128 \
        --setting dense='{"off": true}' --setting sparse='{"p_attn": 0.5, "p_ffn": 0.5}' \
        --out results/mlvu

The first setting is what the others are compared with. `--out` receives `comparison.md`,
`comparison.json`, and per setting the answers and what each cost. docs/evaluation.md says which
server each benchmark wants.
"""

import argparse
import json
import sys
from argparse import Namespace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import comparison  # noqa: E402

try:
    from adaspark_lmms import ON_ERROR, AdaSparkServer
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager
except ImportError as missing:
    sys.exit(
        f"{missing}: run examples/eval/install.py, then this with the Python it installed "
        "(.venv/lmms-eval/bin/python)"
    )

DEFAULT_SETTINGS = ['dense={"off": true}', "server={}"]
# As lmms-eval's own command line has them.
CLI_DEFAULTS = {"process_with_media": False, "reasoning_tags": None}


def parse_settings(texts: list[str]) -> dict[str, dict]:
    """Settings by name, from `NAME=JSON`.

    Raises:
        ValueError: one is not that, or a name comes twice.
    """
    settings: dict[str, dict] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found = json.loads(value)
        except json.JSONDecodeError:
            found = None
        if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name[0] == ".":
            raise ValueError(f"--setting {text!r}: the name may have letters, digits, . _ and -")
        if not isinstance(found, dict):
            raise ValueError(
                f"--setting {text!r}: must be NAME=OBJECT, as in sparse='{{\"p_attn\": 0.5}}'"
            )
        if name in settings:
            raise ValueError(f"--setting {name!r} is given twice")
        settings[name] = found
    return settings


def parse_arguments() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="the server's API, e.g. http://localhost:8000/v1")
    parser.add_argument("--tasks", required=True, help="names as in lmms-eval, with commas between")
    parser.add_argument("--include-path", type=Path, help="a folder with tasks of your own")
    parser.add_argument(
        "--setting", action="append", metavar="NAME=JSON",
        help=f"AdaSpark's settings; once each (default: {' and '.join(DEFAULT_SETTINGS)})",
    )  # fmt: skip
    parser.add_argument("--frames", type=int, help="of each video; with --fps at most so many")
    parser.add_argument("--fps", type=float, help="frames a second instead of a fixed number")
    parser.add_argument("--max-pixels", type=int, help="of a frame")
    parser.add_argument("--limit", type=int, help="only the first questions of each task")
    parser.add_argument("--concurrent", type=int, default=8, help="requests (default: 8)")
    parser.add_argument("--model", help="default: the first the server names")
    parser.add_argument("--inline", action="store_true", help="send videos, not their paths")
    parser.add_argument("--on-error", choices=ON_ERROR, default="stop", help="default: stop")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    options = parser.parse_args()
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit {options.limit}: must be at least 1")
    try:
        options.settings = parse_settings(options.setting or DEFAULT_SETTINGS)
    except ValueError as error:
        parser.error(str(error))
    return options


def find_tasks(options: Namespace) -> TaskManager:
    """Where the tasks are described: the folder alone if it has them all, as lmms-eval has 2,000.

    Raises:
        ValueError: a task is nowhere.
    """
    names = options.tasks.split(",")
    if options.include_path:
        own = TaskManager("ERROR", str(options.include_path), include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    found = TaskManager("ERROR", str(options.include_path) if options.include_path else None)
    unknown = sorted(set(names) - set(found.all_tasks))
    if unknown:
        raise ValueError(
            f"--tasks {','.join(unknown)}: no such task; `lmms-eval tasks list` prints their names"
        )
    return found


def run(
    options: Namespace, name: str, settings: dict, tasks: TaskManager, folder: Path
) -> comparison.Run:
    """All tasks' questions under one setting; answers and costs go to the folder."""
    server = AdaSparkServer(
        base_url=options.url,
        model=options.model,
        frames=options.frames,
        fps=options.fps,
        max_pixels=options.max_pixels,
        adaspark=settings,
        concurrent=options.concurrent,
        inline=options.inline,
        on_error=options.on_error,
    )
    results = evaluator.simple_evaluate(
        model=server,
        tasks=options.tasks.split(","),
        limit=options.limit,
        task_manager=tasks,
        cli_args=Namespace(output_path=str(folder), **CLI_DEFAULTS),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "cost.jsonl", server.records)
    for task, samples in results["samples"].items():
        write_lines(folder / f"{task}.jsonl", samples)
    return comparison.Run(
        name, comparison.metrics_of(results), results["samples"], list(server.records)
    )


def write_lines(path: Path, entries: list[dict]) -> None:
    path.write_text("".join(json.dumps(entry, default=str) + "\n" for entry in entries))


def main() -> None:
    options = parse_arguments()
    tasks = TaskManager("ERROR", include_path=str(options.include_path or "") or None)
    unknown = [name for name in options.tasks.split(",") if name not in tasks.all_tasks]
    if unknown:
        sys.exit(
            f"--tasks {','.join(unknown)}: lmms-eval knows no such task (lmms-eval tasks list)"
        )
    runs = []
    for name, settings in options.settings.items():
        print(f"{name}: {json.dumps(settings)}", flush=True)
        try:
            runs.append(run(options, name, settings, tasks, options.out / name))
        except (RuntimeError, ValueError) as error:
            sys.exit(f"{name}: {error}")
    compared = comparison.compare(runs)
    told = {"frames": options.frames, "fps": options.fps, "max_pixels": options.max_pixels}
    told |= {"limit": options.limit, "requests": options.settings, **compared}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "comparison.json").write_text(json.dumps(told, indent=1) + "\n")
    table = comparison.markdown(compared)
    (options.out / "comparison.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
