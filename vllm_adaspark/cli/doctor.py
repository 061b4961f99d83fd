"""``vllm-adaspark doctor``: what is installed, what is wrong with it, and how to mend it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from importlib.util import find_spec
from typing import Any

from .. import ARCHITECTURES, __version__
from ..methods import built_in
from . import PROGRAM

OK, WARNING, BROKEN = "ok", "warning", "broken"
DISTRIBUTION = "vllm-adaspark"
PLUGIN, HTTP_PLUGIN = "adaspark", "adaspark_http"
GROUPS = {PLUGIN: "vllm.general_plugins", HTTP_PLUGIN: "vllm.endpoint_plugins"}
CPU_FREE_SHARE = 0.92  # vLLM's default of --gpu-memory-utilization
CPU_FIXES = "python deploy/cpu/fixes.py, as deploy/cpu/README.md says"


@dataclass(frozen=True)
class Finding:
    """One thing looked at; ``mend`` says what to do if it is not ok."""

    name: str
    state: str
    value: str
    mend: str = ""


def add_parser(subparsers: Any, arguments: Sequence[str] = ()) -> None:
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
        checks += [_methods, _vllm, _machine]
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


def _packages() -> Iterator[Finding]:
    yield Finding("python", OK, f"{platform.python_version()} ({sys.executable})")
    yield Finding(DISTRIBUTION, OK, __version__)
    for name in ("torch", "transformers"):
        found = _version(name)
        yield Finding(name, OK if found else BROKEN, found or "not installed", "it comes with vLLM")
    yield vllm_version(_version("vllm"), pinned_vllm())


def vllm_version(found: str | None, pinned: str | None) -> Finding:
    """Whether the installed vLLM is the one this package is made for."""
    if found is None and find_spec("vllm") is not None:
        return Finding("vllm", BROKEN, "a package without its metadata", CPU_FIXES)
    if found is None:
        install = f"pip install '{DISTRIBUTION}[gpu]', or on a CPU machine see deploy/cpu/README.md"
        return Finding("vllm", BROKEN, "not installed", install)
    if pinned is not None and found.partition("+")[0] != pinned:
        value = f"{found}; this release is made for exactly {pinned}"
        why = "out-of-tree attention backends have no stable contract"
        return Finding("vllm", BROKEN, value, f"pip install vllm=={pinned}; {why}")
    return Finding("vllm", OK, found)


def pinned_vllm() -> str | None:
    """The vLLM version that our metadata asks for."""
    try:
        needs = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return None
    found = (re.match(r"vllm\s*==\s*([\w.]+)", need) for need in needs)
    return next((match[1] for match in found if match), None)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _plugins() -> Iterator[Finding]:
    for name, group in GROUPS.items():
        points = [point for point in entry_points(group=group) if point.name == name]
        if points:
            yield Finding(f"plugin {name}", OK, points[0].value)
        else:
            mend = f"pip install --force-reinstall --no-deps {DISTRIBUTION}"
            yield Finding(f"plugin {name}", BROKEN, f"no entry point in {group}", mend)
    allowed = os.environ.get("VLLM_PLUGINS")
    yield allow_list(None if allowed is None else allowed.split(","))


def allow_list(names: list[str] | None) -> Finding:
    """Whether VLLM_PLUGINS lets our plugins in."""
    title = "VLLM_PLUGINS"
    if names is None:
        value = f"unset: {PLUGIN} is loaded, {HTTP_PLUGIN} (metrics, viewer) is not"
        return Finding(title, OK, value)
    value = ",".join(names)
    if PLUGIN not in names:
        wanted = dict.fromkeys([PLUGIN, HTTP_PLUGIN, *map(str.strip, filter(None, names))])
        mend = f"export VLLM_PLUGINS={','.join(wanted)} (without spaces), or unset it"
        return Finding(title, BROKEN, f"{value!r} keeps out {PLUGIN}", mend)
    if HTTP_PLUGIN not in names:
        value += f" ({HTTP_PLUGIN} is not named: no metrics, no viewer)"
    return Finding(title, OK, value)


def _media() -> Iterator[Finding]:
    for name, package in (("av", "av"), ("cv2", "opencv-python-headless")):
        try:
            module = __import__(name)
            yield Finding(package, OK, module.__version__)
        except ImportError as error:
            value = f"cannot be imported: {_short(error)}"
            yield Finding(package, BROKEN, value, f"pip install --force-reinstall {package}")
    decord = _version("decord")
    yield Finding("decord", OK, decord or "not installed (optional; pip install decord)")


def _methods() -> Iterator[Finding]:
    from ..methods.base import load

    for name in built_in():
        yield Finding(f"method {name}", OK, load(name).__module__)


def _vllm() -> Iterator[Finding]:
    try:
        from vllm.platforms import current_platform
        from vllm.plugins import load_general_plugins
    except Exception as error:
        yield Finding("vllm import", BROKEN, _short(error), f"reinstall vLLM; on a CPU {CPU_FIXES}")
        return
    supported = current_platform.is_cpu() or current_platform.is_cuda_alike()
    yield Finding(
        "platform",
        OK if supported else BROKEN,
        getattr(current_platform, "device_name", "") or "none found",
        "AdaSpark runs on CPUs and CUDA GPUs: check the driver with nvidia-smi, and that this is "
        f"vLLM's build for it; on a CPU machine {CPU_FIXES}",
    )
    load_general_plugins()
    from vllm.model_executor.models import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    missing = [name for name in ARCHITECTURES.values() if name not in known]
    yield Finding(
        "architecture",
        BROKEN if missing else OK,
        f"{', '.join(missing)} is not registered" if missing else ", ".join(ARCHITECTURES),
        "see the plugin and VLLM_PLUGINS above",
    )
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
        import psutil  # vLLM needs it too

        memory = psutil.virtual_memory()
        yield free_memory(memory.available / 2**30, memory.total / 2**30)
        yield kv_space(os.environ.get("VLLM_CPU_KVCACHE_SPACE"), memory.total / 2**30)
        return
    import torch

    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        size = facts.total_memory / 2**30
        capability = f"compute capability {facts.major}.{facts.minor}"
        yield Finding(f"GPU {index}", OK, f"{facts.name}, {size:.0f} GiB, {capability}")


def free_memory(free: float, total: float) -> Finding:
    """Whether vLLM would start on a CPU with its default of memory to find free; in GiB."""
    value = f"{free:.1f} of {total:.1f} GiB"
    if free >= CPU_FREE_SHARE * total:
        return Finding("free memory", OK, value)
    share = max(0.1, int(10 * free / total) / 10 - 0.1)
    return Finding(
        "free memory",
        WARNING,
        f"{value}; vLLM starts only with {CPU_FREE_SHARE:.0%} free",
        f"start with --gpu-memory-utilization {share:.1f}, which is about CPU memory here",
    )


def kv_space(given: str | None, memory: float) -> Finding:
    """VLLM_CPU_KVCACHE_SPACE against the machine's memory, both in GiB."""
    title, name = "KV cache space", "VLLM_CPU_KVCACHE_SPACE"
    if given is None:
        return Finding(title, OK, f"{name} is unset: vLLM chooses ({memory:.0f} GiB of memory)")
    if given.isdigit() and int(given) < memory:
        return Finding(title, OK, f"{name}={given} GiB of {memory:.0f}")
    return Finding(
        title,
        BROKEN,
        f"{name}={given!r}: expected whole GiB, fewer than the machine's {memory:.0f}",
        f"export {name}={max(1, int(memory // 2))}, or unset it; '{PROGRAM} inspect' tells what a "
        "video needs",
    )


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
