"""The test bed "places": scenes, drawing, and what training batches hold."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
for folder in ("places", "needle"):
    if str(EXAMPLES / folder) not in sys.path:
        sys.path.append(str(EXAMPLES / folder))

import clues  # noqa: E402
import grounds  # noqa: E402
import marks  # noqa: E402
import network  # noqa: E402
import places  # noqa: E402
import prompts  # noqa: E402
import tower  # noqa: E402
import tracks  # noqa: E402
import train_reader  # noqa: E402
import train_tower  # noqa: E402
import windows  # noqa: E402
from batches import Words  # noqa: E402
from places import HAYSTACKS, HELD_OUT_SEEDS, SKILLS, WINDOW, Mark, Scene  # noqa: E402

PLACES = EXAMPLES / "places/checkpoint"


def scenes(count: int, patches: int = 32):
    return [places.make(seed, patches, HAYSTACKS[seed % 5]) for seed in range(count)]


def test_scenes_are_well_formed_and_have_all_skills():
    texts, seen = set(places.every_question_text()), set()
    for scene in scenes(200):
        assert places.make(scene.seed, scene.patches, scene.haystack) == scene
        assert len({mark.window for mark in scene.marks}) == len(scene.marks)
        for mark in scene.marks:
            assert 1 <= mark.start < mark.end <= scene.patches
            assert mark.side <= WINDOW and (mark.kind == "pop") == (mark.length == 1)
        for question in places.questions(scene):
            seen.add(question.skill)
            assert question.text in texts
            if question.skill != "count":
                assert question.answer == str(scene.marks[question.needles[-1]].digit)
    assert seen == set(SKILLS)


def test_the_onset_does_not_give_the_digit_away():
    table = np.zeros((len(places.KINDS), 10))
    for scene in scenes(1500):
        for mark in scene.marks:
            if not mark.board:
                table[places.KINDS.index(mark.kind), mark.digit] += 1
    shares = table / table.sum(1, keepdims=True)
    assert (table.sum(1) > 300).all() and abs(shares - 0.1).max() < 0.06


def test_order_is_asked_only_where_it_is_clear():
    first = Mark(0, 0, 1, "stay", 2, 4)
    second = Mark(5, 1, 2, "stay", 8, 4)
    third = Mark(10, 2, 3, "stay", 9, 6)
    scene = Scene(0, 32, "calm", (first, second, third))
    assert places.previous(scene, 1) == 0 and places.following(scene, 0) == 1
    assert places.previous(scene, 2) is None  # the second is still there
    lasting = replace(first, length=20)
    assert places.previous(replace(scene, marks=(lasting, second)), 1) is None
    wanted = {
        "Which digit came before the green card?": "1",
        "Which digit came after the red card?": "2",
    }
    asked = {q.text: q.answer for q in places.questions(scene) if q.skill in ("before", "after")}
    assert asked == wanted


@pytest.mark.parametrize(
    "arguments, message",
    [((-1, 32, "calm"), "seed=-1"), ((0, 3, "calm"), "patches=3"), ((0, 32, "busy"), "haystack=")],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        places.make(*arguments)


def test_a_mark_changes_its_window_while_it_is_there_and_nothing_else():
    mark = Mark(6, 0, 7, "near", 3, 6, change=3, side=30)
    empty = Scene(HELD_OUT_SEEDS[3], 12, "calm", ())
    without, with_mark = (
        grounds.frames(scene).astype(int) for scene in (empty, replace(empty, marks=(mark,)))
    )
    changed = (without != with_mark).any(-1)  # [frames, height, width]
    window = np.zeros_like(changed)
    window[6:18, WINDOW : 2 * WINDOW, 2 * WINDOW : 3 * WINDOW] = True
    assert changed.any((1, 2)).tolist() == window.any((1, 2)).tolist()
    assert not (changed & ~window).any()
    sizes = changed.sum((1, 2))[6:18:2]
    assert (np.diff(sizes[:4]) > 0).all()  # comes nearer


def test_a_letter_turns_into_the_digit_and_a_fading_mark_grows_stronger():
    black = np.zeros((16, WINDOW, WINDOW, 3), np.float32)
    for kind in ("turn", "fade"):
        frames = black.copy()
        marks.put(np.random.default_rng(0), frames, Mark(0, 3, 8, kind, 0, 8, change=4, side=36))
        parts = frames[::2]
        if kind == "turn":
            assert (parts[0] == parts[3]).all() and (parts[4] == parts[7]).all()
            assert (parts[3] != parts[4]).any()
        else:
            strength = parts.sum((1, 2, 3))
            assert (np.diff(strength[:5]) > 0).all() and strength[5] == strength[7]


@pytest.fixture(scope="module")
def model():
    return tower.build(layers=6).eval()


def test_windows_do_not_see_each_other_and_the_fast_pass_is_hugging_faces(model):
    frames = grounds.frames(places.make(5, 12, "swarm"))[:4]
    tokens = tower.encode_frames(model.model.visual, frames).float()
    import forward

    pixels = forward.pixels(frames).flatten(0, 1)
    whole = model.model.visual(pixels, grid_thw=torch.tensor([[2, 16, 16]])).pooler_output
    in_order = tower.in_order(tokens)
    error = (in_order - whole.view_as(in_order)).norm() / whole.norm()
    assert error < 0.01  # bf16
    changed = frames.copy()
    changed[:, :WINDOW, WINDOW : 2 * WINDOW] //= 2
    differs = tower.encode_frames(model.model.visual, changed).float() != tokens
    assert differs.any(-1).any(-1).tolist() == [[w == 1 for w in range(16)]] * 2


def test_training_windows_say_what_they_show():
    rng = np.random.default_rng(0)
    frames, digits, colours = windows.batch(rng, windows.worlds(1, 4), 256, windows.Stage())
    assert frames.shape == (256, 2, WINDOW, WINDOW, 3) and frames.dtype == np.uint8
    told = (digits >= 0) & (digits < 10)
    assert told.any(1).float().mean() > 0.3
    assert (colours[told] < 8).all()  # a digit that counts is on a card
    letters = (digits == 10) & (colours >= 0) & (colours < 8)
    assert letters.any()
    target = windows.content(frames)
    assert target.shape == (256, 4, 96) and 0.3 < target.std() < 3


@pytest.fixture
def calm(model, monkeypatch):
    """Tracks of three short calm videos, of heads that always name the mark where it is.

    Trained heads nearly do.
    """
    monkeypatch.setattr(tracks, "PATCHES", 16)

    def everywhere(heads, tokens, mark, corner):
        names = torch.zeros(len(tokens), 4, dtype=torch.bool)
        names[mark.start : mark.end] = torch.from_numpy(
            marks.shares(*corner, mark.side).ravel() > 0
        )
        return names

    monkeypatch.setattr(tracks, "naming", everywhere)
    monkeypatch.setattr(tracks, "HAYSTACKS", ("calm",))
    return tracks.make(model, tower.make_heads(), 7, 3)


def test_composed_videos_hold_what_their_scene_says(model, calm):
    words = Words(network.tokenizer(places.every_question_text()), places.every_question_text())
    rng = np.random.default_rng(0)
    for kept in (None, 200):
        batch = prompts.make(rng, model, words, calm, [1, 2, 3], 14, 6, kept=kept, haystack="calm")
        before = len(words.before_video)
        assert batch.prefix.shape[:2] == (3, before + (kept or 14 * 64))
        for video, (scene, names) in enumerate(zip(batch.scenes, batch.naming)):
            assert len(names) == len(scene.marks) > 0
            when = batch.prefix_at[0, video, before:] - before
            for mark, own in zip(scene.marks, names[:, before:]):
                assert own.any()
                patches = when[own] // 2
                assert mark.start <= patches.min() and patches.max() < mark.end
                rows, columns = (
                    batch.prefix_at[axis, video, before:][own] - before for axis in (1, 2)
                )
                assert (rows // 2 * 4 + columns // 2 == mark.window).all()
        for video, token, kind, mark in clues.links(batch).tolist():
            if kind == clues.BEFORE:
                assert batch.naming[video][mark, :token].any()


def test_training_goes_on_from_a_checkpoint(tmp_path, calm, monkeypatch):
    """Its tower stays, and only heads have learnt when its language model goes on."""
    monkeypatch.setattr(train_tower, "BATCH", 16)
    monkeypatch.setattr(train_reader.Trainer, "report", lambda self: None)
    few = train_reader.Phase(2, (12, 12), 2, 4, (1e-2, 1e-2), 48)
    monkeypatch.setattr(train_reader, "HEADS_ALONE", few)
    weights = train_tower.weights_of(PLACES)
    train_tower.train(tmp_path / "tower.pt", steps=1, start=PLACES)
    bank = dict.fromkeys(HAYSTACKS, calm["calm"])
    monkeypatch.setattr(train_reader, "banks", lambda *_: (bank, bank))
    torch.manual_seed(0)
    fresh = clues.make_heads(tower.HIDDEN).state_dict()
    torch.manual_seed(0)
    given = tmp_path / "tower.pt", tmp_path / "reader.pt", "cpu", 1, PLACES, 100
    trainer = train_reader.Trainer(*given)
    for model in (trainer.model, trainer.average.module):
        assert all(torch.equal(weight, weights[n]) for n, weight in model.state_dict().items())
    assert any(not torch.equal(w, fresh[n]) for n, w in trainer.heads.state_dict().items())
    trainer.train(few, 0)
    assert trainer.step == 102
    assert not torch.equal(trainer.model.lm_head.weight, weights["lm_head.weight"])
    assert train_reader.Trainer(*given).step == 102, "the file counts, once it is there"
    train_tower.train(tmp_path / "other.pt", steps=1)
    with pytest.raises(ValueError, match="must have the tower"):
        train_reader.Trainer(tmp_path / "other.pt", tmp_path / "new.pt", "cpu", 1, PLACES, 100)


def test_clues_of_questions():
    ask = places.Question("larger", "Which digit is larger, top left or bottom right?", "9", (), ())
    known = clues.of_question(ask)
    assert (known["one"], known["other"], known["asked"]) == (0, 3, 8)
    ask = places.Question("after", "Which digit came after the gray board?", "1", (), ())
    assert clues.of_question(ask) == {"skill": 4, "asked": 7, "one": 4, "other": 4}


def test_a_mark_counts_from_when_it_can_be_told():
    """The second one begins to fade in first, and is told last; another colour does not count."""
    begin = Mark(0, 3, 1, "pop", 2, 1)
    slow = Mark(4, 3, 2, "fade", 3, 20, change=8)
    quick, other = Mark(8, 3, 3, "pop", 5, 1), Mark(12, 6, 4, "pop", 4, 1)
    scene = Scene(0, 32, "calm", (begin, slow, other, quick))
    names = torch.zeros(4, 10, dtype=torch.bool)
    for row, tokens in enumerate(([1], [6, 8], [3], [5])):
        names[row, tokens] = True
    counted = [clues.named_before(scene, names, index).tolist() for index in range(4)]
    assert counted[0] == [0, 0, 0, 0, 0, 1, 2, 2, 2, 2]
    assert counted[1] == [0, 1, 1, 1, 1, 2, 2, 2, 2, 2]
    assert counted[2] == [0] * 10
    assert counted[3] == [0, 1, 1, 1, 1, 1, 2, 2, 2, 2]


def test_where_marks_of_a_colour_look():
    """At others before them; then at those that saw another still; else at the text in front."""
    marks = [Mark(window, 3, digit, "pop", 2 * digit, 1) for digit, window in enumerate((0, 5, 10))]
    names = torch.zeros(3, 12, dtype=torch.bool)
    for row, tokens in enumerate(([3, 8], [4], [6, 9])):  # the first is seen again after the second
        names[row, tokens] = True
    batch = SimpleNamespace(
        scenes=[Scene(0, 32, "calm", tuple(marks))], naming=[names], video_from=2
    )
    looks = {
        (kind, at): clues._target(batch, 0, at, kind, mark).nonzero()[:, 0].tolist()
        for _, at, kind, mark in clues.links(batch).tolist()
    }
    text = [0, 1]
    again, third, before = clues.AGAIN, clues.THIRD, clues.BEFORE
    assert looks.pop((before, 4)) == [3, 8] and looks.pop((before, 9)) == [4]
    assert looks == {
        (again, 3): text, (third, 3): text,
        (again, 4): [3], (third, 4): text,
        (again, 6): [3, 4], (third, 6): [4],
        (again, 8): [4, 6], (third, 8): [6],
        (again, 9): [3, 4, 8], (third, 9): [4, 8],
    }  # fmt: skip
    ask = places.Question("count", "How many gray cards are there?", "3", (0, 1, 2), (0, 1, 2))
    assert clues._about(batch, 0, ask).nonzero()[:, 0].tolist() == [
        6,
        8,
        9,
    ]  # all were seen by then
    ask = replace(ask, skill="place", about=(0,))
    assert clues._about(batch, 0, ask).nonzero()[:, 0].tolist() == [3, 8]


def test_rotary_frequencies_are_dealt_out_as_vllm_does(model):
    """Otherwise the columns of a frame would be one: the slowest frequencies are the width's."""
    import forward
    from vllm.model_executor.layers.rotary_embedding.mrope import apply_interleaved_rope

    decoder = model.model.language_model
    rope = decoder.config.rope_parameters
    assert rope["mrope_interleaved"]
    at = torch.randint(0, 200, (3, 2, 7), generator=torch.Generator().manual_seed(0))
    angles = at[..., None].float() * decoder.rotary_emb.inv_freq
    for mine, wave in zip(forward._text_rope(decoder, at, torch.float32), (torch.cos, torch.sin)):
        theirs = apply_interleaved_rope(wave(angles), rope["mrope_section"])
        assert torch.equal(mine[:, 0], torch.cat([theirs, theirs], -1))


def test_a_track_that_is_too_long_is_cut():
    def track(mark, value):
        there = torch.zeros(16, 4, dtype=torch.bool)
        there[mark.start : mark.end] = True
        return tracks.Track(torch.full((16, 4, 8), value).bfloat16(), mark, there)

    board = Mark(0, 2, 7, "stay", 3, 10, side=WINDOW, board=True)
    faded = Mark(0, 1, 4, "fade", 2, 9, change=4)
    plain = tracks.Track(torch.zeros(16, 4, 8).bfloat16())
    bank = tracks.Tracks([plain], {(2, True): [track(board, 1.0)], (1, False): [track(faded, 2.0)]})
    wanted = (replace(board, window=5, start=6, length=4), replace(faded, window=9, length=4))
    scene = Scene(0, 12, "calm", wanted)
    tokens, became, names = tracks.compose(np.random.default_rng(0), bank, scene)
    assert [mark.digit for mark in became.marks] == [7], "a fade that cannot end is left out"
    assert (became.marks[0].start, became.marks[0].length) == (6, 4)
    assert names[0].any(1).nonzero()[:, 0].tolist() == [6, 7, 8, 9]
    assert (tokens[10:] == 0).all() and (tokens[6:10] == 1).any()
