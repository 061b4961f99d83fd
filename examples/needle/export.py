"""Write what training made as a checkpoint for servers: bf16, with tokenizer and processor.

python examples/needle/export.py .needle/language.pt examples/needle/checkpoint
"""

import argparse
from pathlib import Path

import network
import torch

LARGEST = 16 * 2**20  # bytes, of all files together: the checkpoint lives in the repository


def export(trained: Path | list[Path], path: Path, build=network.build, texts=None) -> Path:
    """Write the checkpoint to the folder `path` and return it.

    Args:
        trained: of one training, at one step or at several; the mean of several is written, a file
            that is named twice counts twice.
        build: makes the untrained model.
        texts: what its tokenizer must know; None for the questions of `scenes.py`.

    Raises:
        ValueError: the files are larger than `LARGEST`.
    """
    files = trained if isinstance(trained, list) else [trained]
    saved = [torch.load(file, map_location="cpu")["average"] for file in files]
    weights = {name: sum(each[name] for each in saved) / len(saved) for name in saved[0]}
    model = build(layers=network.layers_of(weights))
    model.load_state_dict(weights)
    network.save(model, path, texts)
    size = sum(file.stat().st_size for file in path.iterdir())
    if size > LARGEST:
        raise ValueError(f"{path} has {size} bytes: must be at most {LARGEST}; use a smaller model")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trained", type=Path, help="what train_language.py wrote")
    parser.add_argument("path", type=Path, help="folder to write")
    arguments = parser.parse_args()
    print(export(arguments.trained, arguments.path))


if __name__ == "__main__":
    main()
