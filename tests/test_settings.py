"""Settings: precedence, and one line per mistake."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Annotated

import annotated_types
import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneavideo import api
from tuneavideo.bases import BASES
from tuneavideo.config import as_yaml, checked, layers, read_yaml, with_preset
from tuneavideo.errors import SettingsError
from tuneavideo.settings import PRESETS, EditSettings, TuneSettings

NEEDED = {"video": "clip.mp4", "prompt": "a man is skiing"}


def made(flags: dict | None = None, yaml: dict | None = None) -> TuneSettings:
    return checked(TuneSettings, layers({**NEEDED, **(flags or {})}, yaml or {}))


def test_flag_beats_yaml_beats_preset_beats_base_beats_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "official", {"learning_rate": 3.0})
    assert TuneSettings(**NEEDED).learning_rate == 3e-5
    assert made({"base": "sd1.5"}).learning_rate == 3e-5
    assert made().learning_rate == BASES["miniature"].settings["learning_rate"]
    assert made({"preset": "official"}).learning_rate == 3.0
    assert made({}, {"preset": "official", "learning_rate": 4.0}).learning_rate == 4.0
    assert made({"learning_rate": 5.0}, {"preset": "official", "learning_rate": 4.0}).learning_rate == 5.0


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_base_goes_with_every_preset(base: str, preset: str) -> None:
    settings = made({"base": base, "preset": preset})
    own = BASES[base].settings
    assert settings.learning_rate == own.get("learning_rate", 3e-5)
    assert settings.resolution == own["resolution"]


def test_official_is_the_arithmetic_of_the_published_code() -> None:
    settings = made({"base": "sd1.4", "preset": "official"})
    assert (settings.learning_rate, settings.max_train_steps, settings.stride) == (3e-5, 500, 1)
    assert (settings.adam_beta1, settings.adam_beta2, settings.adam_weight_decay, settings.adam_epsilon) == (
        0.9, 0.999, 1e-2, 1e-8,
    )  # fmt: skip
    assert (settings.guidance_scale, settings.num_inference_steps, settings.inversion_steps) == (12.5, 50, 50)
    assert (settings.sampler, settings.timestep_spacing, settings.fit) == ("ddim", "leading", "stretch")
    assert settings.inflation == (("first", "previous"), True, "official")
    assert settings.frozen_modules == ("down_blocks",)


def test_settings_written_as_yaml_read_back_the_same(tmp_path: Path) -> None:
    settings = made({"edit": ("ein Bär tanzt", "a: b # c"), "seeds": (1, 2), "fresh_noise": 0.3})
    (tmp_path / "s.yaml").write_text(as_yaml(settings), encoding="utf-8")
    assert checked(TuneSettings, read_yaml(tmp_path / "s.yaml", TuneSettings)) == settings


def test_yaml_may_write_a_rate_as_people_do(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("learning_rate: 3e-5\nseeds: 7\nedit: a circle\nmixed_precision: no\n")
    settings = made({}, read_yaml(tmp_path / "s.yaml", TuneSettings))
    assert settings.learning_rate == 3e-5 and settings.seeds == (7,)
    assert settings.edit == ("a circle",) and settings.mixed_precision == "no"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("learning_rat: 1", "s.yaml: unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        ("- a\n- b", "s.yaml: expected lines like 'learning_rate: 3e-5'; found list"),
        ("a: [", "s.yaml: cannot be read as YAML"),
        ("max_train_steps: many", "s.yaml: max_train_steps: input should be a valid integer"),
        ("prompt: 5", "s.yaml: prompt: input should be a valid string; found 5"),
        ("", "s.yaml: expected lines like 'learning_rate: 3e-5'; found NoneType"),
        ("seed: 2001-99-99", "s.yaml: cannot be read as YAML: month must be in 1..12"),
        ("seed: " + "9" * 5000, "s.yaml: cannot be read as YAML: Exceeds the limit"),
        ("seeds: " + "[" * 500, "s.yaml: cannot be read as YAML: maximum recursion depth"),
        ("learning_rate: 1" + "0" * 400, "s.yaml: learning_rate: input should be a valid number; found 1000"),
    ],
)
def test_a_yaml_file_that_cannot_be_used_names_file_and_key(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(SettingsError) as error:
        read_yaml(tmp_path / "s.yaml", TuneSettings)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_preset_for_an_edit_is_not_refused_for_the_steps_of_the_run() -> None:
    own = TuneSettings(video="a.mp4", prompt="a cat", num_inference_steps=3, num_inv_steps=3)
    made = EditSettings(run="runs/a-1", prompt=("a dog",), **with_preset(own, "fast"))
    assert made.num_inference_steps == made.inversion_steps == 20
    assert with_preset(own, None)["num_inv_steps"] == 3


def test_a_seed_given_twice_makes_one_edit() -> None:
    assert EditSettings(run="runs/a-1", prompt=("a dog",), seeds=(1, 2, 1), fresh_noise=0.9).seeds == (1, 2)


@pytest.mark.parametrize(
    ("stated", "told"),
    [
        ({"max_train_steps": 0}, "max_train_steps: input should be greater than 0; found 0"),
        ({"num_frames": 0}, "num_frames: input should be greater than 0 or 'all'; found 0"),
        ({"learning_rate": float("nan")}, "learning_rate: input should be a finite number"),
        ({"strength": 1.5}, "strength: input should be less than or equal to 1; found 1.5"),
        ({"sampler": "ddmi"}, "sampler: input should be 'ddim', "),
        ({"preset": "oficial"}, "unknown preset 'oficial'; did you mean 'official'?"),
        ({"prompt": " "}, "prompt is empty; say in words what the clip shows"),
        ({"width": 64}, "width and height need"),
        ({"seeds": (1, 2)}, "2 seeds would give the same edit 2 times: set fresh_noise"),
        ({"steps": 3}, "unknown setting 'steps'; did you mean 'seeds'?"),
        ({"sampler": "EULR"}, "did you mean 'euler'?"),
        ({"zzz": 3}, "known are num_inference_steps, "),
        ({"resume": "runs/a-1"}, "give --resume on the command line"),
    ],
)
def test_a_wrong_value_is_one_line_that_says_what_to_do(stated: dict, told: str) -> None:
    with pytest.raises(SettingsError) as error:
        made(stated)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stated", "told"),
    [
        ({"edit": ("a circle", " ")}, "prompt is empty"),
        ({"edit": ("a circle", "a dot", "a circle")}, "'a circle' is given twice"),
        ({"seeds": ()}, "seeds: found none"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval 0.8 0.2"),
    ],
)
def test_what_makes_no_edit_or_the_same_twice_is_refused(stated: dict, told: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(told)):
        api.tune_settings({**NEEDED, **stated})
    made(stated)  # a run that was made so is read all the same


def test_a_negative_prompt_without_guidance_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    api.tune_settings({**NEEDED, "negative_prompt": "snow", "guidance_scale": 2})
    assert not caplog.text
    api.tune_settings({**NEEDED, "negative_prompt": "snow", "guidance_scale": 1})
    assert "negative_prompt has no effect" in caplog.text


def test_choices_bases_seeds_and_times_may_be_spelt_freely() -> None:
    settings = made({"base": "SDXL", "preset": "Fast", "fit": "Crop"}, {"seeds": "1,2", "fresh_noise": 0.5})
    assert (settings.base, settings.resolution, settings.preset) == ("sdxl", 1024, "fast")
    assert (settings.fit, settings.sampler, settings.seeds) == ("crop", "dpm++", (1, 2))
    assert [made({"start_time": time}).start_time for time in ("90", "1:30", "1:00:02.5", 3)] == [90, 90, 3602.5, 3]


# Whatever the values


def values_of(name: str) -> st.SearchStrategy:
    """Values that the type of a setting and its bounds allow."""
    field = TuneSettings.model_fields[name]
    if name == "prompt":
        return st.text(min_size=1).filter(str.strip)
    bounds = [bound for bound in field.metadata if isinstance(bound, annotated_types.BaseMetadata)]
    return st.from_type(Annotated[field.annotation, *bounds] if bounds else field.annotation)


ANY = st.fixed_dictionaries({}, optional={name: values_of(name) for name in TuneSettings.model_fields})


@given(ANY)
@hypothesis.settings(deadline=None, max_examples=60, suppress_health_check=list(hypothesis.HealthCheck))
def test_any_settings_survive_being_written_as_yaml(values: dict) -> None:
    try:
        settings = made(values)
    except SettingsError as error:
        assert "\n" not in str(error)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "s.yaml")
        file.write_text(as_yaml(settings), encoding="utf-8")
        assert checked(TuneSettings, read_yaml(file, TuneSettings)) == settings


@given(ANY, ANY, st.sampled_from(list(BASES)), st.sampled_from(list(PRESETS)))
@hypothesis.settings(deadline=None, max_examples=60, suppress_health_check=list(hypothesis.HealthCheck))
def test_every_value_comes_from_the_strongest_layer_that_has_one(
    flags: dict, yaml: dict, base: str, preset: str
) -> None:
    flags |= {"base": base}
    yaml |= {"preset": preset}
    flags.pop("preset", None)
    built_in = {name: field.default for name, field in TuneSettings.model_fields.items() if not field.is_required()}
    merged = layers(flags, yaml)
    for name in TuneSettings.model_fields:
        strongest = [layer for layer in (flags, yaml, PRESETS[preset], BASES[base].settings) if name in layer]
        assert repr(merged.get(name, built_in.get(name))) == repr(
            (strongest or [built_in])[0].get(name)
        )  # nan is not nan


REMOVED_AND_OFF = """\
timestep_sampling: uniform
noise_shared: 0.0
debias_weight: 0.0
prior_weight: 0.0
early_stopping: null
early_stopping_steps: 25
early_stopping_patience: 3
"""


def test_a_file_with_removed_settings_that_were_off_is_read(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(as_yaml(made()) + REMOVED_AND_OFF)
    assert checked(TuneSettings, read_yaml(path, TuneSettings)) == made()
    assert checked(TuneSettings, {**NEEDED, "prior_weight": 0}) == TuneSettings(**NEEDED)


@pytest.mark.parametrize("line", ["prior_weight: 0.5", "timestep_sampling: stratified", "early_stopping: 0.01"])
def test_a_removed_setting_that_would_have_an_effect_is_an_error(line: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(line)
    with pytest.raises(SettingsError, match=rf"settings.yaml: .*{line.partition(':')[0]} was removed"):
        read_yaml(path, TuneSettings)
