"""Install lmms-eval into an environment of its own, on top of the one that runs this file.

    .venv/bin/python examples/eval/install.py            # into .venv/lmms-eval
    .venv/bin/python examples/eval/install.py FOLDER

lmms-eval's requirements do not go with vLLM's (it wants an older av and protobuf), and most of them
belong to models and tasks that are not used here. So the new environment sees all packages of the
old one, takes from the index only what is missing there (`pyproject.toml` beside this file), and
changes nothing in it. A second run with nothing changed ends at once.
"""

import hashlib
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
LMMS_EVAL = "lmms-eval==0.7.3"  # the version whose task names and model interface we know
DEFAULT = Path(sys.prefix) / "lmms-eval"


def python_in(folder: Path) -> Path:
    return folder / "bin" / "python"


def input_hash(folder: Path) -> str:
    """Changes whenever what is to be installed, or where, changes."""
    digest = hashlib.sha256(f"{folder} {HERE} {sys.version}".encode())
    for name in ("install.py", "pyproject.toml"):
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()


def make_environment(folder: Path) -> None:
    """An environment without pip that also has this one's packages, after its own."""
    venv.create(folder, clear=True, symlinks=True)
    below = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    site = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    # addsitedir, not a bare path: it also runs this environment's .pth files.
    lines = [f"import site; site.addsitedir({path!r})" for path in sorted(below)]
    (Path(site) / "below.pth").write_text("\n".join(lines) + "\n")


def pip_install(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(python_in(folder)), "install", "-q"]
    if subprocess.run([*command, *arguments]).returncode:
        sys.exit(f"pip could not install {arguments[-1]}; see its message above")


def main() -> None:
    if len(sys.argv) > 2 or any(word.startswith("-") for word in sys.argv[1:]):
        sys.exit(__doc__)
    folder = Path(sys.argv[1]).resolve() if len(sys.argv) == 2 else DEFAULT
    if sys.prefix == sys.base_prefix:
        sys.exit("run this with the Python of a virtual environment, e.g. .venv/bin/python")
    stamp, wanted = folder / "adaspark-eval.stamp", input_hash(folder)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
        sys.exit(f"{folder}: not empty and not a virtual environment; name another folder")
    print(f"installing {LMMS_EVAL} into {folder}", flush=True)
    make_environment(folder)
    pip_install(folder, "--no-deps", LMMS_EVAL)
    # Its check of all packages would list everything of lmms-eval's that is left out on purpose.
    pip_install(folder, "--no-warn-conflicts", "--editable", str(HERE))
    stamp.write_text(wanted)


if __name__ == "__main__":
    main()
