"""Install the package with vLLM's CPU build into the environment of the Python that runs this file.

    python3 -m venv .venv && .venv/bin/python deploy/cpu/install.py

Installs torch, then this checkout (editable, with EXTRAS), then runs `fixes.py`. A stamp
in the environment remembers what was installed, so a second run ends at once.
"""

import ctypes
import hashlib
import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
EXTRAS = "cpu,dev,video,analyze,deploy-test"
STAMP = Path(sys.prefix) / "adaspark-cpu.stamp"

# vLLM's CPU kernels are compiled against exactly this torch. Elsewhere than on these Linux
# machines the plain build is already one for the CPU.
TORCH = "torch==2.13.0"
if platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64", "s390x"):
    TORCH += "+cpu"

NO_CPU_TORCH = f"""
pip found no {TORCH} (a torch built for the CPU alone), and vLLM's CPU build needs it.
Tell pip where to find it, as pytorch.org's "Get started" page says for Linux / pip / CPU, by
putting that page's index address in PIP_EXTRA_INDEX_URL, and run this again."""


def input_hash() -> str:
    """Changes whenever what is to be installed changes; the editable source itself may change."""
    digest = hashlib.sha256(str(ROOT).encode())
    for path in [ROOT / "pyproject.toml", *sorted(HERE.glob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check_system() -> None:
    """Name what the system must bring, before minutes of downloads rather than after them."""
    if sys.version_info < (3, 11):  # noqa: UP036 - pip would tell only after fetching torch
        sys.exit(f"Python 3.11 or later is needed, this is {platform.python_version()}")
    if sys.prefix == sys.base_prefix:
        sys.exit("run this with the Python of a virtual environment, e.g. .venv/bin/python")
    if platform.system() != "Linux":
        return
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        sys.exit(
            "the system library libnuma.so.1 is missing; vLLM's CPU kernels are linked to it.\n"
            "Debian, Ubuntu: apt-get install libnuma1    Fedora, RHEL: dnf install numactl-libs"
        )
    if shutil.which("g++") is None:
        print(
            "warning: no g++ found. torch.compile needs one on the CPU; without it start vLLM\n"
            "with --enforce-eager. Debian, Ubuntu: apt-get install g++    Fedora: gcc-c++",
            flush=True,
        )


def pip_install(*arguments: str) -> bool:
    print(f"pip install {' '.join(arguments)}", flush=True)
    return subprocess.run([sys.executable, "-m", "pip", "install", *arguments]).returncode == 0


def main() -> None:
    wanted = input_hash()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    check_system()
    # torch first and by itself: a failure here has one cause, and one remedy to name.
    if not pip_install(TORCH):
        sys.exit(NO_CPU_TORCH)
    if not pip_install("--editable", f"{ROOT}[{EXTRAS}]"):
        sys.exit("pip could not install the package; see its message above")
    if subprocess.run([sys.executable, str(HERE / "fixes.py")]).returncode:
        sys.exit("the environment could not be fixed; see the message above")
    STAMP.write_text(wanted)


if __name__ == "__main__":
    main()
