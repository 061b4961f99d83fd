"""The needle benchmark's VideoNSA part without servers: contenders, servers, tables."""

from __future__ import annotations

import json

import pytest
import torch
from needle import NEEDLE, grid, report, results, run, servers, tables
from needle import __main__ as command  # benchmarks
from needle.gates import forced
from safetensors.torch import load_file

CHECKPOINT = NEEDLE / "videonsa"


def test_the_grid_has_videonsa_its_branches_and_dense() -> None:
    options = command.parse_arguments(["--videonsa", "--list"])
    assert options.videonsa == CHECKPOINT and options.out.name == "needle_videonsa.json"
    made = grid.videonsa()
    assert [c.name for c in made.contenders] == [
        "dense", "videonsa", "videonsa cmp", "videonsa slc", "videonsa swa",
    ]  # fmt: skip
    assert {c.kind for c in made.contenders} == {"stock", "videonsa"}
    assert {1024, 2048, 4096, 8192} <= {*made.contenders[1].lengths}
    assert run.ordered(made.contenders)[0] is grid.DENSE
    with pytest.raises(SystemExit):
        command.parse_arguments(["--videonsa", "--quick"])


def test_its_server_leaves_all_to_the_checkpoint(tmp_path) -> None:
    server = servers.Server("videonsa", gates="slc", weights="0123abcd")
    arguments, env = servers.command(server, tmp_path, 4096)
    assert server.name == "videonsa-slc-0123abcd"
    assert "--hf-overrides" not in arguments and "--additional-config" not in arguments
    assert env["VLLM_PLUGINS"] == "adaspark,adaspark_http"


def test_forced_gates_are_in_the_weights(tmp_path) -> None:
    folder = forced(CHECKPOINT, "swa", tmp_path / "swa")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["VideoNSAForConditionalGeneration"]
    trained, changed = (load_file(path / "model.safetensors") for path in (CHECKPOINT, folder))
    assert {*trained} == {*changed}
    for name, weight in trained.items():
        assert torch.equal(weight, changed[name]) == ("g_proj_2" not in name), name
    bias = changed["model.layers.0.self_attn.g_proj_2.bias"].view(-1, 3) / 0.3
    gates = torch.sigmoid(bias.float())
    torch.testing.assert_close(gates, torch.tensor([0.0, 0.0, 1.0]).expand_as(gates))
    assert (folder / "tokenizer.json").exists()


def test_attention_is_all_that_is_neither_projection_nor_ffn() -> None:
    executed = {"qkvo": 50, "ffn": 30, "text": 4, "cmp": 3, "slc": 2, "swa": 1, "gates": 5}
    executed["total"] = sum(executed.values())
    usage = {"flops": {"executed": executed, "dense": {"attention": 60}}}
    assert run.attention_share(usage) == 15 / 60
    assert run.attention_share(None) is None


@pytest.fixture
def result() -> dict:
    """VideoNSA is right, its window alone is wrong, and did not run at 16K tokens."""
    rows = []
    for contender in grid.videonsa().contenders:
        for tokens in contender.lengths:
            rows += [
                {
                    "contender": contender.name,
                    "skill": skill,
                    "haystack": "calm",
                    "tokens": tokens,
                    "depth": 0.5,
                    "flops_ratio": 0.7,
                    "attention_flops": None if contender.kind == "stock" else 0.25,
                    "correct": int(contender.name != "videonsa swa"),
                    "total": 1,
                    "video": video,
                    "frame": "112×112",
                    "parts": 1,
                }
                for video in range(2)
                for skill in tables.scenes.SKILLS
            ]
    return {
        "series": "videonsa",
        "date": "2030-01-02T03:04:05",
        "command": "python -m benchmarks.needle --videonsa",
        "commit": "abc",
        "checkpoint": {"path": "x", "sha256": "0" * 64, "config": {"num_hidden_layers": 6}},
        "videonsa": results.videonsa(CHECKPOINT),
        "machine": {"processor": "P", "cores": 2, "memory_gib": 4},
        "versions": {"vllm": "1", "torch": "2", "vllm-adaspark": "3"},
        "videos_per_cell": 2,
        "rows": rows,
    }


def test_its_tables_fill_their_own_places(result, tmp_path) -> None:
    page = tmp_path / "quality.md"
    before = report.PAGE.read_text()
    report.write(result, page)
    text = page.read_text()
    assert all(f"<!-- videonsa: {name} -->\n" in text for name in tables.VIDEONSA_TABLES)
    assert "| videonsa swa | – | 0.0 % (25 %) | – | – | – |" in text
    assert "| dense | 100.0 % (100 %) |" in text
    assert "-100.0 [-100.0, -100.0]" in text
    assert "`examples/needle/videonsa`" in text
    needle = "<!-- needle: lengths -->"
    assert text.split(needle)[1][:300] == before.split(needle)[1][:300], "another run's"
