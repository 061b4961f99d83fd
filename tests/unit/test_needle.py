"""The needle model: its videos, its answers, its training code and the shipped checkpoint."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

NEEDLE = Path(__file__).resolve().parents[2] / "examples" / "needle"
sys.path.insert(0, str(NEEDLE))

import bank as banks  # noqa: E402
import batches  # noqa: E402
import evaluate  # noqa: E402
import footage  # noqa: E402
import forward  # noqa: E402
import haystack  # noqa: E402
import hints  # noqa: E402
import network  # noqa: E402
import scenes  # noqa: E402
import scoring  # noqa: E402
import train_language  # noqa: E402
import train_vision  # noqa: E402
import write_questions  # noqa: E402

CHECKPOINT = NEEDLE / "checkpoint"
GRID = (4, 4)
# Least accuracy at 1K tokens.
EXPECTED = dict.fromkeys(scenes.SKILLS, 0.8) | {"basic": 0.95}


@pytest.fixture(scope="module")
def model():
    return network.build().eval()


@pytest.fixture(scope="module")
def bank(model):
    return banks.make(model, 1, GRID, variants=2, distractors=8, clips=2)


@pytest.fixture(scope="module")
def words():
    return batches.Words(network.tokenizer())


def many_scenes(count: int = 60):
    for number in range(count):
        for patches in (4, 9, 16, 48, 200):
            yield scenes.make(scenes.HELD_OUT_SEEDS[number], patches, motion="calm")


# What is in a video, and what may be asked


def test_the_same_seed_gives_the_same_video():
    first, again = (scenes.make(7, 12, (84, 112), "busy") for _ in range(2))
    assert first == again
    assert np.array_equal(footage.frames(first), footage.frames(again))
    other = scenes.make(8, 12, (84, 112), "busy")
    assert not np.array_equal(footage.frames(first), footage.frames(other))


def test_each_event_has_a_patch_of_its_own():
    for scene in many_scenes():
        places = [event.at for event in scene.events]
        assert len(set(places)) == len(places)
        assert min(places) >= 0 and max(places) < scene.patches


def test_every_answer_follows_from_the_events():
    asked = set()
    for scene in many_scenes():
        for question in scenes.questions(scene):
            asked.add(question.skill)
            assert question.answer == answer_by_reading(scene, question.text), question
            assert question.text in scenes.every_question_text()
    assert asked == set(scenes.SKILLS)


def answer_by_reading(scene: scenes.Scene, text: str) -> str:
    """Work a question out from its words and the scene's events, step by step through time."""
    colours, signs = scenes.COLOUR_NAMES, scenes.SIGNS
    named = [word for word in text.strip("?").replace(",", "").split() if word in colours]
    colour = colours.index(named[0])
    seen, sign, previous, frame = [], None, None, None
    for event in scene.events:
        if event.kind == "sign":
            sign = signs[event.value]
        elif event.kind == "frame" and event.colour == colour:
            frame = event.value
        elif event.kind == "number":
            seen.append((event.colour, sign, event.value, previous))
            previous = event.value
    if "frame" in text:
        colour = frame
    mine = [card for card in seen if card[0] == colour]
    if text.startswith("How many"):
        return str(len(mine))
    if "first" in text:
        return next(colours[card[0]] for card in seen if colours[card[0]] in named)
    if "after" in text:
        wanted = text.strip("?").split()[-1]
        mine = [card for card in mine if card[1] == wanted]
    assert len(mine) == 1, f"{text}: {len(mine)} cards fit"
    return str(mine[0][3] if "before" in text else mine[0][2])


def test_a_sign_alone_does_not_give_the_marked_card_away():
    for scene in many_scenes():
        for question in scenes.questions(scene):
            if question.skill == "marked":
                colour = next(c for c in scene.of("number") if c.at == question.needles[-1]).colour
                assert sum(card.colour == colour for card in scene.of("number")) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1, "patches": 8}, r"seed=-1"),
        ({"seed": 0, "patches": 3}, r"patches=3.*at least 4"),
        ({"seed": 0, "patches": 8, "size": (100, 112)}, r"size=\(100, 112\).*multiples of 28"),
    ],
)
def test_a_scene_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        scenes.make(**arguments)


def test_other_bad_names_are_refused(model, bank, words):
    with pytest.raises(ValueError, match=r"motion='wild'.*calm"):
        haystack.clip(np.random.default_rng(0), (112, 112), 2, "wild")
    with pytest.raises(ValueError, match=r"ablation='x'.*none"):
        scoring.accuracy(model, words, bank, 8, 1, ablation="x")


@pytest.mark.parametrize("size", [(112, 112), (84, 140)])
def test_cards_survive_the_codec(tmp_path, size):
    scene = scenes.make(scenes.HELD_OUT_SEEDS[3], 24, size, "busy")
    drawn = footage.frames(scene)
    read = footage.read_mp4(footage.write_mp4(drawn, tmp_path / "video.mp4"))
    assert read.shape == drawn.shape == (48, *size, 3)
    for event in scene.of("number"):
        frames = slice(2 * event.at, 2 * event.at + 2)
        difference = np.abs(read[frames].astype(int) - drawn[frames]).mean()
        assert difference < 12, f"{difference} of 255 at patch {event.at}"


# Training


def test_training_never_sees_a_held_out_seed(model, bank, monkeypatch, tmp_path):
    """Runs steps of both stages and looks at every seed a generator is made from."""
    held_out = scenes.HELD_OUT_SEEDS
    assert held_out[0] not in scenes.TRAINING_SEEDS and held_out[-1] not in scenes.TRAINING_SEEDS
    scene_seeds, bank_seeds = [], []
    make_scene, make_bank = scenes.make, banks.make

    def recorded(seed, *rest):
        scene_seeds.append(seed)
        return make_scene(seed, *rest)

    def small_bank(model, seed, grid, *sizes):
        bank_seeds.append(seed)
        return make_bank(model, seed, grid, 2, 4, 2)

    monkeypatch.setattr(scenes, "make", recorded)
    monkeypatch.setattr(train_language, "GRIDS", train_language.GRIDS[:2])
    monkeypatch.setattr(banks, "make", small_bank)
    monkeypatch.setattr(train_vision, "PATCHES", 12)
    train_vision.train(tmp_path / "vision.pt", 1, "cpu")
    assert train_vision.FIRST_SEED + 10_000_000 in scenes.TRAINING_SEEDS
    trainer = train_language.Trainer(tmp_path / "vision.pt", tmp_path / "language.pt", "cpu")
    some = train_language.SCHEDULE[0], train_language.SCHEDULE[-1]  # without and with upper layers
    assert {phase.layers for phase in some} == {phase.layers for phase in train_language.SCHEDULE}
    small = {"steps": 1, "videos": 2, "asked": 4, "patches": (12, 16)}
    short = [dataclasses.replace(phase, **small) for phase in some]
    for phase in short:
        trainer.train(phase, 0)
    # Each video is picked of two candidates, then made.
    assert len(scene_seeds) == 3 * sum(phase.videos for phase in short)
    assert all(seed in scenes.TRAINING_SEEDS for seed in scene_seeds)
    videos = sum(phase.videos for phase in short)
    assert len(set(scene_seeds)) == 2 * videos, "a scene was trained on twice"
    *training, of_report = bank_seeds
    assert all(seed in scenes.TRAINING_SEEDS for seed in training)
    assert of_report in held_out
    last = sum(phase.steps for phase in train_language.SCHEDULE) * train_language.SEEDS_A_STEP
    assert last < train_vision.FIRST_SEED, "scenes would reach the pictures' seeds"

    # Stopped and begun again, it is where it was; from a checkpoint, where that is.
    again = train_language.Trainer(tmp_path / "vision.pt", tmp_path / "language.pt", "cpu")
    assert again.step == trainer.step == len(short)
    averages = again.average.module.state_dict()
    for name, weight in trainer.average.module.state_dict().items():
        assert torch.equal(averages[name], weight), name
    again.train(dataclasses.replace(short[-1], steps=1), 0)
    started = train_language.Trainer(
        tmp_path / "none.pt", tmp_path / "new.pt", "cpu", start=CHECKPOINT, at=7
    )
    assert started.step == 7
    exported = load_file(CHECKPOINT / "model.safetensors")
    assert torch.equal(started.model.lm_head.weight, exported["lm_head.weight"].float())


def test_a_stopped_training_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(train_vision, "PATCHES", 12)
    file = tmp_path / "vision.pt"
    train_vision.train(file, 1, "cpu")
    train_vision.train(file, 2, "cpu")
    assert torch.load(file)["step"] == 2


THREE_ALIKE = scenes.Scene(
    seed=0,
    patches=20,
    size=(112, 112),
    motion="calm",
    events=(
        scenes.Event("number", 0, colour=2, value=7),
        scenes.Event("sign", 1, value=3),
        scenes.Event("frame", 2, colour=5, value=2),
        scenes.Event("number", 12, colour=2, value=4),
        scenes.Event("number", 13, colour=6, value=1),
        scenes.Event("number", 19, colour=2, value=0),
    ),
)


def test_hints_tell_what_came_before():
    places, known = hints.of_scene(THREE_ALIKE)
    assert places == [0, 12, 13, 19]
    assert known["sign"] == [hints.IGNORE, 3, 3, 3]
    # The last card is seven patches from one and six from the other: too close to ask about.
    assert known["previous"] == [hints.IGNORE, 7, 4, hints.IGNORE]
    assert known["again"] == [0, 1, 0, 1]
    assert known["third"] == [hints.IGNORE, 0, hints.IGNORE, 1]
    assert [sum(row) for row in known["seen"]] == [0, 1, 1, 2]
    assert known["named_by"][0] == [0.0] * 8
    assert known["named_by"][1][5] == 1.0 and sum(known["named_by"][1]) == 1


def test_links_lead_to_the_card_before_and_from_a_third_to_the_second(model, words):
    tokens = torch.zeros(20, 3, 256)  # three a picture
    batch = batches.of_video(
        model, words, (1, 3), tokens, THREE_ALIKE, scenes.questions(THREE_ALIKE)
    )
    first = len(words.before_video)
    at = {patch: [first + 3 * patch + n for n in range(3)] for patch in range(20)}
    wanted = [(12, 0), (13, 12), (19, 12)]
    assert hints.links(batch).tolist() == [[0, token, b] for a, b in wanted for token in at[a]]


def test_linked_attention_is_what_hugging_face_attends(bank, words):
    """Of the watched tokens, in the layers between the taps."""
    model = network.build(layers=6)
    model.set_attn_implementation("eager")
    batch = batches.make(np.random.default_rng(0), model, words, bank, [3, 4], 40, 2, kept=2)
    batch = dataclasses.replace(batch, prefix=batch.prefix.float())
    links = hints.links(batch)
    with torch.no_grad():
        _, made = scoring.logits(model, batch, watch=links)
        theirs = model.model.language_model(
            inputs_embeds=batch.prefix, position_ids=batch.prefix_at, output_attentions=True
        ).attentions
    assert len(links) and len(made.linked) == 2
    for mine, layer in zip(made.linked, theirs[2:4], strict=True):
        torch.testing.assert_close(mine, layer[links[:, 0], :, links[:, 1]], atol=1e-4, rtol=0)


def test_the_tokenizer_has_one_token_for_every_answer(words):
    for answer in [*"0123456789", *scenes.COLOUR_NAMES]:
        assert len(words.ids(answer)) == 1
    assert len(network.tokenizer()) <= network.VOCABULARY


@pytest.mark.parametrize("size", [(112, 112), (84, 140)])
def test_the_fast_forward_pass_is_hugging_faces(tmp_path, model, words, size):
    """Pixels, video tokens and logits, for two questions that share a video."""
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    network.save(network.build(), tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    scene = scenes.make(5, 12, size)
    frames = footage.frames(scene)
    asked = scenes.questions(scene)[:2]
    grid = (size[0] // 28, size[1] // 28)
    tokens = forward.vision(theirs, forward.pixels(frames), grid)
    batch = batches.of_video(theirs, words, grid, tokens, scene, asked)
    with torch.no_grad():
        mine, _ = scoring.logits(theirs, batch)
    for number, question in enumerate(asked):
        content = [{"type": "video"}, {"type": "text", "text": question.text}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(
            text=[text],
            videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)],
            return_tensors="pt",
            do_sample_frames=False,
        )
        assert torch.equal(inputs["pixel_values_videos"], forward.pixels(frames).flatten(0, 1))
        length = len(words.question(question.text))
        first = number * words.longest
        at = torch.cat([batch.prefix_at, batch.questions_at[..., first : first + length]], -1)
        with torch.no_grad():
            said = theirs(**inputs, position_ids=at).logits[0, -1]
        torch.testing.assert_close(mine[0, number, 0], said, rtol=1e-3, atol=1e-3)


def test_a_question_sees_no_other_question(model, bank, words):
    batch = batches.make(
        np.random.default_rng(0), model, words, bank, [3], 12, 3, kept=2, varied=False
    )
    with torch.no_grad():
        together, _ = scoring.logits(model, batch)
        changed = dataclasses.replace(batch, questions=batch.questions.clone())
        changed.questions[0, 0] = changed.questions[0, 1].flip(0)
        apart, _ = scoring.logits(model, changed)
    assert not torch.equal(together[0, 0], apart[0, 0])
    torch.testing.assert_close(together[0, 1:], apart[0, 1:])


def test_ablations_hide_what_they_say(model, bank, words):
    batch = batches.make(np.random.default_rng(0), model, words, bank, [3], 40, 4, varied=False)
    hidden = scoring.masks(batch, "hidden")["mask"]
    for number, question in enumerate(batch.asked[0]):
        row = hidden[0, 0, number * words.longest]
        for patch in question.needles:
            assert not row[batch.patch_at[patch]].any()
        assert row[: batch.prefix.shape[1]].sum() >= batch.prefix.shape[1] - 64 * 3 * len(
            question.needles
        )
    local = scoring.masks(batch, "local")["prefix_mask"]
    assert local[300, :64].all() and local[300, 192:301].all()
    assert not local[300, 64:192].any() and not local[300, 301:].any()


# The shipped checkpoint

shipped = pytest.mark.skipif(not CHECKPOINT.exists(), reason="no checkpoint in the tree")


@shipped
def test_the_checkpoint_is_small_and_complete():
    files = {file.name: file.stat().st_size for file in CHECKPOINT.iterdir()}
    assert sum(files.values()) <= 16 * 2**20
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= {
        *files
    }


@shipped
def test_the_checkpoint_was_not_trained_with_another_tokenizer(words):
    engine = evaluate.Torch(CHECKPOINT)
    for text in scenes.every_question_text():
        assert engine.words.question(text) == words.question(text)


@shipped
def test_the_checkpoint_answers_about_real_files():
    """A quick look; the model card has the measured table."""
    engine = evaluate.Torch(CHECKPOINT)
    rows = []
    for motion in haystack.MOTIONS:
        rows += evaluate.measure(engine, 64, 6, motion, (112, 112), "none")
    for skill, least in EXPECTED.items():
        right = [row["right"] for row in rows if row["skill"] == skill]
        assert sum(right) >= least * len(right), f"{skill}: {sum(right)} of {len(right)}"


@shipped
@pytest.mark.engine
def test_the_checkpoint_answers_in_stock_vllm():
    from engine import engines
    from vllm import SamplingParams

    right: dict[str, list[bool]] = {skill: [] for skill in EXPECTED}
    with engines.engine(CHECKPOINT, None, dtype="bfloat16") as llm:
        for number in range(8):
            motion = haystack.MOTIONS[number % 2]
            video = evaluate.held_out_video(number, 64, motion=motion)
            prompts = [
                {
                    "prompt": evaluate.PROMPT.format(question.text),
                    "multi_modal_data": {"video": [(video.frames, video.metadata)]},
                }
                for question in video.asked
            ]
            outputs = llm.generate(
                prompts, SamplingParams(max_tokens=4, temperature=0), use_tqdm=False
            )
            for question, output in zip(video.asked, outputs, strict=True):
                if question.skill in right:
                    right[question.skill].append(output.outputs[0].text == question.answer)
    for skill, least in EXPECTED.items():
        share = sum(right[skill]) / len(right[skill])
        assert share >= least, f"{skill}: {share:.2f} of {len(right[skill])}"


@pytest.mark.parametrize(
    "more, words",
    [
        (["--videos", "0"], "videos=0"),
        (["--first", "-1"], "first=-1"),
        (["--patches", "8"], "patches=8: no scene has a question of every skill"),
        (["--patches", "1"], "patches=1: must be at least 4"),
    ],
)
def test_questions_that_cannot_be_written(tmp_path, monkeypatch, capsys, more, words) -> None:
    monkeypatch.setattr("sys.argv", ["write_questions.py", str(tmp_path), *more])
    with pytest.raises(SystemExit) as end:
        write_questions.main()
    assert end.value.code == 2 and words in capsys.readouterr().err
