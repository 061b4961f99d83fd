"""Documents: links lead somewhere, settings are those there are, what deployment.md shows works."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex

import pytest
from deploy_tools import DEPLOY, ENTRYPOINT, ROOT, serve_arguments

from vllm_adaspark.methods import built_in, settings_class
from vllm_adaspark.settings import Settings

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
TEXT = (ROOT / "docs" / "deployment.md").read_text()


def commands(program: str) -> list[list[str]]:
    """The document's commands of a program, as words; continued lines joined."""
    blocks = re.findall(r"(?m)(?:^    .*\n)+", TEXT.replace("\\\n", ""))
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(program)]


def anchors(page) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", page.read_text())
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(((?!https?:)[^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_that_pages_name_exist(page):
    """A module that was moved must not live on in the documents; bare names may lie anywhere."""
    folders = [ROOT, ROOT / "vllm_adaspark", page.parent]
    there = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    for name in re.findall(r"`([\w/.]*\w\.py)\b", page.read_text()):
        if "/" in name:
            assert any((folder / name).exists() for folder in folders), name
        else:
            assert name in there, name


def settings_of(method: str) -> dict[str, dataclasses.Field | None]:
    """The keys and words (None) of a method alone; of all of them for "every method"."""
    cls = Settings if method == "every method" else settings_class(method)
    known = {spec.name: spec for spec in dataclasses.fields(cls)} | dict.fromkeys(cls.words)
    return known if cls is Settings else {k: v for k, v in known.items() if k not in COMMON}


COMMON = settings_of("every method")


@pytest.mark.parametrize("method", ["every method", *built_in()])
def test_the_tables_of_settings_are_those_of_the_code(method):
    text = (ROOT / "docs" / "settings.md").read_text()
    _, _, section = text.partition(f"\n## Keys of {method}\n")
    table = section.partition("\n## ")[0]
    rows = dict(re.findall(r"(?m)^\| `(\w+)`([^|]*\| [^|]*)", table))
    known = settings_of(method)
    assert rows.keys() == known.keys(), f"docs/settings.md, ## Keys of {method}"
    for name, spec in known.items():
        if spec is None:
            continue
        who, _, default = rows[name].partition("|")
        default = default.strip().strip("`")
        assert default == ("none" if spec.default is None else plain(spec.default)), name
        request, checkpoint = spec.metadata["request"], spec.metadata["checkpoint"]
        told = {
            (True, True): "",
            (True, False): "(not in a checkpoint)",
            (False, True): "(not per request)",
            (False, False): "(operator only)",
        }
        assert who.strip() == told[request, checkpoint], name


def plain(value) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def test_every_file_named_exists():
    links = re.findall(r"\]\(((?!https?:)[^)#]+)", TEXT)
    paths = re.findall(r"(?:deploy|docs|tests|vllm_adaspark)/[\w./-]*\w", TEXT)
    assert len(paths) > 5
    for link in links:
        assert (ROOT / "docs" / link).exists(), link
    for path in paths:
        assert (ROOT / path).exists(), path


def test_commands_of_docker_run_reach_vllm():
    shown = 0
    for words in commands("docker run"):
        image = next((n for n, word in enumerate(words) if word.startswith("vllm-adaspark")), None)
        assert image is not None, words
        if "--entrypoint" in words[:image]:
            continue
        given = [words[n + 1] for n, word in enumerate(words[:image]) if word == "-e"]
        env = dict(item.split("=", 1) for item in given if "=" in item)
        args = serve_arguments(*words[image + 1 :], **env)
        assert args.model_tag.startswith("Qwen/")
        additional = args.additional_config or {}
        method = settings_class(additional.get("method", "adaspark"))
        method().override(additional.get("adaspark"))
        shown += 1
    assert shown >= 2


def test_every_variable_of_the_entry_script_is_told():
    for name in re.findall(r"(?m)^    ([A-Z][A-Z_]+)[ ,]", ENTRYPOINT.read_text()):
        assert name in TEXT, name


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("kubernetes/*/adaspark.json")), ids=str)
def test_settings_of_config_maps_are_valid(path):
    folder = path.parent.name
    method = folder if folder in built_in() else "adaspark"
    settings_class(method)().override(json.loads(path.read_text()))


def test_kubernetes_folders_and_secrets_told_are_those_used():
    applied = {words[3] for words in commands("kubectl apply -k")}
    folders = ("server", "adatp", "monitoring", "multi-node")
    assert applied == {f"deploy/kubernetes/{name}" for name in folders}
    (secret,) = [words for words in commands("kubectl create secret")]
    name, keys = secret[4], {word.split("=")[1] for word in secret if word.startswith("--from")}
    used = (DEPLOY / "kubernetes" / "server" / "deployment.yaml").read_text()
    assert f"name: {name}" in used
    assert keys == set(re.findall(r"key: ((?:api|hf)-\w+)", used))
