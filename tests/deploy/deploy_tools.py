"""What the deployment tests share: real tools, and the deployed commands as vLLM reads them."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
DEPLOY = ROOT / "deploy"
ENTRYPOINT = DEPLOY / "docker" / "entrypoint.py"
RUN_SECONDS = 300


def tool(name: str) -> str:
    """A program of deploy/test/tools.sh or of the extra `deploy-test`."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    return found or _missing(f"the program {name}")


def module(name: str):
    """A Python package of the extra `deploy-test`."""
    try:
        return importlib.import_module(name)
    except ImportError:
        _missing(f"the Python package {name}")


def _missing(what: str):
    text = f"{what} is missing: deploy/test/tools.sh and pip install -e '.[deploy-test]' bring it"
    pytest.fail(text) if os.environ.get("CI") == "true" else pytest.skip(text)


def run(*command, **options) -> subprocess.CompletedProcess:
    """Run a program to its end and keep what it prints."""
    command = [str(part) for part in command]
    options |= {"capture_output": True, "text": True, "timeout": RUN_SECONDS}
    return subprocess.run(command, stdin=subprocess.DEVNULL, **options)


def passes(*command) -> str:
    """Assert that a checker is content, and return what it prints."""
    done = run(*command)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def enter(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    """Run the entry script, with nothing of this process's environment but what Python needs."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return run(sys.executable, ENTRYPOINT, *arguments, env=kept | env)


def serve_arguments(*arguments: str, **env: str):
    """How vLLM itself reads what the entry script would start, as a namespace."""
    done = enter(*arguments, "--print", **env)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    return parse_serve(words[words.index("serve") + 1 :])


def parse_serve(words: list[str]):
    """The arguments of `vllm serve`, read by vLLM's own parser."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser()).parse_args(words)


def pinned_vllm() -> str:
    """The version of vLLM that pyproject.toml asks for."""
    return re.search(r'gpu = \["vllm==([\d.]+)"\]', (ROOT / "pyproject.toml").read_text())[1]
