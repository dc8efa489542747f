"""Score a model on test problems, alone or against another, then answer what is typed: `python test.py --help`."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until all is imported, which takes seconds

import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from src.arithmetic import describe_texts
from src.chat_template import set_template_arguments
from src.console import Answerer, Prompt, answer_lines, read_temperature
from src.data import SYSTEM_PROMPT, Example, encode_prompts, load_examples, read_system_prompt
from src.engine.models import check_room, end_token_ids, load_model, pad_token_id
from src.engine.processes import Processes
from src.engine.sampling import Sampler
from src.errors import UserError, one_line, say, warn, writing
from src.evaluation import Evaluation, evaluate, fixed_subset
from src.grpo import GRPOConfig
from src.reward_set import RewardSet, built_in, choose_rewards
from src.run.checkpoint import load_state, marked, newest_checkpoint
from src.script import describe_run, run_script
from src.settings import HOME, TrainConfig, check_fields, flag, parse_flags, place, read_settings
from src.tiny import TINY_SYSTEM_PROMPT, embedded_models

SHOWN = 20  # problems on the screen; all of them are in the --output file


@dataclass
class TestConfig:
    """Settings of an evaluation; each is a flag."""

    __test__ = False  # not a test case, whatever its name suggests to pytest

    checkpoint: str | None = flag(None, "a checkpoint; the last one saved in checkpoints/ when left out", path=HOME)
    model: str | None = flag(None, "a Hub id or model folder, instead of a checkpoint", path=HOME)
    compare: str | None = flag(None, "another checkpoint, model folder or Hub id, on the same problems", path=HOME)
    dataset: str | None = place(None, "as in train.py; what the checkpoint was trained on when left out")
    question_column: list[str] | None = flag(None, "as in train.py, and in training when left out with --dataset")
    answer_column: str | None = flag(None, "the same")
    answer_pattern: str | None = flag(None, "the same")
    system_prompt_file: str | None = flag(None, "as in training when left out", path=HOME)
    system_prompt: str = field(init=False)  # its text, once it is settled
    template_arguments: list[str] | None = flag(None, "as in train.py; a checkpoint keeps those it was trained with")
    rewards: str | None = flag(None, "as in train.py; a checkpoint never brings a file to run, so name yours again")
    split: str = flag("test", "train, test, or another one that the data has")
    num_samples: int = flag(10, f"random problems to score, the first {SHOWN} shown; 0: score the whole split", least=0)
    k: int = flag(1, "answers a problem; above 1 they are sampled, and pass@k and majority vote are reported", least=1)
    temperature: float | None = flag(None, "0: greedy, as when left out; with --k, that of the training, or 1")
    max_completion_tokens: int | None = flag(None, "as in training when left out, or 300", least=1)
    seed: int = flag(0, "of the choice of problems, of sampling, and of synthetic problems if no checkpoint has one")
    output: str | None = flag(None, "write settings, versions and every completion to this JSON file", path=HOME)
    ask: str | None = flag(None, "answer this question and stop")
    json: bool = flag(False, "only read questions, one a line, and write one JSON object a line")
    interactive: bool = flag(True, "ask for problems afterwards, when there is a terminal or a pipe to read from")
    device: str | None = flag(None, "cpu or cuda; CUDA when there is one")
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "the model works in; auto: bf16 where the hardware has it")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.temperature is not None:
            read_temperature(self.temperature, "--temperature")
        if self.k > 1 and self.temperature == 0:
            raise UserError(f"--k {self.k} samples, and --temperature 0 does not: give one of them.")
        if self.checkpoint and self.model:
            raise UserError("--checkpoint and --model both name a model: give one of them.")
        if (self.json or self.ask is not None) and (self.k > 1 or self.compare or self.output):
            raise UserError("--ask and --json only answer: leave --k, --compare and --output out.")
        if self.output and (os.path.isdir(self.output) or not os.path.isdir(Path(self.output).parent)):
            raise UserError(f"--output '{self.output}' is no file in a folder that exists: choose another.")


class Model:
    """A loaded model, and the settings it was trained with when it is a checkpoint."""

    def __init__(self, name: str, config: TestConfig, processes: Processes):
        self.name, self.processes, self.device = name, processes, processes.choose_device(config.device)
        values = load_state(Path(name)).settings if marked(Path(name)) else {}  # any model folder will do
        try:
            self.settings = read_settings(values, TrainConfig)
            self.grpo = GRPOConfig(**read_settings(values, GRPOConfig))
        except UserError as error:
            raise UserError(f"Cannot use the checkpoint '{name}' ({one_line(error)}): choose another.") from error
        model, self.tokenizer = load_model(name, self.device, config.dtype, embedded_models(config.seed))
        set_template_arguments(self.tokenizer, config.template_arguments)
        self.sampler = Sampler(model, end_token_ids(model, self.tokenizer), pad_token_id(self.tokenizer))


def choose_model(config: TestConfig) -> str:
    """What to load: the model named, or the checkpoint named, or the newest one."""
    if config.model:
        return config.model
    path = Path(config.checkpoint) if config.checkpoint else newest_checkpoint(Path("checkpoints"))
    if path is None:
        raise UserError("There is no checkpoint in 'checkpoints' yet: run train.py first, or name one or a --model.")
    if not os.path.isdir(path):
        raise UserError(f"There is no checkpoint folder '{path}': check the path, or leave --checkpoint out.")
    warn(f"checkpoint: {path}")
    return str(path)


def settle(config: TestConfig, model: Model) -> tuple[TestConfig, RewardSet]:
    """What holds for both models, nothing left out: what the flags say; else what the first was trained with."""
    trained, grpo, usual = model.settings, model.grpo, asdict(TrainConfig())
    source = trained if config.dataset in (None, trained.get("dataset")) else {}
    names = ("dataset", "question_column", "answer_column", "answer_pattern")
    values = {name: getattr(config, name) or source.get(name) or usual[name] for name in names}
    values["max_completion_tokens"] = config.max_completion_tokens or grpo.max_completion_tokens
    values["temperature"] = config.temperature or (grpo.temperature if config.k > 1 else 0.0)
    settled = replace(config, **values)
    prompt = trained.get("system_prompt", TINY_SYSTEM_PROMPT if config.model == "tiny" else SYSTEM_PROMPT)
    settled.system_prompt = read_system_prompt(config.system_prompt_file, prompt)
    if config.rewards is None and grpo.rewards and ":" in grpo.rewards:  # no file is run that a checkpoint names
        warn(f"trained with --rewards {grpo.rewards}: give it again to see those rewards")
        return settled, built_in()
    return settled, choose_rewards(config.rewards or grpo.rewards, grpo.reward_weights)


def choose_data(config: TestConfig, seed: int, rewards: RewardSet) -> list[Example]:
    """The whole split, on which the rewards work. seed: of synthetic problems."""
    columns = (config.question_column, config.answer_column, config.answer_pattern)
    examples, dropped = load_examples(config.dataset, config.split, seed, *columns)
    rewards.try_out(examples)
    if dropped:
        warn(f"{dropped.total()} rows that cannot be used were left out")
    if texts := describe_texts([example.answer for example in examples]):
        warn(texts)
    return examples


def score(model: Model, config: TestConfig, rewards: RewardSet, problems: list[Example]) -> tuple[Evaluation, str]:
    """Answers to these problems, and how fast they came; a progress bar shows how many this process has."""
    started, often = time.perf_counter(), 0.1 if sys.stderr.isatty() else 60.0  # a file keeps every line of the bar
    total = len(model.processes.problems(len(problems))) * config.k
    parts = (model.sampler, model.tokenizer, problems, config.max_completion_tokens, rewards, config.system_prompt)
    options = {"k": config.k, "temperature": config.temperature, "seed": config.seed, "processes": model.processes}
    with tqdm(total=total, desc="evaluating", unit="answer", mininterval=often) as bar:
        result = evaluate(*parts, **options, on_progress=lambda new: bar.update(len(new)))
    seconds, tokens = time.perf_counter() - started, sum(scored.tokens for scored in result.scored)
    return result, f"{model.name}: {seconds:.1f} s for {tokens} tokens, {tokens / seconds:.0f} a second"


def describe(evaluation: Evaluation) -> str:
    """The first problems: each with its truth, the first of its completions and what that earned."""
    text = ""
    for answers in evaluation.problems()[:SHOWN]:
        first, right = answers[0], sum(scored.correct for scored in answers)
        scores = ", ".join(f"{name} {value:.2f}" for name, value in first.rewards.items())
        verdict = ("right" if right else "wrong") if len(answers) == 1 else f"{right} of {len(answers)} answers right"
        text += f"question:   {first.example.question}\ncompletion: {first.completion}\n"
        text += f"truth:      {first.example.answer}   ({verdict})\nrewards:    {scores}\n\n"
    return text


def summarise(evaluation: Evaluation, weights: Sequence[float]) -> str:
    """Shares of the problems with their intervals, and the means."""
    m = {name.removeprefix("eval/"): value for name, value in evaluation.metrics(weights).items()}
    text = f"on {m['samples']} problems, with 95% intervals:\n"
    for name in evaluation.measures():
        text += f"  {name:<16} {m[name]:6.1%}  ({m[f'{name}_low']:.1%} to {m[f'{name}_high']:.1%})\n"
    means = (f"{name.removeprefix('reward/')} {m[name]:.3f}" for name in m if name.startswith("reward/"))
    text += f"reward {m['reward']:.3f}: {', '.join(means)}\n"
    text += f"{m['completion_tokens']:.0f} tokens a completion, {m['truncated']:.1%} cut off\n"
    return text + f"{m['reasoning_without_calculation']:.1%} without a calculation in the reasoning\n"


def summarise_difference(name: str, evaluation: Evaluation, other: Evaluation) -> str:
    """Differences in points with their intervals and p-values."""
    test = "McNemar's exact p" if evaluation.k == 1 else "p of a permutation test of the mean"
    text = f"better than {name} by so many points, with 95% intervals, and {test}:\n"
    for measure, d in evaluation.compare(other).items():
        points = f"{100 * d.difference:+6.1f}  ({100 * d.low:+.1f} to {100 * d.high:+.1f})"
        text += f"  {measure:<16} {points}, p = {d.p:.2g}; problems: {d.gained} better, {d.lost} worse\n"
    return text


def write_output(config: TestConfig, rewards: RewardSet, results: Sequence[tuple[Model, Evaluation]]) -> None:
    """Everything about the evaluation, as JSON; the same seed gives the same file, so no clock."""
    settings = asdict(config) | {"weights": dict(zip(rewards.names, rewards.weights, strict=True))}
    models = [{"model": m.name, "metrics": e.metrics(rewards.weights), "problems": e.describe()} for m, e in results]
    report = {
        "settings": {name: value for name, value in settings.items() if name not in ("output", "interactive")},
        "versions": describe_run(results[0][0].device),
        "models": models,
        "differences": {n: d._asdict() for _, other in results[1:] for n, d in results[0][1].compare(other).items()},
    }
    text = json.dumps(report, indent=1, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace")
    with writing(f"'{config.output}'", "choose another --output"):
        Path(config.output).write_bytes(text)


def run(config: TestConfig, processes: Processes) -> None:
    """Choose models and data, evaluate, show, compare, prompt; or only answer. Process 0 alone speaks and writes."""
    only_answer, temperature = config.json or config.ask is not None, config.temperature or 0.0
    if processes.rank and only_answer:
        return
    models = [Model(name, config, processes) for name in (choose_model(config), config.compare) if name]
    model, (config, rewards) = models[0], settle(config, models[0])
    for each in models:
        if each.settings.get("system_prompt", config.system_prompt) != config.system_prompt:
            warn(f"{each.name} was trained with another system prompt")
    answerer = Answerer(model.sampler, model.tokenizer, config.max_completion_tokens, config.system_prompt, config.seed)
    if config.ask is not None:
        answer = answerer.answer(config.ask, temperature)
        say(json.dumps(asdict(answer)) if config.json else answer.completion)
    elif config.json:
        answer_lines(answerer, temperature)
    if only_answer:
        return

    examples = choose_data(config, model.settings.get("seed", config.seed), rewards)
    problems = fixed_subset(examples, config.num_samples, config.seed)
    for each in models:
        prompts = encode_prompts(each.tokenizer, [problem.question for problem in problems], config.system_prompt)
        check_room(each.sampler.model, prompts, config.max_completion_tokens)
    results: list[tuple[Model, Evaluation]] = []
    for each in models:
        evaluation, speed = score(each, config, rewards, problems)
        results.append((each, evaluation))
        shown = [speed, describe(evaluation)] if config.num_samples and each is model else [speed]
        shown.append(summarise(evaluation, rewards.weights))
        if each is not model:
            shown.append(summarise_difference(each.name, results[0][1], evaluation))
        try:  # what was measured is in the file, or on the screen, whatever becomes of the other
            if config.output and not processes.rank:
                write_output(config, rewards, results)
        finally:
            say("\n".join(shown))
    if config.interactive and not processes.rank:
        draw = random.Random(config.seed).choice
        Prompt(answerer, lambda: draw(examples), temperature).run()


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the flags say; returns the exit status."""
    return run_script("test.py", lambda processes: run(*parse_flags((TestConfig,), argv), processes))


if __name__ == "__main__":
    sys.exit(main())
