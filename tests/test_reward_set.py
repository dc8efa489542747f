"""Rewards of the user's own: every kind of function, TRL's unchanged, and how they are chosen."""

import logging
import re
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from src import reward_set
from src.data import Example
from src.errors import UserError
from src.reward_set import RewardError, RewardSet, built_in, choose_rewards
from src.rewards import DEFAULT_WEIGHTS, REWARD_FUNCTIONS

PROBLEMS = [
    Example("Tom has 3 apples. How many?", "He has 3.", "He has 3.", "3", {"level": 1, "topic": "fruit"}),
    Example("Ann has 4 pens. How many?", "She has 4.", "She has 4.", "4", {"level": 2, "topic": "ink"}),
]
TEXTS, IDS = ["<answer>3</answer>", "It is four."], [[5, 6, 1], [7, 1]]


def write(tmp_path: Path, source: str) -> str:
    path = tmp_path / "my_rewards.py"
    path.write_text(source, encoding="utf-8")
    return str(path)


def load(tmp_path: Path, source: str, names: str) -> RewardSet:
    return choose_rewards(f"{write(tmp_path, source)}:{names}")


def column(tmp_path: Path, source: str, name: str = "f") -> list[float]:
    """What the function `name` of this file gives each of TEXTS."""
    return [row[0] for row in load(tmp_path, source, name).score(TEXTS, PROBLEMS, IDS)]


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


def test_the_page_s_example_with_math_verify_tells_equal_expressions(tmp_path: Path):
    pytest.importorskip("math_verify")
    page = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text(encoding="utf-8")
    [source] = re.findall(r"```python\n(from math_verify.*?)```", page, re.DOTALL)
    truths = {
        r"\sqrt{12}": [r"2\sqrt{3}", r"2\sqrt{2}"],
        "(x+1)^2": ["x^2+2x+1", "x^2+1"],
        "[1,2)": ["[1, 2)", "[1,2]"],
    }
    for truth, answers in truths.items():
        texts = [f"<answer>{answer}</answer>" for answer in answers]
        scores = load(tmp_path, source, "same_value").score(texts, [Example("Q?", "", "", truth)] * 2)
        assert scores == [[1.0], [0.0]]


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

    def test_text_is_tried_first_then_messages_and_the_log_says_which(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        source = TRL_STYLE + "def salt(completions, **kwargs): return [float('content' in c) for c in completions]\n"
        with caplog.at_level(logging.INFO):
            rewards = load(tmp_path, source, "length,has_answer,right,tokens,salt")
            rewards.try_out(PROBLEMS)
            rewards.try_out(PROBLEMS)
        text, chat = "plain text", "messages: text fails"
        given = {"length": text, "has_answer": chat, "right": chat, "tokens": text, "salt": text}
        assert caplog.messages == [f"the reward '{name}' is given {what}" for name, what in given.items()]
        assert [row[4] for row in rewards.score(["the salt content", "no"], PROBLEMS, IDS)] == [1.0, 0.0]

    def test_a_function_that_took_text_is_never_given_messages_later(self, tmp_path: Path):
        source = "def f(completions, **kwargs): return [c['a'] if 'b' in c else c.index('a') for c in completions]"
        rewards = load(tmp_path, source, "f")
        rewards.score(["a", "xa"], PROBLEMS)
        with pytest.raises(RewardError, match="string indices must be integers"):
            rewards.score(["a", "b"], PROBLEMS)

    @pytest.mark.parametrize(
        ("definition", "expected"),
        [
            (
                "class J:\n  def __call__(self, prompts, completions, **kwargs): return read(completions)\nf = J()",
                [1, 0],
            ),
            ("class J:\n  def score(self, completions, **kwargs): return read(completions)\nf = J().score", [1, 0]),
            ("class J:\n  @staticmethod\n  def score(completions): return read(completions)\nf = J.score", [1, 0]),
            ("def g(completions, n, **k): return [n * x for x in read(completions)]\nf = partial(g, n=2)", [2, 0]),
            ("def f(**kwargs): return read(kwargs['completions'])", [1, 0]),
            ("@logged\ndef f(completions, level, **kwargs): return level", [1, 2]),
            ("f = lambda completions, **kwargs: [len(c[0]['content']) for c in completions]", [18, 11]),
            ("def f(completions, log_metric=None, **kwargs): return read(completions)", [1, 0]),
        ],
    )
    def test_instances_partials_methods_and_wrapped_functions_work(
        self, tmp_path: Path, definition: str, expected: list[float]
    ):
        source = """
from functools import partial
def read(chats): return [float('3' in chat[0]['content']) for chat in chats]
def logged(function):
    def inner(*args, **kwargs): return function(*args, **kwargs)
    return inner
"""
        assert column(tmp_path, source + definition) == expected


class TestTheData:
    """What a function does to what it is given reaches neither the data nor another completion."""

    PROBLEMS = [Example("Q?", "", "", "1", {"hints": ["a", "b"], "meta": {"n": [1]}})] * 2

    @pytest.mark.parametrize(
        "source",
        [
            "def f(completions, hints, **k): return [len(h) + bool(h.pop()) for h in hints]",
            "def f(completions, meta): return [1 + m['n'].pop() + len(m['n']) for m in meta]",
            "def f(completion, example): return len(example.columns['hints']) if example.columns.pop('meta') else 0",
            "def f(completion, **rest): return rest['example'].columns['hints'].pop() and 2",
            "def f(completion_ids): return [i.pop() and 2 for i in completion_ids]",
            "def f(completions): return [c[0].pop('content') and c.clear() or 2 for c in completions]",
        ],
    )
    def test_is_the_same_at_every_call(self, tmp_path: Path, source: str):
        rewards, ids = load(tmp_path, source, "f"), [[1, 2, 3], [4, 5, 6]]
        first = rewards.score(TEXTS, self.PROBLEMS, ids)
        assert rewards.score(TEXTS, self.PROBLEMS, ids) == first and len({row[0] for row in first}) == 1
        assert self.PROBLEMS[0].columns == {"hints": ["a", "b"], "meta": {"n": [1]}} and ids == [[1, 2, 3], [4, 5, 6]]


class TestChoice:
    def test_the_user_s_and_built_in_rewards_mix_in_the_order_named(self, tmp_path: Path):
        source = "def brevity(completion, answer): return len(completion)"
        rewards = load(tmp_path, source, "brevity=0.2,formatting=0.3,accuracy=2,reasoning")
        assert rewards.names == ["brevity", "formatting", "answer_accuracy", "reasoning"]
        assert rewards.weights == [0.2, 0.3, 2.0, 1.0]
        assert rewards.score(TEXTS, PROBLEMS)[0] == [18.0, 0.2, 1.0, 0.0]

    def test_a_name_in_the_file_comes_before_a_built_in_one(self, tmp_path: Path):
        source = "def accuracy(completion): return 5\ndef formatting(completion): return 6"
        rewards = load(tmp_path, source, "accuracy,formatting")
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

    def test_a_module_beside_the_file_can_be_imported_at_once_and_later(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(sys, "path", list(sys.path))
        (tmp_path / "beside_it.py").write_text("def grade(text): return len(text)", encoding="utf-8")
        at_once = "from beside_it import grade\ndef f(completion): return grade(completion)"
        assert column(tmp_path, at_once) == [18.0, 11.0]
        later = "def f(completion):\n  import beside_it\n  return beside_it.grade(completion)"
        assert column(tmp_path, later) == [18.0, 11.0]

    def test_the_fingerprint_is_of_what_ran_and_a_changed_file_is_run_anew(self, tmp_path: Path):
        first = load(tmp_path, "def f(completion): return 1", "f")
        second = load(tmp_path, "def f(completion): return 2", "f")
        again = load(tmp_path, "def f(completion): return 1", "f,formatting")
        assert first.fingerprint == again.fingerprint != second.fingerprint
        assert (first.score(TEXTS, PROBLEMS), second.score(TEXTS, PROBLEMS)) == ([[1.0]] * 2, [[2.0]] * 2)
        assert [path.name for path in tmp_path.iterdir()] == ["my_rewards.py"]


def test_a_function_is_called_once_a_completion_and_looked_at_once(monkeypatch: pytest.MonkeyPatch):
    looked_at, called, signature = [], [], reward_set.inspect.signature
    monkeypatch.setattr(reward_set.inspect, "signature", lambda f: looked_at.append(f) or signature(f))
    rewards = RewardSet((reward_set.Reward("f", 1.0, lambda completion, answer: called.append(answer) or 1.0),))
    rewards.score(TEXTS * 500, PROBLEMS * 500)
    assert len(called) == 1000 and len(looked_at) == 1
