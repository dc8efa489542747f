"""Score a model on test problems, then answer what is typed: `python test.py --help`."""

import contextlib
import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from src.checkpoint import newest_checkpoint
from src.data import SYSTEM_PROMPT, Example, encode_prompts, load_examples, read_system_prompt
from src.errors import UserError
from src.evaluation import Evaluation, Scored, evaluate
from src.models import choose_device, end_token_ids, load_model, pad_token_id
from src.reward_set import RewardSet, built_in, choose_rewards
from src.rewards import DEFAULT_WEIGHTS
from src.sampling import Sampler, decode
from src.settings import flag, parse_flags
from src.tracking import describe_run, printable


@dataclass
class TestConfig:
    """Settings of an evaluation; each is a flag."""

    __test__ = False  # not a test case, whatever its name suggests to pytest

    checkpoint: str | None = flag(None, "a checkpoint; the last one saved in checkpoints/ when left out")
    model: str | None = flag(None, "a Hub id or model folder, instead of a checkpoint")
    dataset: str | None = flag(None, "as in train.py; what the checkpoint was trained on when left out")
    question_column: list[str] | None = flag(None, "as in train.py, and in training when left out with --dataset")
    answer_column: str | None = flag(None, "the same")
    answer_pattern: str | None = flag(None, "the same")
    system_prompt_file: str | None = flag(None, "as in training when left out")
    rewards: str | None = flag(None, "as in train.py; a checkpoint never brings a file to run, so name yours again")
    split: str = flag("test", "train or test")
    num_samples: int = flag(10, "random problems to score; 0: the whole split")
    max_completion_tokens: int | None = flag(None, "as in training when left out, or 300")
    seed: int = flag(0, "of the choice of problems, and of synthetic problems")
    output: str | None = flag(None, "write settings, versions and every completion to this JSON file")
    ask: str | None = flag(None, "answer this question and stop")
    interactive: bool = flag(True, "ask for problems afterwards, when there is a terminal or a pipe to read from")
    device: str | None = flag(None, "cpu or cuda; CUDA when there is one")

    def __post_init__(self) -> None:
        if self.num_samples < 0:
            raise UserError(f"--num_samples is {self.num_samples}: give 0 (all) or more.")
        if self.max_completion_tokens is not None and self.max_completion_tokens < 1:
            raise UserError(f"--max_completion_tokens is {self.max_completion_tokens}: give 1 or more.")
        if self.checkpoint and self.model:
            raise UserError("--checkpoint and --model both name a model: give one of them.")


class Tester:
    """A loaded model, ready to be asked."""

    def __init__(self, config: TestConfig):
        self.device = choose_device(config.device)
        self.source, settings = _choose_model(config)
        self.rewards = _choose_rewards(config.rewards, settings)
        self.model, self.tokenizer = load_model(self.source, self.device, config.seed)
        self.dataset = config.dataset or settings.get("dataset", "openai/gsm8k")
        self.dataset_seed = settings.get("seed", config.seed)
        self.max_completion_tokens = config.max_completion_tokens or settings.get("max_completion_tokens", 300)
        self.columns = _choose_columns(config, settings)
        self.system_prompt = settings.get("system_prompt", SYSTEM_PROMPT)
        if config.system_prompt_file is not None:
            self.system_prompt = read_system_prompt(config.system_prompt_file)
        end_ids = end_token_ids(self.model, self.tokenizer)
        self.sampler = Sampler(self.model, end_ids, pad_token_id(self.tokenizer))

    def choose_examples(self, config: TestConfig) -> list[Example]:
        """Random problems of the split, the same for the same seed."""
        examples, dropped = load_examples(self.dataset, config.split, self.dataset_seed, **self.columns)
        self.rewards.try_out(examples)
        if dropped:
            print(f"{dropped.total()} rows that cannot be used were left out", file=sys.stderr)
        if not config.num_samples or config.num_samples >= len(examples):
            return examples
        return random.Random(config.seed).sample(examples, config.num_samples)

    def evaluate(self, examples: Sequence[Example]) -> Evaluation:
        """Greedy answers to all the problems, under a progress bar."""
        with tqdm(total=len(examples), desc="evaluating", unit="problem", disable=None) as bar:
            return evaluate(
                self.sampler,
                self.tokenizer,
                examples,
                self.max_completion_tokens,
                self.rewards,
                self.system_prompt,
                on_progress=lambda done: bar.update(done - bar.n),
            )

    def answer(self, question: str) -> str:
        """One greedy answer."""
        prompts = encode_prompts(self.tokenizer, [question], self.system_prompt)
        sampled = self.sampler.generate(prompts, max_new_tokens=self.max_completion_tokens)
        return decode(self.tokenizer, sampled)[0]


def _choose_model(config: TestConfig) -> tuple[str, dict]:
    """What to load, and the settings it was trained with when it is a checkpoint."""
    if config.model:
        return config.model, {}
    path = Path(config.checkpoint) if config.checkpoint else newest_checkpoint(Path("checkpoints"))
    if path is None:
        raise UserError("There is no checkpoint in 'checkpoints' yet: run train.py first, or name one or a --model.")
    if not path.is_dir():
        raise UserError(f"There is no checkpoint folder '{path}': check the path, or leave --checkpoint out.")
    print(f"checkpoint: {path}", file=sys.stderr)
    settings: dict = {}
    with contextlib.suppress(OSError, ValueError, KeyError):  # any model folder will do
        settings = json.loads((path / "trainer.json").read_text(encoding="utf-8"))["settings"]
    return str(path), settings


def _choose_columns(config: TestConfig, settings: dict) -> dict:
    """What flags say of the rows; else what training said of the same dataset."""
    names = ("question_column", "answer_column", "answer_pattern")
    trained_on = settings if config.dataset in (None, settings.get("dataset")) else {}
    chosen = {name: getattr(config, name) or trained_on.get(name) for name in names}
    return {name: value for name, value in chosen.items() if value}


def _choose_rewards(spec: str | None, settings: dict) -> RewardSet:
    """Those named; else the ones trained with, where no file has to be run for them."""
    trained_with = settings.get("rewards")
    if spec is None and trained_with and ":" in trained_with:
        print(f"trained with --rewards {printable(trained_with)}: give it again to see those rewards", file=sys.stderr)
        return built_in()
    return choose_rewards(spec or trained_with, settings.get("reward_weights", DEFAULT_WEIGHTS))


def show(scored: Scored) -> None:
    """One problem, its completion, the truth and the rewards."""
    rewards = ", ".join(f"{name} {value:.2f}" for name, value in scored.rewards.items())
    print(f"question:   {printable(scored.example.question)}")
    print(f"completion: {printable(scored.completion)}")
    print(f"truth:      {printable(scored.example.answer)}   ({'right' if scored.correct else 'wrong'})")
    print(f"rewards:    {rewards}\n")


def summarise(evaluation: Evaluation, weights: Sequence[float]) -> str:
    """Accuracy with its interval, and the means."""
    m = evaluation.metrics(weights)
    low, high = 100 * m["eval/accuracy_low"], 100 * m["eval/accuracy_high"]
    means = ", ".join(f"{k.removeprefix('eval/reward/')} {v:.3f}" for k, v in m.items() if k.startswith("eval/reward/"))
    return (
        f"accuracy {100 * m['eval/accuracy']:.1f}% (95% interval {low:.1f} to {high:.1f}) "
        f"on {m['eval/samples']} problems; "
        f"{100 * m['eval/accuracy_lenient']:.1f}% when the last number anywhere counts\n"
        f"reward {m['eval/reward']:.3f}: {means}\n"
        f"{m['eval/completion_tokens']:.0f} tokens a completion, {100 * m['eval/truncated']:.1f}% cut off"
    )


def write_output(path: str, config: TestConfig, tester: Tester, evaluation: Evaluation) -> None:
    """Everything about the evaluation, as JSON; the same seed gives the same file."""
    report = {
        "settings": asdict(config) | {"model": tester.source, "dataset": tester.dataset} | tester.columns,
        "versions": describe_run(tester.device),
        "metrics": evaluation.metrics(tester.rewards.weights),
        "problems": [asdict(scored) for scored in evaluation.scored],
    }
    try:
        Path(path).write_text(json.dumps(report, indent=1, ensure_ascii=False, default=str), encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot write '{path}' ({error.strerror}): choose another --output.") from error


def prompt_loop(tester: Tester) -> None:
    """Answer one problem a line until `exit`, end of input or Ctrl-C."""
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history for input()
        print("Type a problem and press Enter; `exit` ends.")
    while True:
        try:
            question = input("> " if at_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError:
            print("That is not UTF-8 text: type or pipe in plain text.", file=sys.stderr)
            continue
        if question == "exit":
            return
        if question:
            try:
                print(printable(tester.answer(question)) + "\n", flush=True)
            except KeyboardInterrupt:
                print()
                return


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the flags say; returns the exit status."""
    try:
        (config,) = parse_flags((TestConfig,), argv)
        tester = Tester(config)
        if config.ask is not None:
            print(printable(tester.answer(config.ask)))
            return 0
        examples = tester.choose_examples(config)
        evaluation = tester.evaluate(examples)
        if config.num_samples:
            for scored in evaluation.scored:
                show(scored)
        print(summarise(evaluation, tester.rewards.weights))
        if config.output:
            write_output(config.output, config, tester, evaluation)
        if config.interactive:
            prompt_loop(tester)
        return 0
    except UserError as error:
        print(f"test.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # what reads the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
