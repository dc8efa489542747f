"""Evaluation: every problem is answered and scored once, whatever finishes first; the measures by hand."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from src.data import Example, encode_prompts
from src.engine.kv_cache import unpad
from src.engine.sampling import Sampler, decode
from src.evaluation import Evaluation, Scored, evaluate, fixed_subset, last_number_is, majority
from src.rewards import REWARD_FUNCTIONS, has_calculation
from src.seeding import generator
from tests.helpers import score, tiny_model, word_tokenizer

TOKENIZER = word_tokenizer()
NAMES = [function.__name__ for function in REWARD_FUNCTIONS]
EXAMPLES = [Example(f"Tom has {n} apples . How many now ?", "", "", str(n % 7)) for n in range(11)]
TOKENS = 12


def make_sampler(rows: int = 64) -> Sampler:
    model = tiny_model(vocab_size=len(TOKENIZER))
    return Sampler(model, [TOKENIZER.eos_token_id, 10, 20], TOKENIZER.pad_token_id, rows)


def answered(completion: str, answer: str = "72") -> Scored:
    scores = dict(zip(NAMES, score([completion], [answer])[0], strict=True))
    right = scores["answer_accuracy"] == 1
    return Scored(
        Example("q", "", "", answer), completion, 5, False, scores, right, last_number_is(completion, answer), False
    )


def votes(*answers: str, truth: str = "72") -> list[Scored]:
    return [answered(f"<answer>{answer}</answer>" if answer else "72", truth) for answer in answers]


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.0), (3, 1.0)])
def test_every_answer_is_the_samplers_scored_once_and_in_order(k: int, temperature: float) -> None:
    seen: list[Scored] = []
    result = evaluate(
        make_sampler(rows=4), TOKENIZER, EXAMPLES, TOKENS, k=k, temperature=temperature, seed=5, on_progress=seen.extend
    )
    prompts = encode_prompts(TOKENIZER, [example.question for example in EXAMPLES])
    uniforms = torch.rand(len(EXAMPLES) * k, TOKENS, generator=generator(5, "evaluation"))
    expected = make_sampler().generate(
        prompts, group_size=k, max_new_tokens=TOKENS, temperature=temperature, uniforms=uniforms
    )
    texts = decode(TOKENIZER, unpad(expected.ids, expected.mask))
    answers = [e.answer for e in EXAMPLES for _ in range(k)]
    assert [s.completion for s in result.scored] == texts
    assert [s.example for s in result.scored] == [e for e in EXAMPLES for _ in range(k)]
    assert [list(s.rewards.values()) for s in result.scored] == score(texts, answers)
    assert [s.tokens for s in result.scored] == expected.mask.sum(-1).tolist()
    assert [s.truncated for s in result.scored] == expected.truncated.tolist()
    assert 0 < sum(s.truncated for s in result.scored) < len(result.scored)
    assert sorted(map(id, seen)) == sorted(map(id, result.scored))
    assert [len(answers) for answers in result.problems()] == [k] * len(EXAMPLES)


def test_the_same_seed_gives_the_same_answers_and_another_seed_others() -> None:
    runs = [evaluate(make_sampler(), TOKENIZER, EXAMPLES, TOKENS, k=2, temperature=1.0, seed=s) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_metrics_are_means_over_problems_with_intervals() -> None:
    right, wrong = answered("<answer>72</answer>"), answered("so 72 apples")
    exact = replace(right, formatted=True, tokens=15, truncated=True)
    metrics = Evaluation([right, wrong, exact, wrong]).metrics([1, 0, 0, 2])
    assert metrics["eval/accuracy"] == 0.5 and metrics["eval/accuracy_lenient"] == 1.0
    assert metrics["eval/format_rate"] == 0.25
    assert (metrics["eval/accuracy_low"], metrics["eval/accuracy_high"]) == pytest.approx((0.1500, 0.8500), abs=5e-4)
    low, high = metrics["eval/accuracy_lenient_low"], metrics["eval/accuracy_lenient_high"]
    assert (low, high) == pytest.approx((0.5101, 1.0), abs=5e-4)
    assert metrics["eval/reward"] == pytest.approx((0.2 + 2 + 0.2 + 2) / 4)  # one field of three filled: a fifth
    assert metrics["eval/completion_tokens"] == 7.5 and metrics["eval/truncated"] == 0.25
    assert metrics["eval/samples"] == 4 and metrics["eval/reasoning_without_calculation"] == 1
    assert not any("@" in name for name in metrics)


def test_with_k_answers_pass_at_k_and_majority_are_measured_by_problem() -> None:
    first = votes("72", "5", "72", "6", "72", "7")  # 3 of 6 right, the majority right
    second = votes("5", "72", "5", "", "6", "7")  # 1 of 6 right, the majority wrong
    evaluation = Evaluation(first + second, k=6)
    measures = evaluation.measures()
    assert measures["accuracy"] == pytest.approx([3 / 6, 1 / 6])
    assert measures["pass@2"] == pytest.approx([1 - 3 / 15, 1 - 10 / 15])
    assert measures["pass@4"] == pytest.approx([1.0, 1 - 5 / 15])
    assert measures["pass@6"] == [1.0, 1.0]
    assert measures["majority@6"] == [1.0, 0.0]
    metrics = evaluation.metrics([1, 1, 1, 1])
    assert metrics["eval/samples"] == 2 and metrics["eval/majority@6"] == 0.5
    assert metrics["eval/pass@2_low"] < metrics["eval/pass@2"] < metrics["eval/pass@2_high"]


CALCULATIONS = """
3+4=7|5 boxes * 4 pens = 20 pens|$5 x 3 = $15|3x4=12|6÷2=4|5 × 3=15|48/2 = 24|10 - 4 = 6|3 times 4 = 12
\\frac{48}{2} = 24|3 \\times 4 = 12|(3 + 4) * 2 = 15|$5/hour * 3 hours = $15|1,080 - 80 = 1,000
x = 3 * 4 = 12|-5 + 3 = -2
"""
NO_CALCULATIONS = """
8|The answer is 8.|The answer = 8|x = 5|3 + 4|3 + 4 is 7|5 boxes = 5|2x = 6|a + b = 5|= 3 + 4|-5 = -5|a 12-hour day = 12
"""


def test_a_calculation_is_numbers_an_operation_and_an_equals_sign_in_the_reasoning_field() -> None:
    right, wrong = (texts.strip().replace("\n", "|").split("|") for texts in (CALCULATIONS, NO_CALCULATIONS))
    form = "<reasoning>First\n{}\nand so on</reasoning><output>4 + 4 = 8</output><answer>8</answer>"
    assert [text for text in right if not has_calculation(form.replace("{}", text))] == []
    assert [text for text in wrong if has_calculation(form.replace("{}", text))] == []
    assert not has_calculation("3 + 4 = 7") and not has_calculation("<reasoning>3 + 4 = 7")
    scored = [answered(form.replace("{}", text)) for text in ("3+4=7", "8", "3 + 4 = 7", "7 - 3 = 4")]
    assert Evaluation(scored).metrics([1, 1, 1, 1])["eval/reasoning_without_calculation"] == 0.25


@pytest.mark.parametrize(
    ("answers", "truth", "share"),
    [
        (["72", "72.0", "5", "5", "$72"], "72", 1.0),  # equal numbers vote together, however they are written
        (["72", "5", "72", "5"], "72", 0.5),  # a tie
        (["72", "5", "6"], "72", 1 / 3),
        (["", "", "", "72"], "72", 1.0),  # without an answer field there is no vote
        (["7 and 2", "", "72"], "72", 1.0),  # two numbers are no answer
        (["", ""], "72", 0.0),
        (["0", "0", "5"], "0", 1.0),
        (["Paris", "paris.", "Rome"], "Paris", 1.0),
        (["x+1", "y+1", "y+1"], "x+1", 0.0),
    ],
)
def test_the_most_frequent_answer_wins(answers: Sequence[str], truth: str, share: float) -> None:
    assert majority(votes(*answers, truth=truth)) == pytest.approx(share)


def test_a_comparison_is_paired_by_problem() -> None:
    right, wrong = answered("<answer>72</answer>"), answered("so 72 apples")
    d = Evaluation([right, right, right, wrong]).compare(Evaluation([wrong, wrong, right, right]))
    assert (d["accuracy"].difference, d["accuracy"].gained, d["accuracy"].lost) == (0.25, 2, 1)
    assert d["accuracy_lenient"].gained == d["accuracy_lenient"].lost == 0


def test_a_subset_is_fixed_by_the_questions_and_the_seed() -> None:
    chosen = fixed_subset(EXAMPLES, 5)
    assert chosen == fixed_subset(EXAMPLES[::-1], 5) == fixed_subset(EXAMPLES, 8)[:5]
    assert chosen != EXAMPLES[:5] and fixed_subset(EXAMPLES, 5, seed=1) != chosen
    left_out = [example for example in EXAMPLES if example != chosen[0]]
    assert fixed_subset(left_out, 4) == chosen[1:]


def test_all_problems_keep_their_order() -> None:
    assert fixed_subset(EXAMPLES, 0) == EXAMPLES
    assert sorted(fixed_subset(EXAMPLES, 100), key=EXAMPLES.index) == EXAMPLES
