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
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from src.chat_template import set_template_arguments
from src.console import Answerer, Prompt, answer_lines, check_temperature
from src.data import SYSTEM_PROMPT, Example, encode_prompts, load_examples, read_system_prompt
from src.engine.models import check_room, end_token_ids, load_model, pad_token_id
from src.engine.processes import Processes, connect
from src.engine.sampling import Sampler
from src.errors import UserError, memory_errors, printable
from src.evaluation import Evaluation, Scored, evaluate, fixed_subset
from src.reward_set import RewardSet, built_in, choose_rewards
from src.rewards import DEFAULT_WEIGHTS
from src.run.checkpoint import UNREADABLE, newest_checkpoint, read_state
from src.run.tracking import describe_run
from src.settings import check_fields, flag, parse_flags
from src.splits import fingerprint_examples
from src.tiny import TINY_SYSTEM_PROMPT, embedded_models

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
    template_arguments: list[str] | None = flag(None, "as in train.py; a checkpoint keeps those it was trained with")
    rewards: str | None = flag(None, "as in train.py; a checkpoint never brings a file to run, so name yours again")
    split: str = flag("test", "train or test")
    num_samples: int = flag(
        10, f"random problems to score, and the first {SHOWN} to show; 0: score the whole split", least=0
    )
    k: int = flag(1, "answers a problem; above 1 they are sampled, and pass@k and majority vote are reported", least=1)
    temperature: float | None = flag(None, "0: greedy, as when left out; with --k, that of the training, or 1")
    max_completion_tokens: int | None = flag(None, "as in training when left out, or 300", least=1)
    seed: int = flag(0, "of the choice of problems, of sampling, and of synthetic problems")
    output: str | None = flag(None, "write settings, versions and every completion to this JSON file")
    ask: str | None = flag(None, "answer this question and stop")
    json: bool = flag(False, "only read questions, one a line, and write one JSON object a line")
    interactive: bool = flag(True, "ask for problems afterwards, when there is a terminal or a pipe to read from")
    device: str | None = flag(None, "cpu or cuda; CUDA when there is one")
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "the model works in; auto: bf16 where the hardware has it")

    def __post_init__(self) -> None:
        check_fields(self)
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

    def __init__(self, name: str, config: TestConfig, processes: Processes):
        self.name, self.processes, self.device = name, processes, processes.choose_device(config.device)
        self.settings: dict[str, Any] = {}
        with contextlib.suppress(*UNREADABLE):  # any model folder will do
            self.settings = read_state(Path(name))["settings"]
        model, self.tokenizer = load_model(name, self.device, config.dtype, embedded_models(config.seed))
        set_template_arguments(self.tokenizer, config.template_arguments)
        self.sampler = Sampler(model, end_token_ids(model, self.tokenizer), pad_token_id(self.tokenizer))


@dataclass(frozen=True)
class Conditions:
    """What holds for both models: what the flags say; else what the first was trained with."""

    dataset: str
    columns: Mapping[str, Any]
    dataset_seed: int
    max_completion_tokens: int
    temperature: float
    system_prompt: str
    rewards: RewardSet


def choose_model(config: TestConfig) -> str:
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


def choose_conditions(config: TestConfig, settings: Mapping[str, Any]) -> Conditions:
    """settings: those of the training, empty for a model that is no checkpoint."""
    trained_on = settings if config.dataset in (None, settings.get("dataset")) else {}
    names = ("question_column", "answer_column", "answer_pattern")
    columns = {name: getattr(config, name) or trained_on.get(name) for name in names}
    prompt = TINY_SYSTEM_PROMPT if config.model == "tiny" else SYSTEM_PROMPT
    return Conditions(
        dataset=config.dataset or settings.get("dataset", "openai/gsm8k"),
        columns={name: value for name, value in columns.items() if value},
        dataset_seed=settings.get("seed", config.seed),
        max_completion_tokens=config.max_completion_tokens or settings.get("max_completion_tokens", 300),
        temperature=config.temperature or (settings.get("temperature", 1.0) if config.k > 1 else 0.0),
        system_prompt=read_system_prompt(config.system_prompt_file, settings.get("system_prompt", prompt)),
        rewards=_choose_rewards(config.rewards, settings),
    )


def _choose_rewards(spec: str | None, settings: Mapping[str, Any]) -> RewardSet:
    """Those named; else the ones trained with, where no file has to be run for them."""
    trained_with = settings.get("rewards")
    if spec is None and trained_with and ":" in trained_with:
        print(f"trained with --rewards {printable(trained_with)}: give it again to see those rewards", file=sys.stderr)
        return built_in()
    return choose_rewards(spec or trained_with, settings.get("reward_weights", DEFAULT_WEIGHTS))


def choose_data(config: TestConfig, conditions: Conditions) -> list[Example]:
    """The whole split."""
    seed = conditions.dataset_seed
    examples, dropped = load_examples(conditions.dataset, config.split, seed, **conditions.columns)
    conditions.rewards.try_out(examples)
    if dropped:
        print(f"{dropped.total()} rows that cannot be used were left out", file=sys.stderr)
    return examples


def evaluate_model(model: Model, config: TestConfig, conditions: Conditions, problems: list[Example]) -> Evaluation:
    """Answers to these problems, under a progress bar with the accuracy so far, of this process's share."""
    started, right, c = time.perf_counter(), 0, conditions
    total = len(model.processes.problems(len(problems))) * config.k
    often = 0.1 if sys.stderr.isatty() else 60.0  # seconds between two lines, all of which a file keeps
    with tqdm(total=total, desc="evaluating", unit="answer", mininterval=often) as bar:

        def on_progress(new: list[Scored]) -> None:
            nonlocal right
            right += sum(scored.correct for scored in new)
            bar.update(len(new))
            if bar.n:
                bar.set_postfix_str(f"accuracy {right / bar.n:.1%}", refresh=False)

        parts = (model.sampler, model.tokenizer, problems, c.max_completion_tokens, c.rewards, c.system_prompt)
        sampling = {"k": config.k, "temperature": c.temperature, "seed": config.seed}
        try:
            result = evaluate(*parts, **sampling, on_progress=on_progress, processes=model.processes)
        except KeyboardInterrupt:
            bar.close()
            so_far = f"{bar.n} of {bar.total} answers, {right} of them right"
            print(f"stopped after {so_far}: no estimate, since short answers end first", file=sys.stderr)
            raise
    seconds, tokens = time.perf_counter() - started, sum(scored.tokens for scored in result.scored)
    print(f"{printable(model.name)}: {seconds:.1f} s for {tokens} tokens, {tokens / seconds:.0f} a second")
    return result


def show(evaluation: Evaluation) -> None:
    """The first problems: each with its truth, the first of its completions and what that earned."""
    for answers in evaluation.problems()[:SHOWN]:
        first, right = answers[0], sum(scored.correct for scored in answers)
        scores = ", ".join(f"{name} {value:.2f}" for name, value in first.scores.items())
        verdict = ("right" if right else "wrong") if len(answers) == 1 else f"{right} of {len(answers)} answers right"
        print(f"question:   {printable(first.example.question)}")
        print(f"completion: {printable(first.completion)}")
        print(f"truth:      {printable(first.example.answer)}   ({verdict})")
        print(f"rewards:    {scores}\n")


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


def write_output(config: TestConfig, conditions: Conditions, evaluations: Sequence[tuple[Model, Evaluation]]) -> None:
    """Everything about the evaluation, as JSON; the same seed gives the same file, so no clock and no file name."""
    c, (model, first), others = conditions, evaluations[0], evaluations[1:]
    settings = {key: value for key, value in asdict(config).items() if key not in ("output", "interactive")}
    used = {key: getattr(c, key) for key in ("dataset", "max_completion_tokens", "temperature", "system_prompt")}
    used["weights"] = dict(zip(c.rewards.names, c.rewards.weights, strict=True))
    report = {
        "settings": settings | used | c.columns,
        "versions": describe_run(model.device),
        "models": [
            {"model": m.name, "metrics": e.metrics(c.rewards.weights), "problems": e.describe()} for m, e in evaluations
        ],
        "differences": {name: d._asdict() for _, other in others for name, d in first.compare(other).items()},
    }
    try:
        Path(config.output).write_text(json.dumps(report, indent=1, ensure_ascii=False, default=str), encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot write '{config.output}' ({error.strerror}): choose another --output.") from error


def run(config: TestConfig, processes: Processes) -> None:
    """Choose models and data, evaluate, show, compare, prompt; or only answer. Process 0 alone speaks and writes."""
    if processes.rank and (config.json or config.ask is not None):
        return
    models = [Model(name, config, processes) for name in (choose_model(config), config.compare) if name]
    model, c = models[0], choose_conditions(config, models[0].settings)
    for each in models:
        if each.settings.get("system_prompt", c.system_prompt) != c.system_prompt:
            print(f"{printable(each.name)} was trained with another system prompt", file=sys.stderr)
    parts = (model.sampler, model.tokenizer, c.max_completion_tokens, c.system_prompt, config.seed)
    answerer, temperature = Answerer(*parts), config.temperature or 0.0
    if config.ask is not None:
        answer = answerer.answer(config.ask, temperature)
        print(json.dumps(asdict(answer)) if config.json else printable(answer.completion))
        return
    if config.json:
        answer_lines(answerer, temperature)
        return

    examples = choose_data(config, c)
    problems = fixed_subset(examples, config.num_samples, config.seed)
    for each in models:
        prompts = encode_prompts(each.tokenizer, [problem.question for problem in problems], c.system_prompt)
        check_room(each.sampler.model, prompts, c.max_completion_tokens)
    processes.check_same({**asdict(config), "the problems": fingerprint_examples(problems)})
    evaluations: list[tuple[Model, Evaluation]] = []
    for each in models:
        evaluation = evaluate_model(each, config, c, problems)
        if config.num_samples and each is model:
            show(evaluation)
        print(summarise(evaluation, c.rewards.weights))
        evaluations.append((each, evaluation))
    if processes.rank:
        return
    for other, evaluation in evaluations[1:]:
        print(summarise_difference(other.name, evaluations[0][1], evaluation))
    if config.output:
        write_output(config, c, evaluations)
    if config.interactive and sys.stdin:
        draw = random.Random(config.seed).choice
        Prompt(answerer, lambda: draw(examples), temperature).run()


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the flags say; returns the exit status."""
    processes = Processes()
    try:
        processes = connect()
        (config,) = parse_flags((TestConfig,), argv)
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # of what is no text a question is made all the same
        sys.stdout.reconfigure(errors="backslashreplace")
        with memory_errors(), processes.one_speaks():
            run(config, processes)
        processes.close()
        return 0
    except UserError as error:
        if processes.first_to_tell():
            print(f"test.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # what reads the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
