"""Fine-tune a small chat model for math reasoning with GRPO.

    python train.py                    Qwen2.5-0.5B-Instruct on GSM8K
    python train.py --preset tiny      everything embedded: no download, no GPU
    python train.py --resume           go on after a stop

In the order of the run: settings, model and data, the cold start (if asked for), GRPO, the last checkpoint. A step of
GRPO is `GRPOTrainer.step` in src/grpo.py; how a run is kept and logged, in src/run; every flag, in docs/flags.md.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until all is imported, which takes seconds

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.chat_template import set_template_arguments
from src.cold_start import ColdStart, target_batch
from src.data import Example
from src.engine import models
from src.engine.lora import add_lora
from src.engine.processes import Processes
from src.engine.sampling import LEAST_ROWS, Sampler
from src.errors import UserError
from src.evaluation import evaluate, fixed_subset
from src.grpo import GRPOConfig, GRPOTrainer
from src.model_card import write_card
from src.reward_set import RewardError, RewardSet, choose_rewards
from src.run.lock import exclusive
from src.run.saving import Progress, Saver, Schedule, open_resume
from src.run.stopping import Stopped, StopRequest, stop_request
from src.run.tracking import LOSS_NOTE, Bar, Log, NoLog, RunLog
from src.script import describe_run, fingerprint_code, run_script
from src.seeding import batch_indices
from src.settings import TrainConfig, changed_settings, described, names_of, parse_flags, resume_settings
from src.splits import check_sizes, cold_start_targets, fingerprint_examples, load_splits
from src.tiny import embedded_models

log = logging.getLogger("src.train")


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say; returns the exit status."""

    def work(processes: Processes) -> int:
        stop = to_the_end.enter_context(stop_request())  # a launcher may send SIGTERM while this says why it ends
        config, grpo = parse_flags((TrainConfig, GRPOConfig), argv)
        folders = () if processes.rank else (Path(config.checkpoint_dir), Path(config.log_dir))
        with exclusive(*folders):
            train(config, grpo, processes, stop)
        return 128 + stop.signum if stop.signum else 0

    with ExitStack() as to_the_end:
        return run_script("train.py", work, stopped="stopped at once; --resume goes on from the last checkpoint.")


@dataclass(frozen=True)
class Run:
    """What a run works with."""

    config: TrainConfig
    grpo: GRPOConfig
    rewards: RewardSet
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampler: Sampler
    train_set: list[Example]
    targets: list[Example]  # those that a cold start can learn from
    test_set: list[Example]
    identity: dict[str, str | None]  # what tells the content of model, data and rewards
    log: Log
    processes: Processes
    stop: StopRequest

    def draw(self, problems: Sequence[Example], count: int, step: int, name: str) -> list[Example]:
        """Those of a step, each once an epoch; another name gives another order, in a resumed run the same."""
        return [problems[row] for row in batch_indices(len(problems), count, step, self.config.seed, name)]


def train(config: TrainConfig, grpo: GRPOConfig, processes: Processes, stop: StopRequest) -> None:
    """The whole run, from its beginning or from a checkpoint."""
    saved = processes.first(lambda: open_resume(config.resume, Path(config.checkpoint_dir), config.replace))
    if saved:
        resume_settings(config, saved.state.settings)
    with closing(NoLog() if processes.rank else RunLog(Path(config.log_dir), config.tensorboard)) as run_log:
        run = load(config, grpo, run_log, processes, stop)
        saver = make_saver(run)
        if saved:  # GRPO begins with the reference that the run had
            saver.check(saved, changed_settings(saved.state.settings, config, grpo), config.allow_changes)
            if saved.state.progress.phase == "grpo":
                saver.load_reference(saved, cold_start=config.cold_start_steps > 0, needed=grpo.kl_coef > 0)
                begin_grpo(run, saver)
            saver.take_over(saved)
        saver.rehearse()
        run_log.begin(saver.run, saver.settings, names_of("tells", config, grpo), saved and saved.state)
        try:
            if saver.progress.phase == "cold_start":
                run_cold_start(run, saver)
            run_grpo(run, saver)
        except (Stopped, RewardError) as reason:
            place = saver.save_here()
            if isinstance(reason, RewardError):
                raise UserError(f"After {place}: {reason} Mend it and --resume with --allow_changes true.") from reason
            (stop.signum,) = reason.args  # that of another process, it may be


def load(config: TrainConfig, grpo: GRPOConfig, run_log: Log, processes: Processes, stop: StopRequest) -> Run:
    """Rewards, model and data. What does not fit is said here, before the first step."""
    rewards = choose_rewards(grpo.rewards, grpo.reward_weights)
    device = processes.choose_device(config.device)
    processes.meet()
    model, tokenizer = models.load_model(config.model, device, config.dtype, embedded_models(config.seed))
    config.dtype = models.dtype_name(model.dtype)  # what a resumed run goes on in
    set_template_arguments(tokenizer, config.template_arguments)

    columns = (config.question_column, config.answer_column, config.answer_pattern, rewards.columns)
    fitting = (config.system_prompt, grpo.max_prompt_tokens, grpo.max_completion_tokens)
    train_set, test_set = load_splits(config.dataset, config.seed, columns, model, tokenizer, *fitting)
    targets = cold_start_targets(train_set)
    batch_size = config.cold_start_batch_size if config.cold_start_steps else 0
    check_sizes(train_set, grpo.prompts_per_step, targets, batch_size)
    rewards.try_out(train_set)
    identity = {"model": models.fingerprint_model(model), "data": fingerprint_examples(train_set)}
    identity |= {"test data": fingerprint_examples(test_set), "rewards": rewards.fingerprint}
    identity["reward code"] = fingerprint_code("rewards.py", "arithmetic.py")
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.seed)
    rows = max(LEAST_ROWS[device.type], len(processes.problems(grpo.prompts_per_step)) * grpo.group_size)
    sampler = Sampler(model, models.end_token_ids(model, tokenizer), models.pad_token_id(tokenizer), rows)
    problems = (train_set, targets, test_set)
    return Run(config, grpo, rewards, model, tokenizer, sampler, *problems, identity, run_log, processes, stop)


def make_saver(run: Run) -> Saver:
    """What keeps the run. It begins in the cold start, which has no step by default."""
    c, g = run.config, run.grpo
    versions = describe_run(run.processes.device)
    run.log.about(versions | run.identity | {"processes": str(run.processes.world)})

    def write_model(folder: Path, progress: Progress) -> None:
        models.save_model(run.model, run.tokenizer, folder)
        samples = len(run.test_set)
        write_card(folder, described(c, g), progress, min(c.eval_samples or samples, samples), versions)

    steps_per_epoch = len(run.train_set) // g.prompts_per_step
    total_steps = c.epochs * steps_per_epoch if c.max_steps is None else c.max_steps
    schedule = Schedule(steps_per_epoch, total_steps, c.save_every, c.eval_every, c.keep_best)
    learner = ColdStart(run.model, g.max_grad_norm, g.token_budget, run.processes)
    kept = (schedule, asdict(c) | asdict(g), run.identity, learner, write_model, run.log.lines, run.processes)
    return Saver(Path(c.checkpoint_dir), c.keep_last, *kept, c.replace)


def run_cold_start(run: Run, saver: Saver) -> None:
    """Supervised steps on the XML targets at a constant rate."""
    c, p = run.config, saver.progress
    with Bar("cold start", p.step, c.cold_start_steps) as bar:
        while p.step < c.cold_start_steps:
            targets = run.draw(run.targets, c.cold_start_batch_size, p.step, "cold start")
            batch = target_batch(run.tokenizer, targets, run.sampler.pad_id, saver.learner.device, c.system_prompt)
            metrics = saver.learner.step(batch, c.cold_start_learning_rate)
            p.step += 1
            run.log.step(p.phase, p.step, metrics)
            bar.show(metrics, steps=1)
            saver.save_if_due()
            run.stop.raise_if_asked(run.processes.asked_to_stop)
    begin_grpo(run, saver)
    if c.cold_start_steps:  # with a KL term this is the reference, which a resumed run needs
        saver.save_reference(must=run.grpo.kl_coef > 0)


def begin_grpo(run: Run, saver: Saver) -> None:
    """The model as it is now becomes the reference; the optimizer starts anew."""
    saver.learner.optimizer.close()
    parts = (run.model, run.tokenizer, run.sampler, run.grpo, run.config.seed, run.rewards, run.config.system_prompt)
    saver.progress, saver.learner = Progress("grpo"), GRPOTrainer(*parts, run.processes)


def run_grpo(run: Run, saver: Saver) -> None:
    """Sample, score, learn; validate before the first step, on schedule, and after the last."""
    c, p, trainer, schedule = run.config, saver.progress, saver.learner, saver.schedule
    draw = partial(run.draw, run.train_set, run.grpo.prompts_per_step)
    log.info(LOSS_NOTE)
    with Bar("GRPO", p.step, schedule.total_steps) as bar:
        while True:
            if schedule.validates(p):
                bar.set_postfix_str("validating")
                metrics = score_test_set(run, p.step)
                p.validated(metrics["eval/accuracy"])
                bar.show(metrics)
            saver.save_if_due()
            run.stop.raise_if_asked(run.processes.asked_to_stop)
            if p.step >= schedule.total_steps:
                break
            metrics, rollout = trainer.step(p.step, draw(p.step, "GRPO"), lambda n: draw(p.step, f"attempt {n}"))
            p.step, p.evaluated = p.step + 1, False
            run.log.step(p.phase, p.step, metrics)
            if c.sample_every and p.step % c.sample_every == 0:
                run.log.samples(p.step, rollout.describe(trainer.total_rewards(rollout), run.rewards.names))
            bar.show(metrics, steps=1)
    run.log.summary(p, saver.folder / "final")


def score_test_set(run: Run, step: int) -> dict[str, float]:
    """The metrics of greedy answers to the same test problems each time."""
    started = time.perf_counter()
    problems, length = fixed_subset(run.test_set, run.config.eval_samples), run.grpo.max_completion_tokens
    parts = (run.sampler, run.tokenizer, problems, length, run.rewards, run.config.system_prompt)
    result = evaluate(*parts, on_progress=lambda new: run.stop.raise_if_asked(), processes=run.processes)
    metrics = result.metrics(run.rewards.weights) | {"seconds": time.perf_counter() - started}
    run.log.evaluation(step, metrics)
    return metrics


if __name__ == "__main__":
    sys.exit(main())
