"""Score a model on test problems, alone or against another, then answer what is typed: `python test.py --help`."""

import contextlib
import io
import json
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from src.console import Answerer, Prompt, answer_lines, check_temperature
from src.data import SYSTEM_PROMPT, Example, load_examples, read_system_prompt
from src.engine.models import check_room, choose_device, end_token_ids, load_model, pad_token_id
from src.engine.sampling import Sampler
from src.errors import UserError, memory_errors
from src.evaluation import Evaluation, Scored, evaluate, fixed_subset
from src.reward_set import RewardSet, built_in, choose_rewards
from src.rewards import DEFAULT_WEIGHTS
from src.run.checkpoint import newest_checkpoint
from src.run.tracking import describe_run, printable
from src.settings import flag, parse_flags

SHOWN = 20  # problems on the screen; all of them are in the --output file


@dataclass
class TestConfig:
    """Settings of an evaluation; each is a flag."""

    __test__ = False  # not a test case, whatever its name suggests to pytest

    checkpoint: str | None = flag(None, "a checkpoint; the last one saved in checkpoints/ when left out")
    model: str | None = flag(None, "a Hub id or model folder, instead of a checkpoint")
    compare: str | None = flag(None, "another checkpoint, model folder or Hub id, to score on the same problems")
    dataset: str | None = flag(None, "as in train.py; what the checkpoint was trained on when left out")
    question_column: list[str] | None = flag(None, "as in train.py, and in training when left out with --dataset")
    answer_column: str | None = flag(None, "the same")
    answer_pattern: str | None = flag(None, "the same")
    system_prompt_file: str | None = flag(None, "as in training when left out")
    rewards: str | None = flag(None, "as in train.py; a checkpoint never brings a file to run, so name yours again")
    split: str = flag("test", "train or test")
    num_samples: int = flag(10, f"random problems to score, and the first {SHOWN} to show; 0: score the whole split")
    k: int = flag(1, "answers a problem; above 1 they are sampled, and pass@k and majority vote are reported")
    temperature: float | None = flag(None, "0: greedy, as when left out; with --k, that of the training, or 1")
    max_completion_tokens: int | None = flag(None, "as in training when left out, or 300")
    seed: int = flag(0, "of the choice of problems, of sampling, and of synthetic problems")
    output: str | None = flag(None, "write settings, versions and every completion to this JSON file")
    ask: str | None = flag(None, "answer this question and stop")
    json: bool = flag(False, "only read questions, one a line, and write one JSON object a line")
    interactive: bool = flag(True, "ask for problems afterwards, when there is a terminal or a pipe to read from")
    device: str | None = flag(None, "cpu or cuda; CUDA when there is one")
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "the model works in; auto: bf16 where the hardware has it")

    def __post_init__(self) -> None:
        for name, least in {"num_samples": 0, "k": 1, "max_completion_tokens": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name} is {value}: give {least} or more.")
        if self.temperature is not None:
            check_temperature(self.temperature, "--temperature")
        if self.k > 1 and self.temperature == 0:
            raise UserError(f"--k {self.k} samples, and --temperature 0 does not: give one of them.")
        if self.checkpoint and self.model:
            raise UserError("--checkpoint and --model both name a model: give one of them.")
        alone = self.json or self.ask is not None
        if alone and (self.k > 1 or self.compare or self.output):
            raise UserError("--ask and --json only answer: leave --k, --compare and --output out.")
        if self.output and (Path(self.output).is_dir() or not Path(self.output).parent.is_dir()):
            raise UserError(f"--output '{self.output}' is no file in a folder that exists: choose another.")


class Model:
    """A loaded model, and the settings it was trained with when it is a checkpoint."""

    def __init__(self, name: str, config: TestConfig):
        self.name, self.device = name, choose_device(config.device)
        self.settings: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, KeyError):  # any model folder will do
            state = (Path(name) / "trainer.json").read_text(encoding="utf-8")
            self.settings = json.loads(state)["settings"]
        model, self.tokenizer = load_model(name, self.device, config.seed, config.dtype)
        self.sampler = Sampler(model, end_token_ids(model, self.tokenizer), pad_token_id(self.tokenizer))


class Tester:
    """The model to test, and the settings that hold for it and for what it is compared with."""

    def __init__(self, config: TestConfig):
        self.config = config
        self.model = Model(_choose_model(config), config)
        self.other = Model(config.compare, config) if config.compare else None
        settings = self.model.settings
        self.dataset = config.dataset or settings.get("dataset", "openai/gsm8k")
        self.dataset_seed = settings.get("seed", config.seed)
        self.max_completion_tokens = config.max_completion_tokens or settings.get("max_completion_tokens", 300)
        self.temperature = config.temperature or (settings.get("temperature", 1.0) if config.k > 1 else 0.0)
        for model in filter(None, (self.model, self.other)):
            check_room(model.sampler.model, self.max_completion_tokens)
        self.columns = _choose_columns(config, settings)
        self.rewards = _choose_rewards(config.rewards, settings)
        self.system_prompt = settings.get("system_prompt", SYSTEM_PROMPT)
        if config.system_prompt_file is not None:
            self.system_prompt = read_system_prompt(config.system_prompt_file)
        if self.other and self.other.settings.get("system_prompt", self.system_prompt) != self.system_prompt:
            print(f"{printable(self.other.name)} was trained with another system prompt", file=sys.stderr)
        parts = (self.model.sampler, self.model.tokenizer, self.max_completion_tokens)
        self.answerer = Answerer(*parts, self.system_prompt, config.seed)

    @cached_property
    def examples(self) -> list[Example]:
        """The whole split."""
        examples, dropped = load_examples(self.dataset, self.config.split, self.dataset_seed, **self.columns)
        self.rewards.try_out(examples)
        if dropped:
            print(f"{dropped.total()} rows that cannot be used were left out", file=sys.stderr)
        return examples

    def evaluate(self, model: Model) -> Evaluation:
        """Answers to random problems, the same for the same seed, under a progress bar with the accuracy so far."""
        examples = fixed_subset(self.examples, self.config.num_samples, self.config.seed)
        started, right = time.perf_counter(), 0
        with tqdm(total=len(examples) * self.config.k, desc="evaluating", unit="answer", disable=None) as bar:

            def on_progress(new: list[Scored]) -> None:
                nonlocal right
                right += sum(scored.correct for scored in new)
                bar.update(len(new))
                if bar.n:
                    bar.set_postfix_str(f"accuracy {right / bar.n:.1%}", refresh=False)

            result = evaluate(
                model.sampler,
                model.tokenizer,
                examples,
                self.max_completion_tokens,
                self.rewards,
                self.system_prompt,
                k=self.config.k,
                temperature=self.temperature,
                seed=self.config.seed,
                on_progress=on_progress,
            )
        seconds, tokens = time.perf_counter() - started, sum(scored.tokens for scored in result.scored)
        print(f"{printable(model.name)}: {seconds:.1f} s for {tokens} tokens, {tokens / seconds:.0f} a second")
        return result


def _choose_model(config: TestConfig) -> str:
    """What to load: the model named, or the checkpoint named, or the newest one."""
    if config.model:
        return config.model
    path = Path(config.checkpoint) if config.checkpoint else newest_checkpoint(Path("checkpoints"))
    if path is None:
        raise UserError("There is no checkpoint in 'checkpoints' yet: run train.py first, or name one or a --model.")
    if not path.is_dir():
        raise UserError(f"There is no checkpoint folder '{path}': check the path, or leave --checkpoint out.")
    print(f"checkpoint: {path}", file=sys.stderr)
    return str(path)


def _choose_columns(config: TestConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What flags say of the rows; else what training said of the same dataset."""
    names = ("question_column", "answer_column", "answer_pattern")
    trained_on = settings if config.dataset in (None, settings.get("dataset")) else {}
    chosen = {name: getattr(config, name) or trained_on.get(name) for name in names}
    return {name: value for name, value in chosen.items() if value}


def _choose_rewards(spec: str | None, settings: Mapping[str, Any]) -> RewardSet:
    """Those named; else the ones trained with, where no file has to be run for them."""
    trained_with = settings.get("rewards")
    if spec is None and trained_with and ":" in trained_with:
        print(f"trained with --rewards {printable(trained_with)}: give it again to see those rewards", file=sys.stderr)
        return built_in()
    return choose_rewards(spec or trained_with, settings.get("reward_weights", DEFAULT_WEIGHTS))


def show(answers: Sequence[Scored]) -> None:
    """One problem, its truth, the first of its completions and what that earned."""
    first = answers[0]
    rewards = ", ".join(f"{name} {value:.2f}" for name, value in first.rewards.items())
    right = sum(scored.correct for scored in answers)
    verdict = ("right" if right else "wrong") if len(answers) == 1 else f"{right} of {len(answers)} answers right"
    print(f"question:   {printable(first.example.question)}")
    print(f"completion: {printable(first.completion)}")
    print(f"truth:      {printable(first.example.answer)}   ({verdict})")
    print(f"rewards:    {rewards}\n")


def summarise(evaluation: Evaluation, weights: Sequence[float]) -> str:
    """Shares of the problems with their intervals, and the means."""
    m = evaluation.metrics(weights)
    lines = [f"on {m['eval/samples']} problems, with 95% intervals:"]
    for name in evaluation.measures():
        share, low, high = (m[f"eval/{name}{end}"] for end in ("", "_low", "_high"))
        lines.append(f"  {name:<16} {share:6.1%}  ({low:.1%} to {high:.1%})")
    means = ", ".join(f"{k.removeprefix('eval/reward/')} {v:.3f}" for k, v in m.items() if k.startswith("eval/reward/"))
    lines.append(f"reward {m['eval/reward']:.3f}: {means}")
    lines.append(f"{m['eval/completion_tokens']:.0f} tokens a completion, {m['eval/truncated']:.1%} cut off")
    lines.append(f"{m['eval/reasoning_without_calculation']:.1%} without a calculation in the reasoning\n")
    return "\n".join(lines)


def summarise_difference(name: str, evaluation: Evaluation, other: Evaluation) -> str:
    """Differences in points with their intervals and p-values."""
    test = "McNemar's exact p" if evaluation.k == 1 else "p of a permutation test of the mean"
    lines = [f"better than {printable(name)} by so many points, with 95% intervals, and {test}:"]
    for measure, d in evaluation.compare(other).items():
        points = f"{100 * d.difference:+6.1f}  ({100 * d.low:+.1f} to {100 * d.high:+.1f})"
        lines.append(f"  {measure:<16} {points}, p = {d.p:.2g}; problems: {d.gained} better, {d.lost} worse")
    return "\n".join(lines) + "\n"


def write_output(tester: Tester, evaluations: Sequence[tuple[Model, Evaluation]]) -> None:
    """Everything about the evaluation, as JSON; the same seed gives the same file, so no clock and no file name."""
    settings = {key: value for key, value in asdict(tester.config).items() if key not in ("output", "interactive")}
    used = {
        name: getattr(tester, name) for name in ("dataset", "max_completion_tokens", "temperature", "system_prompt")
    }
    used["weights"] = dict(zip(tester.rewards.names, tester.rewards.weights, strict=True))
    first, *others = (evaluation for _, evaluation in evaluations)
    report = {
        "settings": settings | used | tester.columns,
        "versions": describe_run(tester.model.device),
        "models": [
            {
                "model": model.name,
                "metrics": evaluation.metrics(tester.rewards.weights),
                "problems": evaluation.describe(),
            }
            for model, evaluation in evaluations
        ],
        "differences": {name: d._asdict() for other in others for name, d in first.compare(other).items()},
    }
    path = tester.config.output
    try:
        Path(path).write_text(json.dumps(report, indent=1, ensure_ascii=False, default=str), encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot write '{path}' ({error.strerror}): choose another --output.") from error


def run(config: TestConfig) -> None:
    """Ask, or evaluate and then prompt."""
    tester = Tester(config)
    if config.ask is not None:
        answer = tester.answerer.answer(config.ask, config.temperature or 0.0)
        print(json.dumps(asdict(answer)) if config.json else printable(answer.completion))
        return
    if config.json and sys.stdin:
        answer_lines(tester.answerer, config.temperature or 0.0)
        return
    evaluation = tester.evaluate(tester.model)
    if config.num_samples:
        for answers in evaluation.problems()[:SHOWN]:
            show(answers)
    print(summarise(evaluation, tester.rewards.weights))
    evaluations = [(tester.model, evaluation)]
    if tester.other:
        other = tester.evaluate(tester.other)
        print(summarise(other, tester.rewards.weights))
        print(summarise_difference(tester.other.name, evaluation, other))
        evaluations.append((tester.other, other))
    if config.output:
        write_output(tester, evaluations)
    if config.interactive and sys.stdin:
        draw = random.Random(config.seed).choice
        Prompt(tester.answerer, lambda: draw(tester.examples), config.temperature or 0.0).run()


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the flags say; returns the exit status."""
    try:
        (config,) = parse_flags((TestConfig,), argv)
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # of what is no text a question is made all the same
        sys.stdout.reconfigure(errors="backslashreplace")
        with memory_errors():
            run(config)
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
