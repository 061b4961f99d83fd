"""The Dockerfiles: linted, on the pinned vLLM, not root, without secrets, and complete."""

from __future__ import annotations

import re
import shlex

import pytest
from deploy_tools import DEPLOY, ROOT, passes, pinned_vllm, run, tool

from vllm_adaspark import __version__

IMAGES = {
    "gpu": (ROOT / "Dockerfile", "vllm/vllm-openai"),
    "cpu": (DEPLOY / "docker" / "Dockerfile.cpu", "vllm/vllm-openai-cpu"),
}
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
    scripts = "deploy/docker/entrypoint.py deploy/docker/health.py /opt/vllm-adaspark/"
    assert scripts in values(image, "COPY")


def test_no_dependency_is_replaced_and_no_secret_is_kept(image):
    installs = [rest for rest in values(image, "RUN") if "pip install" in rest]
    assert len(installs) == 1 and "--no-deps" in installs[0]
    for kept in (*values(image, "ENV"), *values(image, "ARG")):
        assert not re.search(r"(?i)key|token|secret|passw", kept), kept
