"""``vllm-adaspark doctor``: what is installed, what is wrong with it, and how to mend it."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from importlib.util import find_spec
from typing import Any

from .. import ARCHITECTURES, __version__
from . import PROGRAM

OK, WARNING, BROKEN = "ok", "warning", "broken"
DISTRIBUTION = "vllm-adaspark"
PLUGIN, HTTP_PLUGIN = "adaspark", "adaspark_http"
OLDEST_PYTHON = (3, 11)
CPU_FREE_SHARE = 0.92  # vLLM's default of --gpu-memory-utilization
CPU_FIXES = "python deploy/cpu/fixes.py, as deploy/cpu/README.md says"


@dataclass(frozen=True)
class Finding:
    """One thing looked at; ``mend`` says what to do if it is not ok."""

    name: str
    state: str
    value: str
    mend: str = ""


def add_parser(subparsers: Any) -> None:
    """Add this subcommand."""
    parser = subparsers.add_parser(
        "doctor",
        help="look for what is wrong with this installation",
        description="Look for what is wrong with this installation and say how to mend it. "
        "Exit code 1 if something is broken.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Look at everything and print it."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    findings = examine()
    broken = [finding for finding in findings if finding.state == BROKEN]
    if args.json:
        print(json.dumps({"ok": not broken, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        print(render(findings))
    return 1 if broken else 0


def examine() -> list[Finding]:
    """All findings; a check that fails itself is a finding too."""
    checks: list[Callable[[], Iterator[Finding]]] = [_packages, _plugins, _media]
    if find_spec("vllm") is not None:
        checks += [_vllm, _machine]
    findings = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:  # whatever is wrong with the installation, go on looking
            name = check.__name__.strip("_")
            findings.append(Finding(name, BROKEN, _short(error), "see the message"))
    return findings


def render(findings: list[Finding]) -> str:
    """The findings as text."""
    signs = {OK: "ok     ", WARNING: "warning", BROKEN: "BROKEN "}
    lines = []
    for finding in findings:
        lines.append(f"{signs[finding.state]} {finding.name:<20} {finding.value}".rstrip())
        if finding.state != OK and finding.mend:
            lines.append(f"{'':<8}mend: {finding.mend}")
    broken = sum(finding.state == BROKEN for finding in findings)
    warnings = sum(finding.state == WARNING for finding in findings)
    lines.append(f"\n{broken} broken, {warnings} warning(s), {len(findings)} looked at")
    return "\n".join(lines)


# -- versions -------------------------------------------------------------------------------------


def _packages() -> Iterator[Finding]:
    old = sys.version_info < OLDEST_PYTHON
    yield Finding(
        "python",
        BROKEN if old else OK,
        f"{platform.python_version()} ({sys.executable})",
        "use Python 3.11 or later",
    )
    yield Finding(DISTRIBUTION, OK, __version__)
    for name in ("torch", "transformers"):
        found = _version(name)
        yield Finding(name, OK if found else BROKEN, found or "not installed", "it comes with vLLM")
    yield vllm_version(_version("vllm"), pinned_vllm())


def vllm_version(found: str | None, pinned: str | None) -> Finding:
    """Whether the installed vLLM is the one this package is made for."""
    install = f"pip install '{DISTRIBUTION}[gpu]', or on a CPU machine see deploy/cpu/README.md"
    if found is None:
        if find_spec("vllm") is not None:
            return Finding("vllm", BROKEN, "a package without its metadata", CPU_FIXES)
        return Finding("vllm", BROKEN, "not installed", install)
    if pinned is not None and found.partition("+")[0] != pinned:
        return Finding(
            "vllm",
            BROKEN,
            f"{found}; this release is made for exactly {pinned}",
            f"pip install vllm=={pinned}; out-of-tree attention backends have no stable contract",
        )
    return Finding("vllm", OK, found)


def pinned_vllm() -> str | None:
    """The vLLM version that our metadata asks for."""
    try:
        needs = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return None
    for need in needs:
        if match := re.match(r"vllm\s*==\s*([\w.]+)", need):
            return match[1]
    return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# -- plugins --------------------------------------------------------------------------------------


def _plugins() -> Iterator[Finding]:
    allowed = os.environ.get("VLLM_PLUGINS")
    names = None if allowed is None else allowed.split(",")
    for group, name in (("vllm.general_plugins", PLUGIN), ("vllm.endpoint_plugins", HTTP_PLUGIN)):
        points = [point for point in entry_points(group=group) if point.name == name]
        if not points:
            mend = f"pip install --force-reinstall --no-deps {DISTRIBUTION}"
            yield Finding(f"plugin {name}", BROKEN, f"no entry point in {group}", mend)
            continue
        try:
            if find_spec("vllm") is not None:
                points[0].load()
        except Exception as error:
            yield Finding(f"plugin {name}", BROKEN, _short(error), "see the message")
            continue
        yield Finding(f"plugin {name}", OK, points[0].value)
    yield allow_list(names)


def allow_list(names: list[str] | None) -> Finding:
    """Whether VLLM_PLUGINS lets our plugins in."""
    title = "VLLM_PLUGINS"
    if names is None:
        return Finding(
            title, OK, f"unset: {PLUGIN} is loaded, {HTTP_PLUGIN} (metrics, viewer) is not"
        )
    value = ",".join(names)
    if PLUGIN not in names:
        padded = [name for name in names if name.strip() == PLUGIN]
        mend = "write the names without spaces" if padded else ""
        wanted = ",".join(
            dict.fromkeys([PLUGIN, HTTP_PLUGIN, *map(str.strip, filter(None, names))])
        )
        mend = mend or f"export VLLM_PLUGINS={wanted}, or unset it"
        return Finding(title, BROKEN, f"{value!r} keeps out {PLUGIN}", mend)
    if HTTP_PLUGIN not in names:
        return Finding(title, OK, f"{value} ({HTTP_PLUGIN} is not named: no metrics, no viewer)")
    return Finding(title, OK, value)


# -- video readers --------------------------------------------------------------------------------


def _media() -> Iterator[Finding]:
    try:
        import av

        yield Finding("av", OK, f"{av.__version__}: reads videos")
    except ImportError as error:
        yield Finding("av", BROKEN, f"cannot be imported: {_short(error)}", "pip install av")
    try:
        import cv2

        readable = "FFMPEG" in {cv2.videoio_registry.getBackendName(b) for b in _stream_readers()}
        value = cv2.__version__ + ("" if readable else ", without FFmpeg: it cannot read videos")
        mend = "pip install --force-reinstall opencv-python-headless"
        yield Finding("opencv", OK if readable else BROKEN, value, mend)
    except ImportError as error:
        mend = "pip install opencv-python-headless"
        yield Finding("opencv", BROKEN, f"cannot be imported: {_short(error)}", mend)
    decord = _version("decord")
    yield Finding("decord", OK, decord or "not installed (optional; pip install decord)")


def _stream_readers() -> list[int]:
    import cv2.videoio_registry

    return list(cv2.videoio_registry.getStreamBufferedBackends())


# -- vLLM and the machine -------------------------------------------------------------------------


def _vllm() -> Iterator[Finding]:
    try:
        from vllm.platforms import current_platform
        from vllm.plugins import load_general_plugins
    except Exception as error:
        yield Finding("vllm import", BROKEN, _short(error), f"reinstall vLLM; on a CPU {CPU_FIXES}")
        return
    supported = current_platform.is_cpu() or current_platform.is_cuda_alike()
    name = getattr(current_platform, "device_name", "") or "none found"
    yield Finding(
        "platform",
        OK if supported else BROKEN,
        name,
        "AdaSpark runs on CPUs and CUDA GPUs: check the driver with nvidia-smi, and that this is "
        f"vLLM's build for it; on a CPU machine {CPU_FIXES}",
    )
    try:
        load_general_plugins()
        models = importlib.import_module("vllm.model_executor.models")
        known = models.ModelRegistry.get_supported_archs()
        missing = [name for name in ARCHITECTURES.values() if name not in known]
    except Exception as error:
        yield Finding("architecture", BROKEN, _short(error), "see the message")
        return
    mend = "see the plugin and VLLM_PLUGINS above"
    value = ", ".join(ARCHITECTURES)
    if missing:
        value = f"{', '.join(missing)} is not registered"
    yield Finding("architecture", BROKEN if missing else OK, value, mend)
    if supported:
        yield _attention()


def _attention() -> Finding:
    """The attention backend vLLM would choose for Qwen2.5-VL, and whether we have an adapter."""
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    from ..paged.adapters import SUPPORTED

    config = VllmConfig()
    config.cache_config.block_size = 64
    config.cache_config.user_specified_block_size = True
    with set_current_vllm_config(config):
        chosen = get_attn_backend(128, torch.bfloat16, "auto", num_heads=28).get_name()
    return Finding(
        "attention backend",
        OK if chosen in SUPPORTED else BROKEN,
        chosen if chosen in SUPPORTED else f"{chosen}, for which there is no adapter",
        f"start with --attention-backend {' or '.join(SUPPORTED[1:])}",
    )


def _machine() -> Iterator[Finding]:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        yield from _cpu()
        return
    import torch

    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        size = facts.total_memory / 2**30
        capability = f"compute capability {facts.major}.{facts.minor}"
        yield Finding(f"GPU {index}", OK, f"{facts.name}, {size:.0f} GiB, {capability}")


def _cpu() -> Iterator[Finding]:
    import psutil  # vLLM needs it too

    memory = psutil.virtual_memory()
    total = memory.total / 2**30
    yield free_memory(memory.available / 2**30, total)
    yield kv_space(os.environ.get("VLLM_CPU_KVCACHE_SPACE"), total)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    bind = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    yield Finding("threads", OK, f"{cores} cores; VLLM_CPU_OMP_THREADS_BIND={bind}")
    if platform.system() == "Linux":
        try:
            ctypes.CDLL("libnuma.so.1")
            yield Finding("libnuma", OK, "found")
        except OSError:
            mend = "apt-get install libnuma1, or dnf install numactl-libs"
            yield Finding("libnuma", BROKEN, "libnuma.so.1 is missing", mend)
    compiler = shutil.which("g++")
    yield Finding(
        "g++",
        OK if compiler else WARNING,
        compiler or "not found: torch.compile needs it",
        "install it, or start with --enforce-eager",
    )


def free_memory(free: float, total: float) -> Finding:
    """Whether vLLM would start on a CPU with its default of memory to find free; in GiB."""
    enough = free >= CPU_FREE_SHARE * total
    return Finding(
        "free memory",
        OK if enough else WARNING,
        f"{free:.1f} of {total:.1f} GiB"
        + ("" if enough else f"; vLLM starts only with {CPU_FREE_SHARE:.0%} free"),
        f"start with --gpu-memory-utilization {max(0.1, int(10 * free / total) / 10 - 0.1):.1f}, "
        "which is about CPU memory here",
    )


def kv_space(given: str | None, memory: float) -> Finding:
    """VLLM_CPU_KVCACHE_SPACE against the machine's memory, both in GiB."""
    title = "KV cache space"
    if given is None:
        return Finding(
            title, OK, f"VLLM_CPU_KVCACHE_SPACE is unset: vLLM chooses ({memory:.0f} GiB of memory)"
        )
    if not given.isdigit():
        return Finding(
            title,
            BROKEN,
            f"VLLM_CPU_KVCACHE_SPACE={given!r} is not a whole number of GiB",
            "export VLLM_CPU_KVCACHE_SPACE=4, or unset it",
        )
    if int(given) >= memory:
        return Finding(
            title,
            BROKEN,
            f"VLLM_CPU_KVCACHE_SPACE={given} GiB, but the machine has {memory:.0f}",
            f"export VLLM_CPU_KVCACHE_SPACE={max(1, int(memory // 2))}; '{PROGRAM} inspect' tells "
            "what a video needs",
        )
    return Finding(title, OK, f"VLLM_CPU_KVCACHE_SPACE={given} GiB of {memory:.0f}")


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
