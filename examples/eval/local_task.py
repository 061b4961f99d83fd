"""A benchmark of one's own as an lmms-eval task: a folder for its `--include_path`.

folder/
  NAME.yaml         what lmms-eval reads first
  utils.py          how a question is asked and an answer scored, in plain Python
  questions.jsonl   one question a line
  *.mp4             where the questions say
"""

import json
import shutil
from pathlib import Path

YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: {answer_tokens}
  temperature: 0
metric_list:
"""
METRIC = """\
  - metric: {name}
    aggregation: {aggregation}
    higher_is_better: true
"""


def write(
    folder: Path,
    name: str,
    questions: list[dict],
    utils: Path,
    metrics: dict[str, str],
    answer_tokens: int,
) -> Path:
    """Write the task and return its folder.

    Args:
        folder: made if it is not there.
        name: what `--tasks` calls it.
        questions: what `utils` needs; each with the key `answer`, and `video` as a path that is
            absolute or relative to the folder.
        utils: a file with `doc_to_visual`, `doc_to_text` and `process_results`; it is copied.
        metrics: the keys that `process_results` returns, each with how the task's questions are
            taken together: "mean", or "!function utils.…".
        answer_tokens: the most an answer may have.

    Raises:
        FileNotFoundError: a question's video is not there.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for question in questions:
        if not (folder / question["video"]).is_file():
            raise FileNotFoundError(f"video={question['video']!r}: no such file in {folder}")
    lines = [json.dumps({**question, "folder": str(folder)}) for question in questions]
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    # A JSON string is a YAML string, whatever the folder is called.
    text = YAML.format(name=name, questions=json.dumps(str(path)), answer_tokens=answer_tokens)
    for metric, aggregation in metrics.items():
        text += METRIC.format(name=metric, aggregation=aggregation)
    (folder / f"{name}.yaml").write_text(text)
    shutil.copyfile(utils, folder / "utils.py")
    return folder
