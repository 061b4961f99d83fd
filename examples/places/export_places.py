"""Write what training made as a checkpoint for servers: bf16, with tokenizer and processor.

python examples/places/export_places.py .places/reader.pt examples/places/checkpoint

Of several files, copies of reader.pt at several steps, the mean is written; it answers better.
"""

import shared  # noqa: F401, puts the needle model's modules on the path

# isort: split

import argparse
from pathlib import Path

import places
import tower as towers
from export import export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trained", type=Path, nargs="+", help="what train_reader.py wrote")
    parser.add_argument("path", type=Path, help="folder to write")
    arguments = parser.parse_args()
    texts = places.every_question_text()
    print(export(arguments.trained, arguments.path, towers.build, texts))


if __name__ == "__main__":
    main()
