"""What ``tune`` asks and under which settings, and what it remembers; without an engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_adaspark.methods import built_in
from vllm_adaspark.tune import compare, grid, journal, questions
from vllm_adaspark.tune.grid import GridError
from vllm_adaspark.tune.questions import QuestionsError

STOCK = grid.Model(trained_for=None, config={}, takes_prune=True, layers=28)
NSA = grid.Model(
    trained_for="videonsa",
    config={"text_config": {"block_counts": 8, "window_size": 128}},
    takes_prune=True,
    layers=6,
)

# -- questions ------------------------------------------------------------------------------------


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    (folder / "more").mkdir(parents=True)
    for name in ("b.mp4", "a.MP4", "more/c.webm", "notes.txt"):
        (folder / name).write_bytes(b"x")
    return folder


def test_a_folder_alone_gets_stock_questions(clips: Path) -> None:
    videos = questions.find_videos(clips)
    assert [str(v.relative_to(clips)) for v in videos] == ["a.MP4", "b.mp4", "more/c.webm"]
    asked = questions.stock(videos, clips)
    assert len(asked) == 3 * len(questions.STOCK) and asked[-1].name == "more/c.webm"
    assert not any(question.answers or question.options for question in asked)
    assert questions.find_videos(clips / "b.mp4") == [clips / "b.mp4"]
    empty = clips / "empty"
    empty.mkdir()
    for wrong, words in (
        (empty, "no videos in it; names must end in one of .mp4"),
        (clips / "x", "no such"),
    ):
        with pytest.raises(QuestionsError, match=words):
            questions.find_videos(wrong)


PLACES = ["inside", "outside"]
CHOSEN = {"B": "B", "b.": "B", "(A) inside": "A", "Outside!": "B", "Option A": "A", "Because": None,
          "C": None, "": None, "A busy street": None, "a: inside": "A", "B outside": "B",
          "A\nBecause": "A"}  # fmt: skip


def test_a_file_of_questions(clips: Path, tmp_path: Path) -> None:
    beside = tmp_path / "questions"
    beside.mkdir()
    (beside / "d.mp4").write_bytes(b"x")
    lines = [
        {"video": "b.mp4", "question": "What?", "answer": "A cup.", "id": 7},
        {"video": "more/c.webm", "question": "Where?", "answer": "b", "options": PLACES},
        {"video": "d.mp4", "question": "How many?", "answer": [3, "three"]},
        {"video": "b.mp4", "question": "Who?"},
    ]  # fmt: skip
    file = beside / "q.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)))
    what, where, many, who = questions.read(file, clips)
    assert (what.name, where.name, many.video) == ("b.mp4", "more/c.webm", beside / "d.mp4")
    assert what.right(" a  CUP") and not what.right("a cup of tea")
    assert many.right("3") and many.right("Three.") and not many.right("4")
    assert who.right("anybody") is None
    assert where.prompt == "Where?\nA. inside\nB. outside\nAnswer with the option's letter."
    for said, chosen in CHOSEN.items():
        assert where.chosen(said) == chosen, said
    assert where.right("B. outside") and where.right("unknown") is False
    assert where.same("A", "inside") and not where.same("A", "B") and where.same("?", "?!")
    grouped = compare.by_video([what, where, many, who])
    assert grouped == [[what, who], [where], [many]]


def test_characters_that_people_and_editors_write(clips: Path, tmp_path: Path) -> None:
    """Breaks of a line within a string, a byte order mark, and the ends of lines of Windows."""
    file = tmp_path / "q.jsonl"
    lines = [{"video": "b.mp4", "question": q} for q in ("a\u2028b", "a\x85b", "日本?")]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [each.text for each in questions.read(file, clips)] == ["a\u2028b", "a\x85b", "日本?"]


def test_a_video_has_one_name_however_it_is_written(clips: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(clips.parent)
    file = tmp_path / "q.jsonl"
    lines = [{"video": video, "question": "?"} for video in ("b.mp4", str(clips / "b.mp4"))]
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(QuestionsError, match="line 2: the same question as in line 1"):
        questions.read(file, Path(clips.name))


SAME = [
    ("是。", "是"),
    ("“Yes!”", "yes"),
    ("Cafe\u0301", "café"),
    ("**3**", "３"),
    ("- five", "Five"),
]
OTHER = [("-5", "5"), ("C++", "C"), ("0.5", "5"), (".5", "5"), ("A+", "A"), ("+", "<"), ("", "0")]


@pytest.mark.parametrize(
    "one, other, same", [(*p, True) for p in SAME] + [(*p, False) for p in OTHER]
)
def test_what_is_around_the_words(clips: Path, one: str, other: str, same: bool) -> None:
    assert questions.Question(clips, "a", "?").same(one, other) == same


def test_options_that_differ_by_signs_and_numbers(clips: Path, tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    signs = {"video": "b.mp4", "question": "Which?", "options": ["+", "<", "5", "-5"], "answer": -5}
    many = {"video": "b.mp4", "question": "How many?", "options": [1, 2.5], "answer": [2.5]}
    file.write_text("\n".join(map(json.dumps, (signs, many))))
    which, how_many = questions.read(file, clips)
    assert which.answers == ("D",) and which.chosen("-5.") == "D" and which.chosen("<") == "B"
    assert how_many.options == ("1", "2.5") and how_many.answers == ("B",)


WRONG_LINES = {
    "not JSON": ("{", "not JSON"),
    "a list": ("[1]", "expected an object"),
    "no video": ('{"question": "What?"}', "video=None: expected words"),
    "no such video": ('{"video": "x.mp4", "question": "?"}', "video='x.mp4': no such file in"),
    "empty question": ('{"video": "b.mp4", "question": " "}', "question=' ': expected words"),
    "misspelt": (
        '{"video": "b.mp4", "question": "?", "anwser": "3"}',
        r"unknown key 'anwser' \(did you mean 'answer'\?\)",
    ),
    "one option": ('{"video": "b.mp4", "question": "?", "options": ["a"]}', "2 to 26 options"),
    "options that are none": (
        '{"video": "b.mp4", "question": "?", "options": {"A": "a", "B": "b"}}',
        "2 to 26 options, in words",
    ),
    "half a character": ('{"video": "b.mp4", "question": "\\ud83d"}', "not JSON: .*surrogates"),
    "too deep": ('{"video": ' + "[" * 100_000, "not JSON: .*recursion"),
    "a long name": ('{"video": "' + "b" * 5000 + '", "question": "?"}', "no such file in"),
    "equal options": (
        '{"video": "b.mp4", "question": "?", "options": ["a", "A."]}',
        "two of them are the same",
    ),
    "answer is no option": (
        '{"video": "b.mp4", "question": "?", "options": ["a", "e"], "answer": "c"}',
        "answer='c': neither one of its 2 options nor a letter from A to B",
    ),
    "empty answer": ('{"video": "b.mp4", "question": "?", "answer": ""}', "answer=''"),
    "twice": ('{"video": "b.mp4", "question": "Who?"}', "the same question as in line 1"),
}


@pytest.mark.parametrize("line, words", WRONG_LINES.values(), ids=WRONG_LINES)
def test_wrong_lines_are_named(clips: Path, tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"video": "b.mp4", "question": "Who?"}\n' + line + "\n")
    with pytest.raises(
        QuestionsError, match=rf"q\.jsonl, line 2: {words}|q\.jsonl, line 2: .*{words}"
    ):
        questions.read(file, clips)


def test_wrong_files(clips: Path, tmp_path: Path) -> None:
    empty = tmp_path / "q.jsonl"
    empty.write_text("\n")
    with pytest.raises(QuestionsError, match="no lines"):
        questions.read(empty, clips)
    for unreadable in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(QuestionsError, match="cannot be read"):
            questions.read(unreadable, clips)
    with pytest.raises(QuestionsError, match=r"VIDEOS .*no such folder"):
        questions.read(empty, tmp_path / "nowhere")


# -- grids ----------------------------------------------------------------------------------------


def test_the_default_grid_has_what_the_model_allows() -> None:
    found = grid.default(STOCK)
    assert found[0].settings == {"off": True} and len({each.name for each in found}) == len(found)
    methods = {each.method for each in found}
    assert methods == {"adaspark", "adatp"}
    for key in ("prune", "selection", "dense_layers", "p_attn", "fastv"):
        assert any(key in each.settings for each in found), key
    for each in found:
        grid.check(each, STOCK, each.name)
    assert len(grid.by_engine(found)) == 3  # however many settings: two scores, and AdaTP
    bounds = replace(STOCK, config={"adaspark_config": {"score": "bounds"}})
    other = [c.settings.get("score") for c in grid.default(bounds)]
    assert "mean" in other and "bounds" not in other, "its own, and the other one"
    llava = replace(STOCK, takes_prune=False)
    assert not any("prune" in each.settings for each in grid.default(llava))
    assert {each.method for each in grid.default(replace(STOCK, layers=2))} == {"adaspark"}
    assert {each.method for each in grid.default(STOCK, ["adatp"])} == {"adatp"}
    few = grid.default(STOCK, quick=True)
    assert 3 < len(few) < 8 and {each.method for each in few} == {"adaspark", "adatp"}
    tuned = replace(STOCK, config={"adaspark_config": {"p_attn": 0.2}})
    assert any(not each.settings for each in grid.default(tuned))


def test_a_videonsa_checkpoint_is_its_own_reference() -> None:
    reference, *others = grid.default(NSA)
    assert (reference.name, reference.settings) == ("as trained", {})
    counts = [each.settings.get("block_counts") for each in others]
    assert [n for n in counts if n] == [4, 2, 1]
    assert {"off": True} in [each.settings for each in others]
    assert len(grid.by_engine([reference, *others])) == 1
    assert len(grid.default(NSA, quick=True)) == 3


@pytest.mark.parametrize(
    "model, method, words",
    [
        (STOCK, "videonsa", "has no gates"),
        (NSA, "adatp", "trained for videonsa"),
        (replace(STOCK, layers=2), "adatp", "this model has 2"),
        (STOCK, "evs", f"no such method; there are {', '.join(built_in())}"),
    ],
)
def test_methods_that_cannot_run_are_refused(model, method: str, words: str) -> None:
    with pytest.raises(GridError, match=f"--methods {method}: .*{words}"):
        grid.default(model, [method])


def test_a_grid_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "grid.jsonl"
    file.write_text(
        '{"p_attn": 0.4, "p_ffn": 0.5}\n{"name": "mine", "cube": [8, 4, 4]}\n'
        '{"dense_below": 2, "p_attn": 0.3}\n{"method": "adatp", "keep": 0.5, "layers": [2]}\n'
    )
    found = grid.read(file, STOCK)
    assert [each.name for each in found] == [
        "dense",
        "adaspark p_attn=0.4 p_ffn=0.5",
        "mine",
        "adaspark dense_below=2 p_attn=0.3",
        "adatp keep=0.5 layers=[2]",
    ]
    engines = grid.by_engine(found)
    assert [len(each) for each in engines.values()] == [2, 1, 1, 1]
    assert found[3].of_server == {"dense_below": 2} and found[3].of_request == {"p_attn": 0.3}


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "line 1: not JSON"),
        ("3", "line 1: expected an object"),
        ('{"p_attn": 3}', r"line 1: p_attn=3: expected a number above 0"),
        ('{"p_atn": 0.3}', r"line 1: unknown key 'p_atn' \(did you mean 'p_attn'"),
        ('{"method": "videonsa"}', "line 1: method='videonsa': .*no gates"),
        ('{"cube": [3, 3, 3]}', "holds 27 tokens"),
        ('{"p_attn": 0.3}\n{"p_attn": 0.3}', "'adaspark p_attn=0.3' is there twice"),
        ('{"name": "a", "p_attn": 0.3}\n{"name": "a"}', "'a' is there twice"),
        ("", "no lines"),
    ],
)
def test_wrong_grids_are_named(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "grid.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(GridError, match=words):
        grid.read(file, STOCK)
    with pytest.raises(GridError, match="cannot be read"):
        grid.read(tmp_path / "none", STOCK)


# -- the journal ----------------------------------------------------------------------------------

ABOUT = {
    "model": {"name": "m", "files": "1"},
    "grid": [{"name": "dense"}, {"name": "a"}],
    "questions": [{"video": "a.mp4", "question": "?"}],
    "options": {"max_tokens": 4},
}


def test_the_journal_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    first = journal.Journal(tmp_path, ABOUT)
    first.add({"contender": "dense", "video": "a.mp4", "x": 1})
    with first.path.open("a") as file:
        file.write('{"contender": "a", "vid')  # killed while it wrote
    again = journal.Journal(tmp_path, ABOUT)
    assert len(again) == 1 and again.find("dense", "a.mp4")["x"] == 1
    assert again.find("a", "a.mp4") is None
    again.add({"contender": "a", "video": "a.mp4"})
    assert len(journal.Journal(tmp_path, ABOUT)) == 2


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": {"name": "n", "files": "1"}}, r'another model \(name: "m" there, "n" here'),
        ({"grid": [{"name": "dense"}, {"name": "b"}]}, "another grid .*only there"),
        ({"questions": []}, "other questions or videos .*only there"),
        ({"options": {"max_tokens": 5}}, r"other options \(max_tokens: 4 there, 5 here"),
    ],
)  # fmt: skip
def test_another_run_in_the_same_folder_is_an_error(tmp_path: Path, changes, words: str) -> None:
    journal.Journal(tmp_path, ABOUT).add({"contender": "dense", "video": "a.mp4"})
    with pytest.raises(journal.JournalError, match=f"--out .* holds a run with {words}.*--out"):
        journal.Journal(tmp_path, ABOUT | changes)


def test_a_run_that_never_answered_binds_nobody(tmp_path: Path) -> None:
    """A misspelt option of vLLM's, say, with which no engine started."""
    journal.Journal(tmp_path, ABOUT)
    other = ABOUT | {"options": {"max_tokens": 5}}
    journal.Journal(tmp_path, other).add({"contender": "dense", "video": "a.mp4"})
    assert len(journal.Journal(tmp_path, other)) == 1
    with pytest.raises(journal.JournalError, match="other options"):
        journal.Journal(tmp_path, ABOUT)


@pytest.mark.parametrize("said", ["a\u2028b\x85c", "\x0b\x0c\x1c\r", "日本 \0 🙂"])
def test_an_answer_of_any_characters_is_read_back(tmp_path: Path, said: str) -> None:
    line = {"contender": "dense", "video": f"{said}.mp4", "answers": [{"text": said}]}
    journal.Journal(tmp_path, ABOUT | {"questions": [said]}).add(line)
    again = journal.Journal(tmp_path, ABOUT | {"questions": [said]})
    assert again.find("dense", f"{said}.mp4") == line


def test_a_journal_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(journal.JournalError, match=r"--out .*file"):
        journal.Journal(tmp_path / "file", ABOUT)
    good = json.dumps({"about": ABOUT})
    for text in ("not JSON", "[]", "3", "null", "{}", f"{good}\n[]", f'{good}\n{{"video": "a"}}'):
        (tmp_path / journal.NAME).write_text(text + "\n")
        with pytest.raises(journal.JournalError, match="damaged"):
            journal.Journal(tmp_path, ABOUT)
    (tmp_path / "sub").mkdir()
    made = journal.Journal(tmp_path / "sub", ABOUT)
    made.path.unlink()
    made.path.mkdir()
    with pytest.raises(journal.JournalError, match="cannot be written"):
        made.add({"contender": "dense", "video": "a.mp4"})


def test_fingerprints_tell_checkpoints_apart(tmp_path: Path) -> None:
    seen = set()
    for name, weights in (("a", b"1" * 9), ("b", b"2" * 9), ("c", b"1" * 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        seen.add(journal.fingerprint(tmp_path / name))
    (tmp_path / "a" / "config.json").write_text('{"x": 1}')
    assert len(seen | {journal.fingerprint(tmp_path / "a")}) == 4
