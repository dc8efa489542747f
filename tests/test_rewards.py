"""Rewards: tables of cases worked out by hand, and properties of any text."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.rewards import (
    DEFAULT_WEIGHTS,
    REWARD_FUNCTIONS,
    TAGS,
    Fields,
    answer_accuracy,
    formatting,
    output_consistency,
    parse_completion,
    reasoning,
)
from tests.helpers import LONG, no_hang, score

CLIPS = "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May."
APPLES = "Tom has 3 apples. He buys 4 more. 3 + 4 = 7. He eats 2. 7 - 2 = 5."


def complete(reasoning: str = CLIPS, output: str = CLIPS.splitlines()[-1], answer: str = "72") -> str:
    return f"<reasoning>{reasoning}</reasoning> <output>{output}</output> <answer>{answer}</answer>"


def total(completion: str, answer: str) -> float:
    [rewards] = score([completion], [answer])
    return sum(weight * reward for weight, reward in zip(DEFAULT_WEIGHTS, rewards, strict=True))


# The scorer


def test_a_perfect_completion_earns_every_reward_in_full():
    assert score([complete()], ["72"]) == [[1.0, 1.0, 1.0, 1.0]]
    assert total(complete(), "72") == pytest.approx(3.3)


def test_score_has_a_row_per_completion_and_a_column_per_reward():
    assert score([complete(), "72", complete(answer="71")], ["72"] * 3) == [
        [1.0, 1.0, 1.0, 1.0],
        [0.0, 0.0, 0.0, 0.0],
        [1.0, 0.25, 0.0, 0.0],  # the sums do not lead to 71
    ]
    names = [reward.__name__ for reward in REWARD_FUNCTIONS]
    assert names == ["formatting", "reasoning", "output_consistency", "answer_accuracy"]


def test_score_of_nothing_is_nothing():
    assert score([], []) == []


def test_score_refuses_a_different_number_of_answers():
    with pytest.raises(ValueError):
        score([complete(), complete()], ["72"])


def test_a_wrong_answer_never_out_earns_a_right_well_formed_one():
    right = [
        complete(),
        complete("-1", "-1", "72"),
        complete("a", "b", "$72.00"),
        complete(APPLES, "So 5.", "72 clips"),
    ]
    wrong = [complete(answer=answer) for answer in ("71", "-72", "7.2", "72 or 71", "48+24", "many")]
    wrong += [
        complete(APPLES, "7 - 2 = 5.", "5"),
        complete() + complete(),
        complete().replace("</answer>", ""),
        "72",
        "",
    ]
    for better, worse in product(right, wrong):
        assert total(better, "72") >= 2.3 > 1.3 >= total(worse, "72")


# Fields


def test_fields_are_found_in_any_order_and_between_other_text():
    text = "Sure! <answer>5</answer><reasoning>r\n</reasoning> so <output></output>"
    assert parse_completion(text) == Fields(reasoning="r\n", output="", answer="5")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "<answer>5",
        "5</answer>",
        "</answer>5<answer>",
        "<answer>5</answer><answer>5</answer>",
        "<answer><answer>5</answer>",
        "<answer>5</answer></answer>",
        "<ANSWER>5</ANSWER>",
        "< answer >5</ answer >",
    ],
)
def test_a_field_that_is_missing_repeated_or_broken_is_none(text):
    assert parse_completion(text).answer is None
    assert answer_accuracy(text, "5") == 0.0


# formatting

FORMATTING = [
    (complete(), 1.0),
    ("\n<reasoning>a</reasoning><output>b</output>\n\n<answer>c</answer> \t", 1.0),
    (complete(answer="7"), 1.0),  # short answers are answers
    ("Sure! " + complete(), 0.8),
    (complete() + " I hope this helps.", 0.8),
    (complete().replace("<output>", "so <output>"), 0.8),
    ("<answer>72</answer> <reasoning>a</reasoning> <output>b</output>", 0.6),
    ("<reasoning>a <output>b</output> <answer>c</answer> </reasoning>", 0.6),
    ("<reasoning>a <output>b</reasoning> c</output> <answer>d</answer>", 0.6),
    (complete(output=" \n"), 0.4),
    ("<reasoning>a</reasoning> <answer>72</answer>", 0.4),
    (complete().replace("</answer>", ""), 0.4),
    (complete() + "<answer>72</answer>", 0.4),
    ("<reasoning>a</reasoning>", 0.2),
    (complete() + complete(), 0.0),
    (complete("", "", ""), 0.0),
    ("".join(TAGS) * 100, 0.0),
    ("The answer is 72.", 0.0),
    ("", 0.0),
]


@pytest.mark.parametrize(("completion", "expected"), FORMATTING)
def test_formatting_gives_a_fifth_for_each_field_their_order_and_nothing_around_them(completion, expected):
    assert formatting(completion, "72") == expected


def test_formatting_grows_as_the_format_is_built_up():
    stages = ["", "<reasoning>a</reasoning>", "<reasoning>a</reasoning> <output>b</output>", complete()]
    assert [formatting(stage, "") for stage in stages] == [0.0, 0.2, 0.4, 1.0]


@pytest.mark.parametrize(("completion", "expected"), FORMATTING)
@pytest.mark.parametrize("tag", TAGS)
def test_one_more_tag_never_earns_more_than_the_format_it_repeats(completion, expected, tag):
    if tag in completion:
        assert formatting(tag + completion, "") <= expected
        assert formatting(completion + tag, "") <= expected
        assert formatting(completion.replace(tag, tag + tag), "") <= expected


# reasoning


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (APPLES, 1.0),
        ("3 + 4 = 7, 7 - 2 = 5", 1.0),
        ("3 ÷ 2 equals 1.5\n1.5 plus 3.5 equals 5", 1.0),
        ("Tom has 3 apples. He finds 2 more. 3 + 2 = 5.", 0.75),  # one step, and statements, once
        ("Tom has 3 apples. 3 + 2 = 5.", 0.75),
        ("3 + 2 = 5.", 0.5),
        ("x + 5 = 2x", 0.0),  # cannot be judged, and has no words
        ("x + 5 = 2x. x = 5", 0.5),  # can: a step
        ("So Tom has x + 5 = 2x", 0.25),  # a statement
        ("5 + 0 = 5. 5 * 1 = 5", 0.0),  # finds nothing
        ("3 + 2 = 6. 6 - 1 = 5.", 0.5),  # the first is wrong
        ("3 + 4 = 7. 9 - 4 = 5.", 0.75),  # the first is right but leads nowhere
        ("7 - 2 = 5. 3 + 4 = 7.", 0.75),  # what is used comes first
        ("Tom has 3 apples. He buys 4 more. He eats 2. How many are left?", 0.25),  # the question, copied
        ("1\n2\n3\n4\n5\n6\n7\n8\n9", 0.0),
        ("1 = 2. 3 = 4.", 0.0),  # no operation, no words
        ("2 boxes = 6", 0.25),
        ("2.5 x 2 = 5", 0.5),
        ("5", 0.0),
        ("3 + 4 and - 7", 0.0),
        (r"\frac{15 \text{ days}}{3 \text{ days}} = 5", 0.5),
        (r"\frac{15 \text{ days}}{3 \text{ days}} = 6", 0.0),
        (r"\text{Days} = \dfrac{3 \times 10}{\frac{12}{2}} = 5", 0.5),
        ("First, we add. Then, we multiply. Therefore, the total is many.", 0.0),
        ("step by step reasoning because therefore thus = + - * /", 0.0),
        ("Seven apples, of course. " * 100, 0.0),
        (" " * 1000, 0.0),
        ("", 0.0),
    ],
)
def test_reasoning_gives_half_for_a_step_to_the_answer_and_a_quarter_for_a_statement(text, expected):
    assert reasoning(complete(text, answer="5"), "the expected answer plays no part") == expected


@pytest.mark.parametrize("answer", ["", "many", "4 or 5", "Paris"])
def test_without_a_number_in_the_answer_the_last_right_calculation_is_what_steps_lead_to(answer):
    assert reasoning(complete(APPLES, answer=answer), "5") == 1.0
    assert reasoning(complete(APPLES, answer=answer).replace("</answer>", ""), "5") == 1.0
    assert reasoning(complete("3 + 4 = 7. 7 - 2 = 5. 1 + 1 = 2", answer=answer), "5") == 0.75  # to 2
    assert reasoning(complete("3 + 4 = 7. 1 + 1 = 3", answer=answer), "5") == 0.5


def test_statements_alone_earn_less_than_a_step_however_many_they_are():
    many = " ".join(f"He has {i} apples." for i in range(50))
    assert 0 < reasoning(complete(many, answer="5"), "") < reasoning(complete("3 + 2 = 5", answer="5"), "")


@pytest.mark.parametrize("text", ["3 + 4 = 7.", "Tom has 3 apples.", "Tom has 3 apples. He buys 4 more.", "Hello."])
def test_repetition_padding_and_rewording_earn_nothing(text):
    for longer in (f"{text} " * 50, text + " " * 5000, text + " and so on" * 500, text + f"\nAgain: {text} Yes!"):
        assert reasoning(complete(longer), "") == reasoning(complete(text), "")


def test_work_counts_only_inside_one_reasoning_field():
    assert reasoning(APPLES, "5") == 0.0
    assert reasoning(complete("none", APPLES), "5") == 0.0
    assert reasoning(complete(APPLES) + complete(APPLES), "5") == 0.0


# output_consistency


@pytest.mark.parametrize(
    ("text", "output", "answer", "expected"),
    [
        (CLIPS, "Natalia sold 48+24 = 72 clips altogether in April and May.", "72", 1.0),
        (CLIPS, "She sold 72 clips.", "$72.00", 1.0),
        (CLIPS, "72", "72", 1.0),
        ("80 000 + 20 000 = $100 000.", "It costs $100,000.", "100000", 1.0),
        ("10/4 = 2.5, so in 2 weeks it is 2.5", "2.5", "5/2", 1.0),
        ("3*50 = 150. 2*40 = 80. The most is 150.", "150", "150", 1.0),  # the end says what a step found
        ("3*50 = 150. 2*40 = 80.", "150", "150", 0.0),
        (CLIPS, "She sold 72 clips.", "71", 0.0),  # the answer says something else
        (CLIPS, "She sold 71 clips.", "71", 0.0),  # so does the reasoning
        (CLIPS, "She sold 71 clips.", "72", 0.0),  # so does the output
        (CLIPS, "She sold 72 clips.", "7", 0.0),  # part of a number is another number
        (CLIPS, "She sold 72 clips.", "70 or 72", 0.0),
        (CLIPS, "She sold many clips.", "72", 0.0),
        (CLIPS, "48+25 = 72", "72", 0.0),  # a wrong calculation
        ("48+24 = 71", "71", "71", 0.0),
        ("72", "72", "72", 0.0),  # nothing is concluded
        ("She sold 72 clips.", "72", "72", 0.0),
        ("72 + 0 = 72.", "72", "72", 0.0),
        ("None.", "She sold 72 clips.", "72", 0.0),
        (CLIPS, "...", "72", 0.0),
        ("", "72", "72", 0.0),
        (CLIPS, "72", " ", 0.0),
    ],
)
def test_output_consistency_rewards_one_number_in_all_fields_that_the_reasoning_calculates(
    text, output, answer, expected
):
    assert output_consistency(complete(text, output, answer), "the expected answer plays no part") == expected


@pytest.mark.parametrize(
    ("text", "output", "answer", "expected"),
    [
        ("It is the capital, so it is Paris.", "It is Paris.", "paris", 0.25),
        ("It is the capital, so it is Paris.", "It is London.", "Paris", 0.0),
        ("It is the capital, so it is Paris.", "It is London.", "London", 0.0),
        ("Paris.", "Paris.", "Paris", 0.0),  # nothing is concluded
        ("It is the end, so it is there.", "There", "e", 0.0),
    ],
)
def test_agreement_in_words_earns_a_quarter_where_no_number_is_expected(text, output, answer, expected):
    assert output_consistency(complete(text, output, answer), "London") == expected
    assert output_consistency(complete(text, output, answer), "72") == 0.0


def test_output_consistency_needs_all_three_fields():
    assert output_consistency("<output>72</output> <answer>72</answer>", "72") == 0.0
    assert output_consistency(complete() + "<output>72</output>", "72") == 0.0


# answer_accuracy


def test_accuracy_reads_the_answer_field_alone():
    assert answer_accuracy(complete("71", "71", "72"), "72") == 1.0
    assert answer_accuracy(complete("72", "72", "71"), "72") == 0.0
    assert answer_accuracy("Well: <answer>72</answer>", "72") == 1.0
    assert answer_accuracy("<answer>72</answer> <answer>72</answer>", "72") == 0.0
    assert answer_accuracy("#### 72", "72") == 0.0


# Any text

PIECES = [*TAGS, *"0123456789 \n.,-/=+$%eExX(){}\\½²٣－\ud800", "\\frac{", "1/2", " and ", "3 + 4 = 7", "Paris"]
ANY_TEXT = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=40).map("".join))


@settings(derandomize=True, database=None, max_examples=200, deadline=None)
@given(st.one_of(ANY_TEXT, st.builds(complete, ANY_TEXT, ANY_TEXT, ANY_TEXT)), ANY_TEXT)
def test_any_text_earns_a_number_between_0_and_1(completion, answer):
    [rewards] = score([completion], [answer])
    assert all(isinstance(reward, float) and 0 <= reward <= 1 for reward in rewards)


@pytest.mark.parametrize(
    "unit",
    [
        "<reasoning>",
        "".join(TAGS),
        "7",
        " ",
        "1,000",
        "-",
        "\\frac{1}{",
        "3 + 4 = 7. ",
        "(",
        "=",
        "x = 1\n",
        "1%+1 = 1\n",
        "x = -12345678.1234567\n" + "x=" * 98 + "1\n",
    ]
    + [f"{line} = 1\n" for line in ("9*" * 98 + "9", "(1" * 65 + ")" * 65, "1" + " a.b" * 45, "1 a a " * 32)],
)
def test_a_long_text_of_anything_is_scored_in_linear_time(unit):
    flood = unit * (LONG // len(unit))
    third = flood[: len(flood) // 3]
    for completion in (flood, complete(third, third, third)):
        for reward in REWARD_FUNCTIONS:
            with no_hang():
                assert 0 <= reward(completion, "72") <= 1
