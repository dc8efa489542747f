"""Rewards of the user's own: every kind of function, everything that can be wrong with one, and TRL's, unchanged."""

import logging
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from src import reward_set
from src.data import Example
from src.errors import UserError
from src.reward_set import RewardError, RewardSet, built_in, choose_rewards, reads_messages
from src.rewards import DEFAULT_WEIGHTS, REWARD_FUNCTIONS

PROBLEMS = [
    Example("Tom has 3 apples. How many?", "He has 3.", "He has 3.", "3", {"level": 1, "topic": "fruit"}),
    Example("Ann has 4 pens. How many?", "She has 4.", "She has 4.", "4", {"level": 2, "topic": "ink"}),
]
TEXTS = ["<answer>3</answer>", "It is four."]
IDS = [[5, 6, 1], [7, 1]]


def write(tmp_path: Path, source: str) -> str:
    path = tmp_path / "my_rewards.py"
    path.write_text(source, encoding="utf-8")
    return str(path)


def load(tmp_path: Path, source: str, names: str) -> RewardSet:
    return choose_rewards(f"{write(tmp_path, source)}:{names}")


def column(tmp_path: Path, source: str, name: str = "f") -> list[float]:
    """What the function `name` of this file gives each of TEXTS."""
    return [row[0] for row in load(tmp_path, source, name).score(TEXTS, PROBLEMS, IDS)]


def failure(tmp_path: Path, source: str, texts: list[str] = TEXTS) -> str:
    """The one line that scoring with the function `f` of this file ends in."""
    with pytest.raises(RewardError) as caught:
        load(tmp_path, source, "f").score(texts, PROBLEMS, IDS)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    return str(caught.value)


class TestBuiltIn:
    def test_without_a_choice_they_are_the_four_with_their_weights(self):
        rewards = choose_rewards(None)
        assert rewards.names == ["formatting", "reasoning", "output_consistency", "answer_accuracy"]
        assert rewards.weights == list(DEFAULT_WEIGHTS) and rewards.fingerprint is None
        assert choose_rewards(None, [1, 2, 3, 4]).weights == [1, 2, 3, 4]

    def test_a_score_is_each_function_s_own_number(self):
        expected = [[f(t, e.answer) for f in REWARD_FUNCTIONS] for t, e in zip(TEXTS, PROBLEMS, strict=True)]
        assert built_in().score(TEXTS, PROBLEMS, IDS) == expected
        assert built_in().score([], []) == []

    def test_they_can_be_chosen_by_name_without_a_file(self):
        rewards = choose_rewards("formatting=0.3, accuracy=2")
        assert (rewards.names, rewards.weights) == (["formatting", "answer_accuracy"], [0.3, 2.0])
        assert [row[1] for row in rewards.score(TEXTS, PROBLEMS)] == [1.0, 0.0]

    def test_another_number_of_problems_than_completions_is_an_error(self):
        with pytest.raises(ValueError):
            built_in().score(TEXTS, PROBLEMS[:1])


class TestFunctionsOfOneCompletion:
    @pytest.mark.parametrize(
        ("function", "expected"),
        [
            ("def f(completion, answer): return len(completion)", [18.0, 11.0]),
            ("def f(answer, completion): return answer in completion", [1.0, 0.0]),
            ("def f(completion): return -0.5", [-0.5, -0.5]),
            ("def f(completion, answer, question): return question.count(answer)", [1.0, 1.0]),
            ("def f(completion, answer, *, example): return example.columns['level']", [1.0, 2.0]),
            ("def f(completion, scale=2): return scale * len(completion)", [36.0, 22.0]),
            ("def f(example, **rest): return len(rest)", [3.0, 3.0]),
            ("f = lambda completion, answer: int(answer)", [3.0, 4.0]),
            ("from functools import partial\ndef g(completion, n): return n\nf = partial(g, n=7)", [7.0, 7.0]),
            ("class F:\n  def __call__(self, completion, answer): return 1\nf = F()", [1.0, 1.0]),
            (
                "from dataclasses import dataclass\n@dataclass\nclass A:\n  x: 'int'\ndef f(answer): return A(5).x",
                [5, 5],
            ),
        ],
    )
    def test_they_are_given_what_they_name(self, tmp_path: Path, function: str, expected: list[float]):
        assert column(tmp_path, function) == expected

    @pytest.mark.parametrize(
        "value", [True, 1, 1.0, Decimal(1), Fraction(1), np.float32(1), np.int64(1), torch.tensor(1.0), torch.ones(1)]
    )
    def test_any_kind_of_number_is_a_reward(self, value: object):
        rewards = RewardSet((reward_set.Reward("f", 1.0, lambda completion: value),))
        scores = rewards.score(TEXTS, PROBLEMS)
        assert scores == [[1.0], [1.0]] and all(type(row[0]) is float for row in scores)


# Written after the forms that TRL's documentation describes: strings for plain prompts, messages for chats.
TRL_STYLE = """
import re

def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]

def has_answer(completions, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.search("<answer>.+</answer>", content) else 0.0 for content in contents]

def text_of(completion):
    return completion[-1].get("content")

def right(prompts, completions, answer, **kwargs):
    questions = [prompt[-1]["content"] for prompt in prompts]
    return [float(a in text_of(c) and a in q) for c, a, q in zip(completions, answer, questions)]

def tokens(completion_ids, **kwargs):
    return [-len(ids) for ids in completion_ids]

def only_fruit(completions, topic, **kwargs):
    return [1.0 if t == "fruit" else None for t in topic]

def by_level(prompts, completions, level):
    return [l * p.count("apples") for p, l in zip(prompts, level)]
"""


class TestFunctionsOfABatch:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("length", [18.0, 11.0]),
            ("has_answer", [1.0, 0.0]),
            ("right", [1.0, 0.0]),
            ("tokens", [-3.0, -2.0]),
            ("only_fruit", [1.0, 0.0]),
            ("by_level", [1.0, 0.0]),
        ],
    )
    def test_trl_style_functions_work_unchanged(self, tmp_path: Path, name: str, expected: list[float]):
        assert column(tmp_path, TRL_STYLE, name) == expected

    def test_trl_s_own_functions_work_and_agree_with_it(self, tmp_path: Path):
        rewards = pytest.importorskip("trl.rewards")
        source = "from trl.rewards import think_format_reward, get_soft_overlong_punishment\n"
        source += "overlong = get_soft_overlong_punishment(max_completion_len=3, soft_punish_cache=2)\n"
        texts = ["<think>\nSo.\n</think>\nIt is 3.", "It is 4."]
        scores = load(tmp_path, source, "think_format_reward,overlong").score(texts, PROBLEMS, IDS)
        as_messages = [[{"role": "assistant", "content": text}] for text in texts]
        assert [row[0] for row in scores] == rewards.think_format_reward(as_messages) == [1.0, 0.0]
        overlong = rewards.get_soft_overlong_punishment(max_completion_len=3, soft_punish_cache=2)
        assert [row[1] for row in scores] == overlong(completion_ids=IDS) == [-1.0, -0.5]

    @pytest.mark.parametrize(
        "kind", ["[1.0, 2.0]", "(1, 2)", "iter([1, 2])", "np.array([1, 2])", "torch.tensor([1, 2])"]
    )
    def test_any_sequence_of_numbers_is_taken(self, tmp_path: Path, kind: str):
        assert column(tmp_path, f"import numpy as np, torch\ndef f(completions, **k): return {kind}") == [1.0, 2.0]

    def test_messages_are_for_functions_that_look_up_content(self, tmp_path: Path):
        names = ("length", "has_answer", "right", "tokens", "only_fruit", "by_level")
        rewards = load(tmp_path, TRL_STYLE, ",".join(names)).rewards
        assert [reads_messages(reward.function) for reward in rewards] == [False, True, True, False, False, False]


class TestFailures:
    @pytest.mark.parametrize(
        ("body", "words"),
        [
            ("return 1 / 0", "raised ZeroDivisionError (division by zero, my_rewards.py line 1)"),
            ("raise KeyError('a\\nb\\x1b[31m')", "raised KeyError ("),
            ("raise Exception", "raised Exception ("),
            ("exit()", "raised SystemExit ("),
            ("return f(completion)", "raised RecursionError ("),
            ("return float('nan')", "returned nan, no finite number,"),
            ("return -float('inf')", "returned -inf, no finite number,"),
            ("return 1e300", "returned 1e+300, no finite number,"),
            ("return 10**400", "no finite number,"),
            ("return 'high'", "returned 'high', no finite number,"),
            ("return '1'", "returned '1', no finite number,"),
            ("return b'1'", "returned b'1', no finite number,"),
            ("return None", "returned None, no finite number,"),
            ("return [1, 2]", "returned [1, 2], no finite number,"),
            ("return 1j", "returned 1j, no finite number,"),
            ("return 'x' * 10**6", "no finite number,"),
        ],
    )
    def test_of_one_completion_name_reward_and_sample_in_one_line(self, tmp_path: Path, body: str, words: str):
        source = f"def f(completion): {body}"
        message = failure(tmp_path, source)
        assert message.startswith("The reward 'f' ") and words in message and len(message) < 500
        assert "for the completion '<answer>3</answer>' of the problem 'Tom has 3 apples. How many?'" in message

    def test_name_the_sample_that_failed_and_not_another(self, tmp_path: Path):
        message = failure(tmp_path, "def f(completion, answer): return 1 / (answer != '4')")
        assert "for the completion 'It is four.' of the problem 'Ann has 4 pens. How many?'" in message

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            ("return [1.0]", "returned 1 numbers for 2 completions"),
            ("return [1.0] * 3", "returned 3 numbers for 2 completions"),
            ("return []", "returned 0 numbers for 2 completions"),
            ("return 1.0", "raised TypeError ('float' object is not iterable) for 2 completions"),
            ("return None", "raised TypeError ('NoneType' object is not iterable) for 2 completions"),
            ("return [1.0, 'x']", "returned 'x', no finite number, for the completion 'It is four.'"),
            ("return [float('nan'), 1]", "returned nan, no finite number, for the completion '<answer>3</answer>'"),
            ("return kwargs['nowhere']", "raised KeyError ('nowhere', my_rewards.py line 1) for 2 completions"),
            ("return completions[0]['content']", "raised TypeError (list indices must be integers"),
        ],
    )
    def test_of_a_batch_are_one_line_too(self, tmp_path: Path, body: str, words: str):
        assert words in failure(tmp_path, f"def f(completions, **kwargs): {body}")

    @pytest.mark.parametrize("parameters", ["text, truth", "completions, ground_truth"])
    def test_a_parameter_that_nothing_is_known_for_is_named(self, tmp_path: Path, parameters: str):
        assert parameters.split(", ")[1] in failure(tmp_path, f"def f({parameters}): return 1")

    def test_the_text_of_a_sample_cannot_reach_the_terminal_raw(self, tmp_path: Path):
        message = failure(tmp_path, "def f(completion): return None", ["\x1b[2J\r\nhello " * 100, ""])
        assert r"\x1b[2J\r\nhello" in message and len(message) < 400

    def test_the_full_traceback_goes_to_the_log_file_only(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        with caplog.at_level(logging.DEBUG):
            failure(tmp_path, "def helper():\n  return 1 / 0\ndef f(completion): return helper()")
        [record] = caplog.records
        assert record.levelno == logging.DEBUG and record.exc_info[0] is ZeroDivisionError

    def test_stopping_by_keyboard_is_no_failure_of_the_function(self, tmp_path: Path):
        rewards = load(tmp_path, "def f(completion): raise KeyboardInterrupt", "f")
        with pytest.raises(KeyboardInterrupt):
            rewards.score(TEXTS, PROBLEMS)

    def test_trying_out_shows_them_before_anything_is_computed(self, tmp_path: Path):
        with pytest.raises(RewardError, match="raised NameError"):
            load(tmp_path, "def f(completion): return undefined", "f").try_out(PROBLEMS)
        load(tmp_path, "def f(completion, answer): return answer in completion", "f").try_out(PROBLEMS[:1])
        load(tmp_path, TRL_STYLE, "tokens,right").try_out(PROBLEMS)


class TestChoice:
    def test_the_user_s_and_built_in_rewards_mix_in_the_order_named(self, tmp_path: Path):
        source = "def brevity(completion, answer): return len(completion)"
        rewards = load(tmp_path, source, "brevity=0.2,formatting=0.3,accuracy=2,reasoning")
        assert rewards.names == ["brevity", "formatting", "answer_accuracy", "reasoning"]
        assert rewards.weights == [0.2, 0.3, 2.0, 1.0]
        assert rewards.score(TEXTS, PROBLEMS)[0] == [18.0, 0.2, 1.0, 0.0]

    def test_a_name_in_the_file_comes_before_a_built_in_one(self, tmp_path: Path):
        rewards = load(
            tmp_path, "def accuracy(completion): return 5\ndef formatting(completion): return 6", "accuracy,formatting"
        )
        assert rewards.names == ["accuracy", "formatting"] and rewards.score(TEXTS, PROBLEMS)[0] == [5.0, 6.0]

    @pytest.mark.parametrize(
        ("names", "words"),
        [
            ("g", "names 'g', which is no function in"),
            ("f,", "names '', which is"),
            ("", "names '', which is"),
            ("x=1", "names 'x', which is no function in"),
            ("most", "names 'most', which is no function in"),
            ("f=1,f=2", "names 'f' twice"),
            ("accuracy,answer_accuracy", "names 'answer_accuracy' twice"),
            ("f=much", "gives 'f' the weight 'much': give a finite"),
            ("f=nan", "gives 'f' the weight 'nan': give a finite number"),
            ("f=inf", "gives 'f' the weight 'inf': give a finite number"),
            ("f=1=2", "gives 'f' the weight '1=2': give a finite"),
        ],
    )
    def test_what_does_not_fit_is_named(self, tmp_path: Path, names: str, words: str):
        with pytest.raises(UserError) as caught:
            load(tmp_path, "x, most = 3, max\ndef f(completion): return 1", names)
        assert words in str(caught.value) and "\n" not in str(caught.value)

    def test_a_file_name_without_a_colon_is_answered_with_the_form(self):
        with pytest.raises(UserError, match=r"'my_rewards.py', which is not built in: write FILE.py:NAME=WEIGHT"):
            choose_rewards("my_rewards.py")

    @pytest.mark.parametrize(
        ("source", "words"),
        [
            ("def f(:\n", "SyntaxError ("),
            ("import no_such_module", "ModuleNotFoundError (No module named 'no_such_module', my_rewards.py line 1)"),
            ("\n\n1 / 0", "ZeroDivisionError (division by zero, my_rewards.py line 3)"),
            ("exit(3)", "SystemExit (3"),
            ("x = '\0'", "SyntaxError ("),
        ],
    )
    def test_a_file_that_does_not_run_is_one_line(self, tmp_path: Path, source: str, words: str):
        with pytest.raises(UserError) as caught:
            load(tmp_path, source, "f")
        message = str(caught.value)
        assert "my_rewards.py' cannot be run: " in message and words in message and "\n" not in message

    def test_a_missing_file_or_a_folder_is_one_line(self, tmp_path: Path):
        for path in (tmp_path / "none.py", tmp_path):
            with pytest.raises(UserError, match=r"^The rewards file '.*' cannot be run: \w+Error \(.*\)\.$"):
                choose_rewards(f"{path}:f")

    def test_a_path_with_spaces_colons_and_other_letters_is_fine(self, tmp_path: Path):
        folder = tmp_path / "mes règles: 1, 2=3"
        folder.mkdir()
        assert column(folder, "def f(completion): return 1") == [1.0, 1.0]

    def test_the_fingerprint_is_of_what_ran_and_a_changed_file_is_run_anew(self, tmp_path: Path):
        first = load(tmp_path, "def f(completion): return 1", "f")
        second = load(tmp_path, "def f(completion): return 2", "f")
        again = load(tmp_path, "def f(completion): return 1", "f,formatting")
        assert first.fingerprint == again.fingerprint != second.fingerprint
        assert (first.score(TEXTS, PROBLEMS), second.score(TEXTS, PROBLEMS)) == ([[1.0]] * 2, [[2.0]] * 2)
        assert [path.name for path in tmp_path.iterdir()] == ["my_rewards.py"]


class TestTime:
    def test_a_slow_reward_is_named_once_and_again_when_it_gets_twice_as_slow(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ):
        now, durations = [0.0], iter([0.5, 1.5, 2.9, 1.2, 3.1, 0.1])

        def slow(completions: list[str], **columns: object) -> list[float]:
            now[0] += next(durations)
            return [0.0 for _ in completions]

        monkeypatch.setattr(time, "perf_counter", lambda: now[0])
        rewards = RewardSet((reward_set.Reward("slow", 1.0, slow), *built_in().rewards))
        for _ in range(6):
            rewards.score(TEXTS, PROBLEMS)
        assert caplog.messages == [f"the reward 'slow' took {s} s for 2 completions" for s in (1.5, 3.1)]

    def test_a_function_is_called_once_a_completion_and_looked_at_once(self, monkeypatch: pytest.MonkeyPatch):
        looked_at, called, signature = [], [], reward_set.inspect.signature
        monkeypatch.setattr(reward_set.inspect, "signature", lambda f: looked_at.append(f) or signature(f))
        rewards = RewardSet((reward_set.Reward("f", 1.0, lambda completion, answer: called.append(answer) or 1.0),))
        rewards.score(TEXTS * 500, PROBLEMS * 500)
        assert len(called) == 1000 and len(looked_at) == 1
