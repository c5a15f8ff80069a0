"""The drawn world of the miniature: captions agree with drawings."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "miniature"

world_module = pytest.importorskip("tools.miniature.world")
Scene, caption, random_scene = world_module.Scene, world_module.caption, world_module.random_scene


@pytest.fixture(scope="module")
def world():
    if not (BUILD / "artwork" / "sprites.json").exists():
        pytest.skip("the artwork is not fetched: python -m tools.miniature --stage clips")
    pytest.importorskip("resvg_py")
    return world_module.World.open(BUILD)


def test_the_grammar_says_what_a_scene_shows():
    scene = Scene("car", "city", "neon style", "red", "driving")
    assert caption(scene) == "a red car is driving in the city, neon style"
    assert caption(scene, colour=False, motion=False, place=False) == "a car, neon style"


def test_every_word_of_the_world_is_one_token():
    text = pytest.importorskip("tools.miniature.text")
    tokenizer = text.new_tokenizer(world_module.words())
    for word in world_module.words():
        assert len(tokenizer(word).input_ids) == 3, word


def test_a_tokenizer_survives_being_saved_and_meets_unknown_words(tmp_path):
    text = pytest.importorskip("tools.miniature.text")
    tokenizer = text.new_tokenizer(world_module.words())
    tokenizer.save_pretrained(tmp_path)
    again = text.CLIPTokenizer.from_pretrained(tmp_path)
    for sentence in ("a dog is jumping on the grass", "spider man is skiing on Mars!", ""):
        assert again(sentence).input_ids == tokenizer(sentence).input_ids


def test_the_longest_caption_fits_the_text_encoder():
    text = pytest.importorskip("tools.miniature.text")
    tokenizer = text.new_tokenizer(world_module.words())
    longest = caption(Scene("butterfly", "beach", "black and white", "purple", "floating"))
    assert len(tokenizer(longest).input_ids) <= text.POSITIONS


def test_training_never_shows_a_held_out_pair():
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(2000)]
    assert not {(s.subject, s.background) for s in scenes} & world_module.HELD_OUT
    assert {s.subject for s in scenes} == set(world_module.SUBJECTS)


def test_a_scene_is_always_the_same_picture(world):
    scene = random_scene(random.Random(3))
    first = world.draw(scene)
    for other in range(12):
        world.draw(random_scene(random.Random(other)))
    assert np.array_equal(first, world.draw(scene))


@pytest.mark.parametrize(("x", "y", "size"), [(20, 24, 28), (40, 34.5, 34), (32, 44, 26)])
def test_the_track_is_where_the_subject_is_drawn(world, x, y, size):
    scene = Scene("ball", "room", x=x, y=y, size=size)
    changed = (world.draw(scene) != world.draw(replace(scene, subject=None))).any(-1)
    rows, columns = np.nonzero(changed)
    assert (columns.min() + columns.max() + 1) / 2 == pytest.approx(x, abs=1)
    assert (rows.min() + rows.max() + 1) / 2 == pytest.approx(y, abs=1)
    assert columns.max() + 1 - columns.min() == pytest.approx(size, abs=2)


def test_every_clip_moves_and_keeps_to_trained_pairs():
    clips = pytest.importorskip("tools.miniature.clips")
    assert len(clips.CLIPS) == len({clip.name for clip in clips.CLIPS}) == 24
    assert {clip.scene.subject for clip in clips.CLIPS} == set(world_module.SUBJECTS)
    assert len({clip.name for clip in clips.CLIPS + clips.HARDER}) == 44
    for clip in clips.CLIPS + clips.HARDER:
        track = np.array([(scene.x, scene.y) for scene in clip.scenes()])
        assert np.linalg.norm(np.diff(track, axis=0), axis=1).sum() > 20
        assert ((track > 8) & (track < 56)).all()
        assert (clip.scene.subject, clip.scene.background) not in world_module.HELD_OUT
