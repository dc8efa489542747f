"""Completions that try to earn what they have not done, and honest ones in odd clothes, with what each must earn.

Checked by hand against docs/rewards.md. A row: the text, its four marks (formatting, reasoning, consistency, accuracy),
and why. What the text is, whole completion, reasoning, output or answer, stands at the head of its table, and the rest
of the completion is the base's.
"""

from collections.abc import Callable
from typing import NamedTuple

QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)
STEPS = "48/2 = 24 clips in May.\n48+24 = 72 clips altogether."
SAYS = "She sold 72 clips altogether."
PRICE = "20*50 = 1000 dollars.\n1000+80 = 1,080 dollars."  # for answers with thousands


class Case(NamedTuple):
    kind: str
    completion: str
    truth: str
    marks: tuple[float, float, float, float]
    why: str


def complete(reasoning: str = STEPS, output: str = SAYS, answer: str = "72") -> str:
    return f"<reasoning>{reasoning}</reasoning> <output>{output}</output> <answer>{answer}</answer>"


def whole(text: str) -> str:
    return text


def reasoned(text: str) -> str:
    return complete(reasoning=text)


def said(text: str) -> str:
    return complete(output=text)


def answered(text: str) -> str:
    return complete(answer=text)


def priced(text: str) -> str:
    return complete(PRICE, "It costs 1,080 dollars.", text)


GOOD = complete()
SYSTEM_FORM = [
    complete(
        "the steps, one calculation a line",
        "the last step once more",
        PLACE := "the result as just the number, without words or units",
    ),
    complete("your steps", "one sentence that states the result", PLACE),
]
EXAMPLE = """\
The school has 6 * 20 = 120 pens.
The classes get 4 * 15 = 60 pens.
There are 120 - 60 = 60 pens for the teachers.
Each teacher gets 60 / 12 = 5 pens."""
BIG = "7" * 10_000
Row = tuple[str, tuple[float, float, float, float], str]

TABLES: dict[str, tuple[Callable[[str], str], str, list[Row]]] = {
    "the base": (
        whole,
        "72",
        [
            (GOOD, (1, 1, 1, 1), "two right steps that lead to the right answer"),
            (complete(PRICE, "It costs 1,080 dollars.", "72"), (1, 0.25, 0, 1), "the sums lead to another number"),
            (complete("-", "-", "72"), (0.2, 0, 0, 1), "a dash fills no field"),
            (complete("a", "b", "72"), (1, 0, 0, 1), "the form alone, and the right answer"),
            (complete(answer="70"), (1, 0.25, 0, 0), "a slip at the end: the sums do not lead to 70"),
        ],
    ),
    "keyword stuffing": (
        reasoned,
        "72",
        [
            ("First, therefore, because, thus, step by step.", (1, 0, 0, 1), "words without numbers show no work"),
            ("= + - * / = = =", (0.4, 0, 0, 1), "signs alone fill no field"),
            ("Let us think step by step. " * 40, (1, 0, 0, 1), "the same, forty times"),
            (
                "Step 1: Read. Step 2: Think. Step 3: Done.",
                (1, 0.25, 0, 1),
                "a number and words: a statement, a quarter",
            ),
            ("reasoning output answer formatting", (1, 0, 0, 1), "the names of the fields"),
            ("I calculate. I add. I multiply. The sum is right.", (1, 0, 0, 1), "talk about sums"),
            ("1. 2. 3. 4. 5. 6. 7. 8.", (1, 0, 0, 1), "a list of digits states nothing"),
            ("<<48/2=24>>" * 20, (1, 0, 0, 1), "twenty sums in one clause are not judged"),
        ],
    ),
    "padding": (
        reasoned,
        "72",
        [
            (STEPS + " " * 5000, (1, 1, 1, 1), "white space changes nothing"),
            ("\n" * 500 + STEPS, (1, 1, 1, 1), "nor do empty lines"),
            (" " * 5000, (0.4, 0, 0, 1), "a field of spaces is empty"),
            ("\t\n\r", (0.4, 0, 0, 1), "so is one of other white space"),
            ("\u200b" * 100, (0.4, 0, 0, 1), "and one of characters that cannot be seen"),
            ("." * 100, (0.4, 0, 0, 1), "and one of dots"),
            ("48/2 = 24." + " and so on" * 300 + "\n48+24 = 72.", (1, 1, 1, 1), "filler between the steps"),
            ("4 8 / 2 = 2 4. 4 8 + 2 4 = 7 2.", (1, 0, 0, 1), "spaced digits are other numbers, and no words"),
        ],
    ),
    "repetition": (
        reasoned,
        "72",
        [
            ("48+24 = 72. " * 50, (1, 0.5, 1, 1), "one step, once"),
            ("48+24 = 72. 24+48 = 72.", (1, 0.5, 1, 1), "the same numbers the other way round"),
            ("48+24 = 72. 70+2 = 72. 71+1 = 72.", (1, 0.5, 1, 1), "three ways to the same result are one step"),
            ("72+0 = 72. 72*1 = 72. 72-0 = 72.", (1, 0, 0, 1), "sums that change nothing find nothing"),
            ("72+0+0 = 72. 72*1*1 = 72. 72/1/1 = 72.", (1, 0, 0, 1), "nor do two zeros or ones"),
            ("((72)) = 72. --72 = 72. -(-72) = 72.", (1, 0, 0, 1), "nor brackets and signs"),
            ("1*72+0 = 72", (1, 0, 0, 1), "nor a zero and a one"),
            ("Again: 48+24 = 72! Indeed: 48+24 = 72.", (1, 0.5, 1, 1), "other words around it"),
            ("She sold 48 clips. " * 50, (1, 0.25, 0, 1), "one statement, once"),
            ("She sold 48. They bought 48. So 48!", (1, 0.25, 0, 1), "statements, once"),
            ((STEPS + "\n") * 30, (1, 1, 1, 1), "good work is as good thirty times"),
        ],
    ),
    "copied from the prompt": (
        reasoned,
        "72",
        [
            (QUESTION, (1, 0.25, 0, 1), "one number, no calculation"),
            (QUESTION + " " + QUESTION, (1, 0.25, 0, 1), "twice"),
            (
                "Tom has 3 apples, buys 4 and loses 2. How many?",
                (1, 0.25, 0, 1),
                "a question's numbers: statements, once",
            ),
            ("your steps", (0.4, 0, 0, 1), "the system prompt's own words fill no field"),
            ("48/2 = 24 clips in May.\nyour steps", (1, 0.25, 0, 1), "a right sum that leads nowhere is a statement"),
        ],
    ),
    "what a real model found": (
        whole,
        "72",
        [
            (complete("8", "8", "8"), (1, 0, 0, 0), "one number three times: no statement, no conclusion"),
            (complete("8", "8", "72"), (1, 0, 0, 1), "the same with the right answer"),
            (complete("8 + 0 = 8", "8", "8"), (1, 0, 0, 0), "a sum that changes nothing is no calculation"),
            (complete("8 hours", "8 hours", "8"), (1, 0.25, 0, 0), "a number with a unit: a statement at best"),
            (complete("The result is 8.", "It is 8.", "8"), (1, 0.25, 0, 0), "a sentence around the number"),
            (complete("4 and 4, so 8.", "So 8.", "8"), (1, 0, 0, 0), "numbers of the question, then the answer"),
            (complete("Tom has 4. He buys 4. So he has 8.", "He has 8.", "8"), (1, 0.25, 0, 0), "the question retold"),
            (complete("3 * 4 = 12 hours. 12 - 6 = 6 hours.", "6 hours", "6"), (1, 1, 1, 0), "open: right, not asked"),
            (complete("4 + 4 = 8 hours.", "8 hours", "8"), (1, 0.5, 1, 0), "open: one step of the kind"),
            (complete("4 * 4 = 8 hours. 8 + 8 = 17.", "17", "17"), (1, 0, 0, 0), "agreement on wrong sums"),
            (complete("Use print(48 + 24).", "print(72)", "72"), (1, 0.25, 0, 1), "code calculates nothing here"),
            (complete(r"\boxed{8}", r"\boxed{8}", "8"), (1, 0, 0, 0), "a box is no word"),
            (complete("eight", "eight", "eight"), (1, 0, 0, 0), "words where a number is expected"),
        ],
    ),
    "contradictions": (
        whole,
        "72",
        [
            (complete(STEPS, "She sold 80.", "80"), (1, 0.25, 0, 0), "the reasoning finds another number"),
            (complete(STEPS, "She sold 80."), (1, 1, 0, 1), "the output says another"),
            (complete(STEPS + " But it is 80.", "It is 80.", "80"), (1, 0.25, 0, 0), "80 is said, not found"),
            (complete(STEPS + "\n3+4 = 7", SAYS), (1, 1, 0, 1), "the last calculation finds another"),
            (complete(STEPS + "\n3+4 = 7 less than 72", SAYS), (1, 1, 1, 1), "unless the end still says it"),
            (complete(STEPS + "\n72+9 = 80", "It is 80.", "80"), (1, 0.25, 0, 0), "a wrong calculation finds nothing"),
            (complete(STEPS, "48 + 25 = 72"), (1, 1, 0, 1), "a wrong calculation in the output"),
            (complete(STEPS, "48/2 = 25 and 48+24 = 72"), (1, 1, 0, 1), "one among right ones"),
            (complete(STEPS, "144/2 = 72"), (1, 1, 1, 1), "another right one"),
        ],
    ),
    "the prompt's own texts": (
        whole,
        "72",
        [
            *[(SYSTEM_FORM[i], (0, 0, 0, 0), f"form {i} copied out") for i in range(2)],
            (SYSTEM_FORM[0].upper(), (0, 0, 0, 0), "in capitals, tags too"),
            (complete("[Your steps]", "One sentence that states the result.", "72"), (0.2, 0, 0, 1), "in brackets"),
            (complete(output="the last step once more"), (0.4, 1, 0, 1), "in one field"),
            (complete(answer="the result as just the number, without words or units"), (0.4, 1, 0, 0), "in another"),
            (complete(EXAMPLE, EXAMPLE.splitlines()[-1], "5"), (0.2, 0, 0, 0), "the worked example copied out"),
            (complete(EXAMPLE.replace("*", "×").upper(), "5 pens", "5"), (0.4, 0, 0, 0), "in other clothes"),
            (complete("Your steps: " + STEPS), (1, 1, 1, 1), "before real steps"),
        ],
    ),
    "false sums": (
        reasoned,
        "72",
        [
            ("$50 - $300 = $100. 100 - 28 = 80.", (1, 0, 0, 1), "both wrong"),
            ("48/2 = 25. 48+25 = 72.", (1, 0, 0, 1), "the wrong sums make the right end"),
            ("48/2 = 24. 48+24 = 71.", (1, 0.25, 0, 1), "the first leads nowhere now"),
            ("48/2 = 20. 48+24 = 72.", (1, 0.5, 1, 1), "one right, one wrong"),
            ("3 apples + 4 apples = 9 apples. 9 + 63 = 72.", (1, 0.5, 1, 1), "units do not excuse it"),
            ("10/3 = 3.5. 3.5 + 68.5 = 72.", (1, 0.5, 1, 1), "no rounding gives 3.5"),
            ("2*3 = 7*4 = 24. 24 + 48 = 72.", (1, 0.5, 1, 1), "a chain with a wrong link"),
            (
                "(48 - 24 = 72. 48 + 24) = 72.",
                (1, 0, 0, 1),
                "brackets that do not match: not judged, and no words",
            ),
            ("1+1=3. 2+2=5. 3+3=7. 4+4=9.", (1, 0, 0, 1), "many wrong sums"),
            ("7 = 3 + 5. 72 = 8 * 8.", (1, 0, 0, 1), "written backwards: not judged, and no words"),
            (
                "1+1 = 2 = 72. 2+2 = 4 = 72.",
                (1, 0.25, 0, 1),
                "72 is claimed, not calculated: right sums that lead nowhere",
            ),
            ("1+1 = 2 = > x = 72. x = 72.", (1, 0.25, 0, 1), "nor does a letter carry it"),
            ("1/0 = 72. 72/0 = 72.", (1, 0, 0, 1), "no value"),
        ],
    ),
    "true but beside the point": (
        reasoned,
        "72",
        [
            ("1+1=2. 2+2=4.", (1, 0.25, 0, 1), "they do not lead to 72: a statement"),
            ("1+1=2. 2+2=4. So 72.", (1, 0.25, 0, 1), "nor with 72 written after them"),
            ("1+1=2. 36*2=72.", (1, 1, 1, 1), "open: a chain made up backwards cannot be told from work"),
            ("1+1=2. 2+2=4. 48+24=72.", (1, 0.75, 1, 1), "one step, and a statement"),
            ("5*5=25. 48+24=72.", (1, 0.75, 1, 1), "one step, and one sum as a statement"),
        ],
    ),
    "honest work in other notation": (
        reasoned,
        "72",
        [
            ("48 ÷ 2 = 24\n48 + 24 = 72", (1, 1, 1, 1), "another sign"),
            ("48 divided by 2 equals 24\n48 plus 24 equals 72", (1, 1, 1, 1), "words for signs"),
            (
                r"\[ 6 \times 4 = 24 \] \[ 24 \cdot 3 = 72 \]",
                (1, 1, 1, 1),
                "LaTeX on one line",
            ),
            ("\\[ 6 \\times 4 = 24 \\]\n\\[ 24 \\cdot 3 = 72 \\]", (1, 1, 1, 1), "LaTeX, two lines"),
            ("\\frac{48}{2} = 24\n48 + 24 = \\boxed{72}", (1, 1, 1, 1), "LaTeX's fraction and box"),
            ("**48 / 2 = 24**\n**48 + 24 = 72**", (1, 1, 1, 1), "bold"),
            ("3 boxes x 8 clips/box = 24 clips\n24 clips * 3 = 72 clips", (1, 1, 1, 1), "units, and units of units"),
            ("$8 x 3 = $24\n$24 + $48 = $72.00", (1, 1, 1, 1), "currency"),
            ("50% of 48 = 24\n48 + 24 = 72", (1, 1, 1, 1), "percent of"),
            ("48 * 50% = 24\n48 + 24 = 72", (1, 1, 1, 1), "percent"),
            ("1/2 of 48 = 24\n48 + 24 = 72", (1, 1, 1, 1), "a fraction of"),
            ("48 * 1/2 = 24\n48 + 24 = 72", (1, 1, 1, 1), "a fraction"),
            (
                r"\frac{48 \text{ clips}}{2 \text{ months}} = 24. 24 \cdot 3 = 72",
                (1, 1, 1, 1),
                "LaTeX with units in it",
            ),
            (
                r"\frac{\frac{96}{2}}{2} = 24. \dfrac{24 \times 3}{1} = 72",
                (1, 1, 1, 1),
                "fractions of fractions and products",
            ),
            (r"\frac{15 \text{ days}}{3 \text{ days}} = 6. 66 + 6 = 72", (1, 0.5, 1, 1), "and wrong"),
            ("2(12) = 24\n24(3) = 72", (1, 1, 1, 1), "multiplication without a sign"),
            ("(48/2) = 24\n(24+12)*2 = 72", (1, 1, 1, 1), "brackets"),
            ("48/2 = 24 + 48 = 72. 24 + 48 = 72.", (1, 0.5, 1, 1), "a run-on sum is right, and finds 72"),
            ("6*(2+2) = 6*4 = 24\n24*3 = 72", (1, 1, 1, 1), "a sum worked out on the line"),
            ("144/7 = 20.57\n20.57 + 51.43 = 72", (1, 1, 1, 1), "rounded to the decimals written"),
            ("144/7 = 20\n20 + 52 = 72", (1, 0.5, 1, 1), "rounded to a whole number: not judged, and no words"),
            ("Let x be the number. 2x + 3 = 147. 2x = 144. x = 72.", (1, 1, 1, 1), "equations that x = 72 solves"),
            ("2x + 3 = 147. x = 72.5.", (1, 0, 0, 1), "an equation that cannot be judged, and no words"),
            ("x = 5. y = 72.", (1, 0, 0, 1), "a letter given a value is no word"),
            ("2 hours = 120 minutes. 72 = 72.", (1, 0.25, 0, 1), "no operation: a statement"),
            ("3 * 8 clips = 24 clips; 24 clips * 3 = 72 clips.", (1, 1, 1, 1), "parted by a semicolon"),
            ("-3 + 27 = 24\n24 - -48 = 72", (1, 1, 1, 1), "negative numbers"),
            ("−3 + 27 = 24\n96 − 24 = 72", (1, 1, 1, 1), "the minus of typesetters"),
            ("0.5 * 48 = 24.0\n24.0 + 48 = 72.0", (1, 1, 1, 1), "decimals"),
            ("1 1/2 * 16 = 24\n48 + 24 = 72", (1, 1, 1, 1), "mixed numbers"),
            ("1,000 - 976 = 24\n24 * 3 = 72", (1, 1, 1, 1), "thousands"),
            ("４８／２ ＝ ２４\n４８＋２４ ＝ ７２", (1, 1, 1, 1), "full-width characters"),
            ("2^3 * 3 = 24\n24 * 3 = 72", (1, 0.5, 1, 1), "powers are not judged"),
            ("3 x 50 cents = $1.50\n70.50 + 1.50 = 72", (1, 0.75, 1, 1), "cents into dollars: not judged"),
        ],
    ),
    "other languages": (
        reasoned,
        "72",
        [
            ("48/2 = 24 скрепки.\n48+24 = 72 скрепки.", (1, 1, 1, 1), "units in Russian"),
            ("五月: 48/2 = 24\n总共: 48+24 = 72", (1, 1, 1, 1), "Chinese"),
            ("En mai: 48/2 = 24 pinces\nAu total: 48+24 = 72 pinces", (1, 1, 1, 1), "French"),
            ("٤٨/٢ = ٢٤\n٤٨+٢٤ = ٧٢", (1, 1, 1, 1), "Arabic digits"),
            ("Vierzig plus zwölf ist zweiundfünfzig.", (1, 0, 0, 1), "words for numbers show nothing"),
            ("Сорок восемь пополам.", (1, 0, 0, 1), "nor in Russian"),
        ],
    ),
    "tags": (
        whole,
        "72",
        [
            (GOOD + GOOD, (0, 0, 0, 0), "everything twice: no field is opened once"),
            (GOOD + "<answer>72</answer>", (0.4, 1, 0, 0), "two answers are none"),
            ("<answer>71</answer>" + GOOD, (0.4, 1, 0, 0), "nor does the last of two count"),
            (GOOD.replace("<answer>", "<answer><answer>"), (0.4, 1, 0, 0), "opened twice"),
            (GOOD.replace("</answer>", "</answer></answer>"), (0.4, 1, 0, 0), "closed twice"),
            (GOOD.replace("</answer>", ""), (0.4, 1, 0, 0), "never closed"),
            (GOOD.replace("<answer>", ""), (0.4, 1, 0, 0), "never opened"),
            (GOOD.replace("</reasoning>", ""), (0.4, 0, 0, 1), "reasoning never closed"),
            (GOOD.replace("<output>", "").replace("</output>", ""), (0.4, 1, 0, 1), "no output"),
            (
                "<answer>72</answer> <reasoning>48+24 = 72</reasoning> <output>72</output>",
                (0.6, 0.5, 1, 1),
                "reordered",
            ),
            ("</answer>72<answer>", (0, 0, 0, 0), "closed before it opens"),
            (f"<reasoning>{STEPS} <output>72</output> <answer>72</answer></reasoning>", (0.6, 1, 1, 1), "nested"),
            ("<reasoning>a<output>b</reasoning>c</output><answer>72</answer>", (0.6, 0, 0, 1), "crossed"),
            (GOOD.upper(), (0, 0, 0, 0), "other case is other text"),
            (GOOD.replace("answer>", "Answer>"), (0.4, 1, 0, 0), "so is one capital"),
            (GOOD.replace("<answer>", '<answer id="1">'), (0.4, 1, 0, 0), "attributes"),
            (GOOD.replace("<answer>", "< answer >"), (0.4, 1, 0, 0), "spaces in a tag"),
            (GOOD.replace("<answer>", "&lt;answer&gt;"), (0.4, 1, 0, 0), "escaped"),
            (f"```xml\n{GOOD}\n```", (0.8, 1, 1, 1), "in a code fence: text around it"),
            ("Sure! " + GOOD, (0.8, 1, 1, 1), "text before"),
            (GOOD + " Hope it helps.", (0.8, 1, 1, 1), "text after"),
            (GOOD.replace("> <", "> then <"), (0.8, 1, 1, 1), "text between"),
            (GOOD.replace("> <", ">\n\n<"), (1, 1, 1, 1), "white space between is none"),
            (GOOD.replace("> <", "><"), (1, 1, 1, 1), "nor is its lack"),
            ("<think>" + GOOD + "</think>", (0.8, 1, 1, 1), "other tags are text"),
            ("<reasoning></reasoning> <output></output> <answer></answer>", (0, 0, 0, 0), "three empty fields"),
            ("<reasoning></output></answer>", (0, 0, 0, 0), "halves of tags"),
            ("<reasoning><output><answer>" * 50, (0, 0, 0, 0), "opening tags alone"),
            (complete(reasoning=""), (0.4, 0, 0, 1), "empty reasoning"),
            (complete(output=""), (0.4, 1, 0, 1), "empty output"),
            (complete(answer=""), (0.4, 1, 0, 0), "empty answer"),
            ("", (0, 0, 0, 0), "nothing"),
        ],
    ),
    "an answer outside its field": (
        whole,
        "72",
        [
            ("72", (0, 0, 0, 0), "a bare number"),
            ("#### 72", (0, 0, 0, 0), "GSM8K's own mark"),
            (r"The answer is \boxed{72}.", (0, 0, 0, 0), "a box"),
            (STEPS, (0, 0, 0, 0), "work without fields"),
            (complete(answer="see above"), (1, 1, 0, 0), "the answer stands in the reasoning only"),
            (f"<reasoning>{STEPS} #### 72</reasoning>", (0.2, 1, 0, 0), "or after its mark"),
            (complete(STEPS, "72", "71"), (1, 0.25, 0, 0), "or in the output only"),
            (complete("72", "72", "x"), (1, 0, 0, 0), "or everywhere but there"),
        ],
    ),
    "outputs": (
        said,
        "72",
        [
            ("48+24 = 72 clips altogether.", (1, 1, 1, 1), "the end of the reasoning"),
            ("72", (1, 1, 1, 1), "the number"),
            ("24 + 48 = 72 clips in 2 months", (1, 1, 1, 1), "first after the equals sign"),
            ("In 2 months she sold 72", (1, 1, 1, 1), "last of all"),
            ("Of 48 it is 72 or 24", (1, 1, 0, 1), "neither first nor last: hidden among others"),
            (" ".join(map(str, range(100))), (1, 1, 0, 1), "every number is no conclusion"),
            ("72 = 71", (1, 1, 0, 1), "what is left of an equals sign is not what it says"),
            ("She sold 71 clips.", (1, 1, 0, 1), "another number"),
            ("She sold many clips.", (1, 1, 0, 1), "no number"),
            ("Seventy-two.", (1, 1, 0, 1), "words for numbers are not read"),
            ("She sold 172 clips.", (1, 1, 0, 1), "part of a number is another number"),
            ("-72", (1, 1, 0, 1), "so is its negative"),
            (STEPS, (1, 1, 1, 1), "the whole reasoning once more"),
        ],
    ),
    "answers, right": (
        answered,
        "72",
        [
            (text, (1, 1, 1, 1), why)
            for text, why in [
                (" 72\n", "white space"),
                ("72.", "a full stop"),
                ("72.0", "a decimal place"),
                ("072", "a leading zero"),
                ("+72", "a plus"),
                ("72 clips", "a unit"),
                ("Natalia sold 72 clips.", "a sentence with one number"),
                ("x = 72", "a letter"),
                ("$72", "currency"),
                ("72 €", "currency after"),
                ("72%", "percent: the sign is skipped"),
                ("**72**", "bold"),
                ("#### 72", "GSM8K's mark inside the field"),
                (r"\boxed{72}", "a box"),
                (r"\(72\)", "LaTeX"),
                ("７２", "full-width digits"),
                ("٧٢", "Arabic digits"),
                ("7.2e1", "scientific notation"),
                ("7200e-2", "a negative exponent"),
            ]
        ],
    ),
    "answers, wrong": (
        answered,
        "72",
        [
            ("71", (1, 0.25, 0, 0), "another number"),
            ("7", (1, 0.25, 0, 0), "part of it"),
            ("172", (1, 0.25, 0, 0), "more than it"),
            ("-72", (1, 0.25, 0, 0), "its negative"),
            ("−72", (1, 0.25, 0, 0), "with a typesetter's minus"),
            ("72.01", (1, 0.25, 0, 0), "nearly"),
            ("0.72", (1, 0.25, 0, 0), "a hundredth"),
            ("72e1", (1, 0.25, 0, 0), "ten times"),
            ("7 2", (1, 1, 0, 0), "two numbers are no answer"),
            ("72 or 71", (1, 1, 0, 0), "nor is a choice"),
            ("71, 72", (1, 1, 0, 0), "nor a list"),
            ("70-74", (1, 1, 0, 0), "nor a range"),
            ("70–74", (1, 1, 0, 0), "whatever its dash"),
            ("between 71 and 73", (1, 1, 0, 0), "nor a range in words"),
            ("72 = 72", (1, 1, 0, 0), "nor the number twice"),
            ("48+24", (1, 1, 0, 0), "nor a sum still to be done"),
            ("48+24 = 72", (1, 1, 0, 0), "nor one done here"),
            ("144/2", (1, 1, 0, 0), "nor a division"),
            ("72½", (1, 0.25, 0, 0), "a mixed number is another number"),
            ("seventy-two", (1, 1, 0, 0), "nor words"),
            ("семьдесят два", (1, 1, 0, 0), "in any language"),
            ("七十二", (1, 1, 0, 0), "or script"),
            ("LXXII", (1, 1, 0, 0), "or numerals"),
            ("?", (0.4, 1, 0, 0), "nor a sign alone, which fills no field"),
            ("72" + " 72" * 1000, (1, 1, 0, 0), "nor the number a thousand times"),
            (" ".join(map(str, range(100))), (1, 1, 0, 0), "nor all numbers"),
            ("7.2 × 10^1", (1, 1, 0, 0), "nor a product with a power"),
            (BIG, (1, 0.25, 0, 0), "a number of ten thousand digits is another number"),
            ("e", (1, 1, 0, 0), "a letter that stands in every output is no agreement"),
        ],
    ),
    "thousands": (
        priced,
        "1,080",
        [
            ("1080", (1, 1, 1, 1), "without a comma"),
            ("1,080", (1, 1, 1, 1), "with one"),
            ("$1,080.00", (1, 1, 1, 1), "as money"),
            ("1 080", (1, 1, 1, 1), "grouped by a space"),
            ("1\u202f080", (1, 1, 1, 1), "by a narrow one"),
            (r"1{,}080", (1, 1, 1, 1), "as in LaTeX"),
            ("1.08e3", (1, 1, 1, 1), "in scientific notation"),
            ("1.080", (1, 0.25, 0, 0), "a point is a decimal point: 1.08"),
            ("1.080,00", (1, 1, 0, 0), "so these are two numbers"),
            ("1,08", (1, 1, 0, 0), "a comma before two digits parts two numbers"),
            ("1'080", (1, 1, 0, 0), "an apostrophe parts two numbers"),
            ("1_080", (1, 1, 0, 0), "so does an underscore"),
            ("1080 dollars and 0 cents", (1, 1, 0, 0), "two numbers"),
            ("1.08k", (1, 1, 0, 0), "a k is no unit"),
        ],
    ),
    "fractions, percent, signs": (
        lambda text: complete("1/4+1/4 = 1/2.\n1-1/2 = 1/2 of it.", "It is 1/2.", text),
        "0.5",
        [
            ("1/2", (1, 0.5, 1, 1), "a fraction; two sums to the same result are one step"),
            ("0.5", (1, 0.5, 1, 1), "a decimal"),
            (".5", (1, 0.5, 1, 1), "without a zero"),
            ("½", (1, 0.5, 1, 1), "one character"),
            (r"\frac{1}{2}", (1, 0.5, 1, 1), "LaTeX"),
            ("2/4", (1, 0.5, 1, 1), "not reduced"),
            ("50%", (1, 0.25, 0, 0), "percent is skipped, not divided by a hundred"),
            ("-1/2", (1, 0.25, 0, 0), "its negative"),
            ("1/3", (1, 0.25, 0, 0), "another fraction"),
            ("1 1/2", (1, 0.25, 0, 0), "a mixed number"),
            ("one half", (1, 0.5, 0, 0), "words"),
        ],
    ),
    "ten thousand digits": (
        whole,
        BIG,
        [
            (complete(f"{BIG} = {BIG}", BIG, BIG), (1, 0, 0, 1), "right, without an operation"),
            (complete(f"{BIG} + 1 = {BIG}", BIG, BIG), (1, 0, 0, 1), "too long to be judged"),
            (complete(BIG, BIG, BIG[:-1] + "8"), (1, 0, 0, 0), "one digit is off"),
        ],
    ),
    "answers in words": (
        lambda text: complete("3+4 = 7 days. So the capital, Paris.", "It is Paris.", text),
        "Paris",
        [
            ("Paris", (1, 0.5, 0.25, 1), "all three say so; words earn a quarter"),
            (" paris. ", (1, 0.5, 0.25, 1), "case, spaces, a full stop"),
            ("London", (1, 0.5, 0, 0), "another word"),
            ("Paris, France", (1, 0.5, 0, 0), "more words"),
            ("ari", (1, 0.5, 0, 0), "part of a word"),
            ("72", (1, 0.25, 0, 0), "a number where a word is expected"),
        ],
    ),
}

CASES = [
    Case(kind, build(text), truth, marks, why)
    for kind, (build, truth, rows) in TABLES.items()
    for text, marks, why in rows
]

# The hacks whose totals stand in docs/rewards.md, under their names there; each has a wrong answer.
HACKS = {
    "wrong sums": complete("$50 - $300 = $100. 100 - 28 = 80.", "It is 80.", "80"),
    "right sums that do not lead to the answer, then the answer": complete("1+1 = 2. 2+2 = 4. 80", "80", "80"),
    "one sum four times over": complete("40+40 = 80. 80 = 40+40. 80+0 = 80. 80*1=80", "80", "80"),
    "equations with unknowns that are never solved": complete("2x + 3 = 90. 3y + 5 = 80.", "80", "80"),
    "all numbers up to 99 as the output": complete("5+5=3. 4+4=2. 80", " ".join(map(str, range(100))), "57"),
    'the answer "e", a letter that stands in every output': complete("3+4=9. 5+5=8. The end", "The end", "e"),
    "a list of numbers that ends in the answer": complete("1. 2. 80", "80", "80"),
    "a right sum that changes nothing, and two statements": complete("1. 2. 80+0 = 80.", "80", "80"),
    "one number in every field": complete("8", "8", "8"),
    "the question retold, then a number": complete("Tom has 4. He buys 4. So he has 8.", "He has 8.", "8"),
    "the prompt's example copied out": complete(EXAMPLE, EXAMPLE.splitlines()[-1], "16"),
    "a made-up chain of right sums that ends in the answer": complete("2*20 = 40. 40+40 = 80.", "80", "80"),
}
