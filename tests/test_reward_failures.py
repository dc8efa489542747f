"""Everything that can be wrong with a reward of the user's own: one line each."""

import logging
from pathlib import Path

import pytest

from src.errors import UserError
from src.reward_set import RewardError
from tests.test_reward_set import IDS, PROBLEMS, TEXTS, TRL_STYLE, load


def failure(tmp_path: Path, source: str, texts: list[str] = TEXTS) -> str:
    """The one line that scoring with the function `f` of this file ends in."""
    with pytest.raises(RewardError) as caught:
        load(tmp_path, source, "f").score(texts, PROBLEMS, IDS)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    return str(caught.value)


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
            ("return completions[0]['content']", "raised TypeError (string indices must be integers"),
        ],
    )
    def test_of_a_batch_are_one_line_too(self, tmp_path: Path, body: str, words: str):
        assert words in failure(tmp_path, f"def f(completions, **kwargs): {body}")

    @pytest.mark.parametrize(
        ("parameters", "unknown", "known"),
        [
            ("text, truth", "text", "completion, answer, question, example;"),
            ("data_source, solution_str, ground_truth, extra_info=None", "data_source", "example; TRL's"),
            ("completions, ground_truth", "ground_truth", "level, topic, question, answer, prompts, completions"),
            ("completions, log_metric, **kwargs", "log_metric", "TRL's log_metric and verl's parameters are not"),
        ],
    )
    def test_a_parameter_that_nothing_is_known_for_is_named(
        self, tmp_path: Path, parameters: str, unknown: str, known: str
    ):
        message = failure(tmp_path, f"def f({parameters}): return 1")
        assert f"The reward 'f' cannot be called (missing a required argument: '{unknown}')" in message
        assert known in message

    @pytest.mark.parametrize(
        "source",
        [
            "async def f(completions, **kwargs): return [1.0 for _ in completions]",
            "class J:\n  async def __call__(self, completions): return [1.0]\nf = J()",
            "from functools import partial\nasync def g(completion, n): return n\nf = partial(g, n=1)",
        ],
    )
    def test_an_asynchronous_function_is_refused_by_name(self, tmp_path: Path, source: str):
        with pytest.raises(UserError, match="names 'f', which is asynchronous: make it a plain function"):
            load(tmp_path, source, "f")

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
