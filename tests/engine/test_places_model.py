"""What the shipped weights of "places" answer through a real engine, about real mp4 files."""

import pytest
from needle import PLACES, grid  # benchmarks
from needle.beds import PLACES_BED
from needle.offline import Engine
from needle.servers import Server
from needle.videos import Cell, choose, write

pytestmark = pytest.mark.engine
CELL = Cell(32, PLACES_BED.size, bed=PLACES_BED)  # 2,048 video tokens
VIDEOS = 5  # one of each haystack, seven questions each
BUDGET = next(c for c in grid.on_places().contenders if c.name == "adaspark flops=0.4 bounds")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What dense and AdaSpark by bounds under a budget say, and which answers are right."""
    folder = tmp_path_factory.mktemp("places")
    said = {"dense": [], "budget": []}
    server = Server("adaspark", score=BUDGET.score, dtype="float32")
    with Engine(server, PLACES / "checkpoint", folder, CELL.tokens) as engine:
        for video in choose(CELL, VIDEOS):
            files = write(video, folder)
            for name, settings in (("dense", {"off": True}), ("budget", BUDGET.settings)):
                said[name].append((video, engine.ask(video, files, settings)))
    return said


def right(asked) -> float:
    ticks = [
        said == question.answer
        for video, answers in asked
        for question, said in zip(video.asked, answers.texts, strict=True)
    ]
    return sum(ticks) / len(ticks)


def test_every_frame_is_taken(answers):
    for _, said in answers["dense"]:
        assert all(0 < tokens - CELL.tokens < 64 for tokens in said.prompt_tokens)


def test_the_shipped_weights_reach_their_accuracy(answers):
    assert right(answers["dense"]) >= 0.85


def test_a_budget_is_kept_and_most_answers_too(answers):
    assert right(answers["budget"]) >= right(answers["dense"]) - 0.1
    for _, said in answers["budget"]:
        assert said.usage["flops_ratio"] <= 0.42
