"""Settings: flags, files and presets; bounds; what alters a resumed run and what tells two runs apart."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest

from src.errors import UserError
from src.grpo import GRPOConfig
from src.settings import (
    PRESETS,
    TrainConfig,
    changed_settings,
    check_fields,
    described,
    flag,
    machine,
    names_of,
    parse_flags,
)


@dataclass
class Sample:
    """One field of each kind."""

    count: int = flag(1, "a whole number", least=1)
    share: float = flag(0.5, "a number", least=0, alters=False, tells=True)
    rate: float | None = flag(None, "a number that may be left out", above=0)
    clip: float = flag(0.2, "a number", above=0, below=1)
    kind: Literal["one", "two"] = flag("one", "a word")
    folder: str = machine("here", "a place")
    seed: int = flag(0, "of the numbers", tells=False)

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", 0, "--count is 0: give 1 or more."),
        ("share", -0.1, "--share is -0.1: give a number of 0 or more."),
        ("share", float("inf"), "--share is inf: give a number of 0 or more."),
        ("rate", 0.0, "--rate is 0.0: give a number above 0."),
        ("rate", float("nan"), "--rate is nan: give a number above 0."),
        ("clip", 0.0, "--clip is 0.0: give a number between 0 and 1."),
        ("clip", 1.0, "--clip is 1.0: give a number between 0 and 1."),
        ("kind", "three", "--kind is three: choose one of one, two."),
    ],
)
def test_a_value_out_of_the_bounds_of_its_field_is_one_line(name: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Sample(**{name: value})
    assert str(caught.value) == message


def test_the_bounds_themselves_and_what_is_left_out_are_accepted() -> None:
    Sample(count=1, share=0.0, rate=None, clip=0.999, kind="two")
    TrainConfig(seed=-(2**63), max_steps=0, save_every=0, cold_start_steps=0)
    TrainConfig(seed=2**63 - 1, lora_rank=None)


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**63])
def test_a_seed_that_torch_cannot_take_is_refused(seed: int) -> None:
    with pytest.raises(UserError, match=f"--seed is {seed}: "):
        TrainConfig(seed=seed)


def test_a_field_alters_a_resumed_run_and_tells_runs_apart_unless_it_says_otherwise() -> None:
    assert names_of("alters", Sample) == {"count", "rate", "clip", "kind", "seed"}
    assert names_of("tells", Sample) == {"count", "share", "rate", "clip", "kind"}


def test_of_the_real_settings_these_do_not_alter_a_resumed_run() -> None:
    """Worked out by hand: how long, where to, what is kept and shown; and a text file, whose text counts instead."""
    free = {"preset", "config", "checkpoint_dir", "log_dir", "resume", "device", "save_every", "keep_last", "keep_best"}
    free |= {"eval_every", "final_eval_samples", "sample_every", "tensorboard", "allow_changes", "token_budget"}
    longer = {"epochs", "max_steps", "system_prompt_file", "model", "dataset"}  # whose content counts instead
    names = {f.name for kind in (TrainConfig, GRPOConfig) for f in fields(kind)}
    assert names - names_of("alters", TrainConfig, GRPOConfig) == free | longer
    assert names - names_of("tells", TrainConfig, GRPOConfig) == free | {"seed", "system_prompt"}
    assert names - described(TrainConfig(), GRPOConfig()).keys() == free


def test_changed_settings_are_named_with_both_values_and_long_texts_cut_off() -> None:
    now = Sample(count=2, folder="there", share=0.9, kind="two")
    before = {"count": 1, "share": 0.5, "rate": None, "clip": 0.2, "kind": f"one\n{'x' * 99}", "folder": "here"}
    cut = "one " + "x" * 73 + "..."
    assert changed_settings(before | {"seed": 0}, now) == ["count was 1, is 2", f"kind was {cut}, is two"]
    assert changed_settings({}, Sample())[0] == "count was None, is 1"  # an earlier version did not have it


def test_a_setting_that_older_checkpoints_do_not_say_is_what_they_did() -> None:
    before = asdict(GRPOConfig(shaped_rewards="always"))
    del before["shaped_rewards"]
    assert changed_settings(before, GRPOConfig(shaped_rewards="always")) == []
    assert changed_settings(before, GRPOConfig()) == ["shaped_rewards was always, is right"]


def test_a_flag_beats_the_file_which_beats_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("group_size: 6\nmax_steps: 7\nquestion_column: [a, b]\nlora_rank: null\n", encoding="utf-8")
    argv = ["--preset", "tiny", "--config", str(file), "--max_steps", "9", "--no_keep_best", "--kl-coef", "0.5"]
    config, grpo = parse_flags((TrainConfig, GRPOConfig), argv, PRESETS)
    assert (config.max_steps, grpo.group_size, config.cold_start_steps) == (9, 6, 500)
    assert config.question_column == ["a", "b"] and config.lora_rank is None
    assert config.keep_best is False and grpo.kl_coef == 0.5
    assert parse_flags((TrainConfig, GRPOConfig), ["--resume"], PRESETS)[0].resume == "newest"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no_such: 1", "sets no_such, which is no flag"),
        ("system_prompt: Solve it.", "sets system_prompt, which is no flag"),
        ("[1, 2]", "holds no settings"),
        ("a: [", "Cannot read the settings in"),
        ("group_size: 1", "--group_size is 1: give 2 or more."),
        ("preset: huge", "There is no preset 'huge'"),
    ],
)
def test_a_file_of_settings_that_does_not_fit_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "settings.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        parse_flags((TrainConfig, GRPOConfig), ["--config", str(tmp_path / "settings.yaml")], PRESETS)
    assert words in str(caught.value) and "\n" not in str(caught.value)
