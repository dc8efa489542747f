"""Settings: flags, files and presets; bounds; what alters a resumed run and what tells two runs apart."""

from dataclasses import dataclass, fields, replace
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
    resume_settings,
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
        ("share", -0.1, "--share is -0.1: give 0 or more."),
        ("share", float("inf"), "--share is inf: give 0 or more."),
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
    free = {"preset", "config", "checkpoint_dir", "log_dir", "resume", "replace", "device", "save_every", "keep_last"}
    free |= {"keep_best", "eval_every", "sample_every", "tensorboard", "allow_changes"}
    free |= {"token_budget"}
    longer = {"epochs", "max_steps", "system_prompt_file", "model", "dataset"}  # whose content counts instead
    names = {f.name for kind in (TrainConfig, GRPOConfig) for f in fields(kind)}
    assert names - names_of("alters", TrainConfig, GRPOConfig) == free | longer
    assert names - names_of("tells", TrainConfig, GRPOConfig) == free | {"seed", "system_prompt"}
    assert names - described(TrainConfig(), GRPOConfig()).keys() == free


def test_a_preset_is_a_file_of_settings_that_hold_as_a_file_or_by_name() -> None:
    names = {path.stem for path in PRESETS.iterdir()}
    assert names == {"default", "tiny"}
    assert parse_flags((TrainConfig, GRPOConfig), ["--preset", "default"]) == (TrainConfig(), GRPOConfig())
    named = parse_flags((TrainConfig, GRPOConfig), ["--preset", "tiny"])
    config, grpo = parse_flags((TrainConfig, GRPOConfig), ["--config", str(PRESETS / "tiny.yaml")])
    assert (replace(config, preset="tiny", config=None), grpo) == named
    assert (config.model, config.dataset, config.cold_start_learning_rate, grpo.kl_coef) == (
        "tiny",
        "synthetic",
        2e-3,
        0,
    )


def test_changed_settings_are_named_with_both_values_and_long_texts_cut_off() -> None:
    now = Sample(count=2, folder="there", share=0.9, kind="two")
    before = {"count": 1, "share": 0.5, "rate": None, "clip": 0.2, "kind": f"one\n{'x' * 99}", "folder": "here"}
    cut = "one " + "x" * 76
    assert changed_settings(before | {"seed": 0}, now) == ["count was 1, is 2", f"kind was {cut}, is two"]
    assert changed_settings({}, Sample())[0] == "count was None, is 1"  # an earlier version did not have it


def test_a_flag_beats_the_file_which_beats_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("group_size: 6\nmax_steps: 7\nquestion_column: [a, b]\nlora_rank: null\n", encoding="utf-8")
    argv = ["--preset", "tiny", "--config", str(file), "--max_steps", "9", "--no_keep_best", "--kl-coef", "0.5"]
    config, grpo = parse_flags((TrainConfig, GRPOConfig), argv)
    assert (config.max_steps, grpo.group_size, config.cold_start_steps) == (9, 6, 500)
    assert config.question_column == ["a", "b"] and config.lora_rank is None
    assert config.keep_best is False and grpo.kl_coef == 0.5
    for given, value in ((["--no-keep-best"], False), (["--keep-best", "no"], False), (["--keep_best"], True)):
        assert parse_flags((TrainConfig, GRPOConfig), given)[0].keep_best is value
    assert parse_flags((TrainConfig, GRPOConfig), ["--resume"])[0].resume == "newest"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no_such: 1", "sets no_such, which is no flag"),
        ("system_prompt: Solve it.", "sets system_prompt, which is no flag"),
        ("[1, 2]", "holds no settings"),
        ("a: [", "Cannot read the settings in"),
        ("group_size: 1", "--group_size is 1: give 2 or more."),
        ("preset: huge", "--preset is huge: choose one of default, tiny."),
    ],
)
def test_a_file_of_settings_that_does_not_fit_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "settings.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        parse_flags((TrainConfig, GRPOConfig), ["--config", str(tmp_path / "settings.yaml")])
    assert words in str(caught.value) and "\n" not in str(caught.value)


TINY = ["--preset", "tiny"]
ODD_FILES = [
    ("1: 2", "sets 1, which is no flag"),
    ("true: 2", "sets true, which is no flag"),
    ("? [a]\n: 3", "Cannot read"),
    ("seed: " + "1" * 5000, "give a whole number"),
    ("seed: 0x" + "f" * 5000, "give a whole number"),
    ("kl_coef: " + "1" * 5000, "--kl_coef is inf"),
    ("seed: 1.5", "--seed is '1.5': give a whole number"),
    ("seed: yes", "--seed is 'yes': give a whole number"),
    ("seed: [1, 2]", "--seed is '['1', '2']': give a whole number"),
    ("model: {a: b}", "--model is '{'a': 'b'}': give a text"),
    ("model: [a, --resume]", "--model is '['a', '--resume']': give a text"),
    ("question_column: [a, [b]]", "--question_column is '['a', ['b']]': give a text, or a list of such"),
    ("question_column: []", "--question_column is '[]'"),
    ("reward_weights: [1, x, 1, 1]", "--reward_weights is '['1', 'x', '1', '1']': give a number, or a list of such"),
    ("[" * 100_000, "Cannot read"),
    ("a: " + "{a: " * 5000, "Cannot read"),
    ("preset: [tiny]", "--preset is '['tiny']'"),
    ("config: other.yaml", "sets config, which is no flag"),
    ("keep_best: perhaps", "--keep_best is 'perhaps': give true or false"),
    ("learning_rate: fast", "--learning_rate is 'fast': give a number"),
    ("learning_rate: nan", "--learning_rate is nan"),
    ("seed: &a [*a]", "Cannot read"),
    ("seed: *nothing", "Cannot read"),
    ("seed: 1\n  model: 2", "Cannot read"),
    ("seed: \0", "Cannot read"),
    ("!!python/object/apply:os.system [true]", "holds no settings"),
    ("a: 1\n--- \nb: 2", "Cannot read"),
    ("dtype: fp8", "--dtype is fp8: choose one of"),
    ("<<: {seed: 1}", "sets <<, which is no flag"),
    ('"\\e]0;title\\a": 1', r"sets \x1b]0;title\x07, which is no flag"),
    ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nseed: *c", "sets a, b, c"),
    ("seed: 1\nresume: perhaps\nmax_steps: -1", "--max_steps is -1"),
    ("group_size: null", "--group_size is nothing: give a whole number"),
]


@pytest.mark.parametrize(("text", "words"), ODD_FILES, ids=[text[:20] for text, _ in ODD_FILES])
def test_odd_contents_of_a_file_of_settings_are_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "settings.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        parse_flags((TrainConfig, GRPOConfig), [*TINY, "--config", str(tmp_path / "settings.yaml")])
    assert words in str(caught.value) and len(str(caught.value)) < 1500
    assert str(caught.value).isprintable()


def test_a_file_of_settings_says_none_less_than_nothing_and_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.yaml"
    text = "max-steps: null\nseed: -5\nkl_coef: -0.0\nanswer_pattern: -x\nresume: true\ncheckpoint_dir: ~/ck\n"
    text += "lora_rank: ~\nanswer_column: 2024-01-01\nquestion_column: [a, --resume]\nkeep_best: no\n"
    file.write_text("\ufeff" + text, encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = [*TINY, "--config=~/settings.yaml", "--system_prompt_file=~/settings.yaml"]
    config, grpo = parse_flags((TrainConfig, GRPOConfig), argv)
    assert (config.max_steps, config.seed, grpo.kl_coef, config.answer_pattern) == (None, -5, 0, "-x")
    assert (config.resume, config.checkpoint_dir) == ("newest", f"{tmp_path}/ck")
    assert (config.lora_rank, config.answer_column, config.keep_best) == (None, "2024-01-01", False)
    assert config.question_column == ["a", "--resume"] and config.system_prompt == text.strip()
    argv = ["--checkpoint_dir=~/a", "--log_dir=~/b", "--resume=~/c", "--model=~/d", "--dataset", "~/e"]
    (config,) = parse_flags((TrainConfig,), argv)
    places = (config.checkpoint_dir, config.log_dir, config.resume, config.model, config.dataset)
    assert places == tuple(f"{tmp_path}/{name}" for name in "abcde")


def test_a_path_to_a_model_or_data_never_becomes_a_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "tiny", "owner"):
        (tmp_path / name).mkdir()
    names = {"mine": "./mine", "mine/": "./mine", "./mine": "./mine", "tiny": "tiny", "owner/gone": "./owner/gone"}
    names |= {"openai/gsm8k": "openai/gsm8k", "../x": "./../x", f"{tmp_path}/mine": f"{tmp_path}/mine"}
    for typed, expected in names.items():
        (before,) = parse_flags((TrainConfig,), ["--dataset", typed])
        assert before.dataset == expected
    (tmp_path / "mine").rmdir()
    (now,) = parse_flags((TrainConfig,), ["--dataset", "mine"])
    with pytest.raises(UserError, match=r"--dataset was '\./mine', and 'mine' is not here"):
        resume_settings(now, {"dataset": "./mine"})
    resume_settings(now, {"dataset": "openai/gsm8k", "dtype": "fp32"})
    resume_settings(now, {"dtype": "fp32"})


def test_a_resumed_run_goes_on_in_its_own_type_unless_another_is_given() -> None:
    for given, expected in (("auto", "fp32"), ("fp32", "fp32"), ("bf16", "bf16")):
        (now,) = parse_flags((TrainConfig,), ["--dtype", given])
        resume_settings(now, {"dtype": "fp32"})
        assert now.dtype == expected
    for before in ({"dtype": "int8"}, {}):
        with pytest.raises(UserError, match=f"--dtype is {before.get('dtype')}: choose one of auto, bf16, fp32"):
            resume_settings(parse_flags((TrainConfig,), [])[0], before)
