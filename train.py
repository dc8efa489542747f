"""Fine-tune a small chat model for math reasoning with GRPO: `python train.py --help`.

In order: settings, data, model, cold start (if asked for), GRPO with validation and checkpoints, the last checkpoint.
"""

import json
import logging
import shlex
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from src.cold_start import ColdStart, target_batch
from src.config import PRESETS, TrainConfig
from src.data import Example
from src.engine.lora import add_lora
from src.engine.models import (
    check_room,
    dtype_name,
    end_token_ids,
    fingerprint_model,
    load_model,
    pad_token_id,
    saved_dtype,
)
from src.engine.processes import Processes
from src.engine.sampling import Sampler
from src.errors import UserError, memory_errors
from src.evaluation import Evaluation, evaluate, fixed_subset
from src.grpo import GRPOConfig, GRPOTrainer
from src.memory import LEAST_ROWS, report_memory
from src.reward_set import RewardError, choose_rewards
from src.rollout import Rollout
from src.run.checkpoint import exclusive, remove_debris, save_checkpoint, tensors_digest
from src.run.model_card import model_card
from src.run.report import illustrate, results
from src.run.saving import Progress, Saver, check_same_run, due_names, load_reference, open_resume, step_name
from src.run.stopping import Stopped, StopRequest, stop_request
from src.run.tracking import LOSS_NOTE, RunLog, describe_run
from src.seeding import batch_indices
from src.settings import parse_flags
from src.splits import check_sizes, cold_start_targets, fingerprint_examples, load_splits

log = logging.getLogger("src.train")

LEARNER_STATE = ("skipped_steps", "skips_in_a_row", "token_budget")


class Run:
    """One training run, from its settings to its last checkpoint."""

    def __init__(self, config: TrainConfig, grpo: GRPOConfig, run_log: RunLog, stop: StopRequest):
        self.config, self.grpo, self.run_log, self.stop = config, grpo, run_log, stop
        self.rewards = choose_rewards(grpo.rewards, grpo.reward_weights)
        self.device = Processes().choose_device(config.device)
        self.versions = describe_run(self.device)
        self.model, self.tokenizer = load_model(config.model, self.device, config.seed, config.dtype)
        config.dtype = dtype_name(self.model.dtype)  # what a resumed run goes on in
        check_room(self.model, grpo.max_completion_tokens)
        columns = (config.question_column, config.answer_column, config.answer_pattern, self.rewards.columns)
        fitting = (self.tokenizer, grpo.max_prompt_tokens, config.system_prompt)
        self.train_set, self.test_set = load_splits(config.dataset, config.seed, columns, *fitting)
        self.targets = cold_start_targets(self.train_set)
        batch_size = config.cold_start_batch_size if config.cold_start_steps else 0
        check_sizes(self.train_set, grpo.prompts_per_step, self.targets, batch_size)
        self.rewards.try_out(self.train_set)
        self.identity = {"model": fingerprint_model(self.model), "data": fingerprint_examples(self.train_set)}
        self.identity["rewards"] = self.rewards.fingerprint
        if config.lora_rank:
            add_lora(self.model, config.lora_rank, config.seed)
        rows = max(LEAST_ROWS, grpo.prompts_per_step * grpo.group_size)
        end_ids = end_token_ids(self.model, self.tokenizer)
        self.sampler = Sampler(self.model, end_ids, pad_token_id(self.tokenizer), rows)
        self.trainer: ColdStart | GRPOTrainer = ColdStart(self.model, grpo.max_grad_norm, grpo.token_budget)
        self.progress = Progress()
        self.saver = Saver(Path(config.checkpoint_dir), config.keep_last)
        self.id, self.reference = uuid.uuid4().hex, None  # reference: which cold start GRPO began from, if one
        self.shown: dict[str, float] = {}  # the latest metrics

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_set) // self.grpo.prompts_per_step

    @property
    def total_steps(self) -> int:
        if self.config.max_steps is not None:
            return self.config.max_steps
        return self.config.epochs * self.steps_per_epoch

    def train(self) -> None:
        """Everything, in order."""
        report_memory(self.model, self.sampler, self.grpo)
        if self.progress.phase == "cold_start":
            self._cold_start()
        self._grpo()

    def _cold_start(self) -> None:
        """Supervised steps at a constant rate; none by default."""
        c = self.config
        with self._bar("cold start", c.cold_start_steps) as bar:
            while self.progress.step < c.cold_start_steps:
                step = self.progress.step
                indices = batch_indices(len(self.targets), c.cold_start_batch_size, step, c.seed, "cold start")
                examples = [self.targets[i] for i in indices]
                batch = target_batch(self.tokenizer, examples, self.sampler.pad_id, self.device, c.system_prompt)
                metrics = self.trainer.step(batch, c.cold_start_learning_rate)
                self.progress.step += 1
                self._log_step(metrics)
                bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
                bar.update()
                self._save_if_due()
                self.stop.raise_if_asked()
        self._start_grpo()
        if c.cold_start_steps:  # with a KL term this is the reference, which a resumed run needs
            self._save(["cold_start"], must=self.grpo.kl_coef > 0)
            if self.saver.saved == self.progress:
                self.reference = tensors_digest(self.saver.path)

    def _start_grpo(self) -> None:
        """The model as it is now becomes the reference; the optimizer starts anew."""
        self.trainer.optimizer.close()
        parts = (self.model, self.tokenizer, self.sampler, self.grpo)
        self.trainer = GRPOTrainer(*parts, self.config.seed, self.rewards, self.config.system_prompt)
        self.progress = Progress(phase="grpo")

    def _grpo(self) -> None:
        """Sample, score, learn; validate before the first step, on schedule, and after the last."""
        log.info(LOSS_NOTE)
        with self._bar("GRPO", self.total_steps) as bar:
            while True:
                self._validate_if_due(bar)
                self._save_if_due()
                self.stop.raise_if_asked()
                if self.progress.step >= self.total_steps:
                    break
                step = self.progress.step
                indices = batch_indices(len(self.train_set), self.grpo.prompts_per_step, step, self.config.seed, "GRPO")
                examples = [self.train_set[i] for i in indices]
                metrics, rollout = self.trainer.step(step, examples, self._other_problems)
                self.progress.step, self.progress.evaluated = step + 1, False
                self._log_step(metrics)
                self._log_samples(examples, rollout)
                self._show(bar, metrics)
                bar.update()
        if self.config.final_eval_samples is not None:
            self._evaluate("final_eval", self.config.final_eval_samples)

    def _other_problems(self, attempt: int) -> list[Example]:
        """For dynamic sampling: an order of their own for each attempt, so that a resumed run draws the same."""
        rows, per_step, name = len(self.train_set), self.grpo.prompts_per_step, f"attempt {attempt}"
        return [self.train_set[i] for i in batch_indices(rows, per_step, self.progress.step, self.config.seed, name)]

    def _validate_if_due(self, bar: tqdm) -> None:
        p, every = self.progress, self.config.eval_every
        due = p.step in (0, self.total_steps) or p.step % self.steps_per_epoch == 0 or (every and p.step % every == 0)
        if p.evaluated or not due:
            return
        bar.set_postfix_str("validating")
        result = self._evaluate("eval", self.config.eval_samples)
        p.evaluated = True
        p.before, p.after = result.accuracy if p.before is None else p.before, result.accuracy
        if result.accuracy > p.best:
            p.best, p.best_step = result.accuracy, p.step
        self._show(bar, result.metrics(self.rewards.weights))
        illustrate(Path(self.config.log_dir))

    def _evaluate(self, phase: str, count: int) -> Evaluation:
        """Greedy answers to so many test problems (0: all), to the log."""
        started = time.perf_counter()
        result = evaluate(
            self.sampler,
            self.tokenizer,
            fixed_subset(self.test_set, count),
            self.grpo.max_completion_tokens,
            self.rewards,
            self.config.system_prompt,
            on_progress=lambda new: self.stop.raise_if_asked(),
        )
        metrics = result.metrics(self.rewards.weights)
        self.run_log.metrics(phase, self.progress.step, metrics | {"seconds": time.perf_counter() - started})
        log.info(
            "step %d: accuracy %.1f%% (95%% interval %.1f to %.1f, %d problems), reward %.3f",
            self.progress.step,
            *(100 * metrics[f"eval/accuracy{end}"] for end in ("", "_low", "_high")),
            metrics["eval/samples"],
            metrics["eval/reward"],
        )
        return result

    def _save_if_due(self) -> None:
        p, c = self.progress, self.config
        names = due_names(p, c.save_every, self.steps_per_epoch, self.total_steps, c.keep_best)
        if names and self.trainer.skips_in_a_row and "final" not in names:
            log.warning("step %d: not saved, since the last loss or gradient was not finite", p.step)
        elif names:
            self._save(names, must="final" in names)

    def _save(self, names: Sequence[str], must: bool = False) -> None:
        """Save a checkpoint. When it fails the run says so and goes on, unless it must not fail."""
        try:
            self.saver.save(names, self.progress, self._write)
        except UserError as error:
            if must:
                raise
            log.warning("%s The run goes on and tries again at the next save.", error)

    def _write(self, path: Path) -> None:
        state = self._state()
        samples = len(fixed_subset(self.test_set, self.config.eval_samples))
        card = model_card(state["settings"], self.progress, samples, self.versions, self.config.system_prompt)
        save_checkpoint(path, self.model, self.tokenizer, self.trainer.optimizer.state_tensors(), state, card)

    def stop_here(self) -> None:
        """Save what there is after a request to stop."""
        p = self.progress
        if p != self.saver.saved:
            self._save([step_name(p)], must=True)
        if p.phase == "grpo" and p.step:
            illustrate(Path(self.config.log_dir))
        log.info("stopped at %s step %d; go on with the same command and --resume", p.phase, p.step)

    def _state(self) -> dict[str, Any]:
        return {
            "run": self.id,
            "progress": asdict(self.progress),
            "settings": asdict(self.config) | asdict(self.grpo),
            "identity": self.identity,
            "reference": self.reference,
            **{name: getattr(self.trainer, name) for name in LEARNER_STATE},
            "log_positions": self.run_log.positions(),
            "saved_at": time.time(),
        }

    def resume(self, path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint holds."""
        try:
            changed = check_same_run(path, state, self._state(), self.config.allow_changes)
            progress = Progress(**state["progress"])
            if progress.phase == "grpo":
                self._resume_grpo(path, state["reference"], progress.step)
            for name in LEARNER_STATE:
                setattr(self.trainer, name, state[name])
            self.trainer.optimizer.load_state_tensors(tensors)
            self.id = state["run"]
            if state["settings"]["token_budget"] != self.grpo.token_budget:  # named anew: not what a full memory left
                self.trainer.token_budget = self.grpo.token_budget
        except (KeyError, TypeError, RuntimeError) as error:  # an entry or a weight is missing, or has another shape
            raise UserError(
                f"'{path}' does not fit this program and model ({' '.join(str(error).split())}): resume it with the "
                "version, the --model and the --lora_rank that wrote it."
            ) from error
        self.progress = progress
        self.saver.took(path, progress)
        note = f" with changed settings: {'; '.join(changed)}" if changed else ""
        log.info("resuming from %s: %s step %d%s", path, progress.phase, progress.step, note)

    def _resume_grpo(self, path: Path, reference: str | None, step: int) -> None:
        """Start GRPO with the reference that the run had; the weights themselves are loaded afterwards."""
        if step > self.total_steps:
            raise UserError(
                f"'{path}' is at step {step}, but this run ends at step {self.total_steps}: raise --max_steps."
            )
        if step == 0 and self.config.cold_start_steps and not reference:
            reference = tensors_digest(path)
        if reference and self.grpo.kl_coef:
            self.trainer.optimizer.load_state_tensors(load_reference(path, reference, self.saver.folder))
        self._start_grpo()
        self.reference = reference

    def _bar(self, name: str, total: int) -> tqdm:
        layout = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
        start = self.progress.step
        return tqdm(total=total, initial=start, desc=name, disable=None, dynamic_ncols=True, bar_format=layout)

    def _show(self, bar: tqdm, metrics: Mapping[str, float]) -> None:
        """The latest reward, accuracy and speed beside the bar."""
        self.shown.update(metrics)
        texts = {"reward": "reward {:.2f}", "eval/accuracy": "accuracy {:.1%}", "tokens_per_second": "{:,.0f} tok/s"}
        known = [text.format(self.shown[name]) for name, text in texts.items() if name in self.shown]
        bar.set_postfix_str(", ".join(known), refresh=False)

    def _log_step(self, metrics: dict[str, float]) -> None:
        self.run_log.metrics(self.progress.phase, self.progress.step, metrics)
        values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        log.debug("%s step %d: %s", self.progress.phase, self.progress.step, values)

    def _log_samples(self, examples: Sequence[Example], rollout: Rollout) -> None:
        """One problem's whole group to samples.jsonl, its first completion to the log."""
        step, every = self.progress.step, self.config.sample_every
        if not every or step % every:
            return
        rows = rollout.describe(self.trainer.weigh(rollout), self.rewards.names)
        self.run_log.samples(step, rows)

    def summary(self) -> str:
        """What the run has come to, and what to do next."""
        final, logs = Path(self.config.checkpoint_dir) / "final", Path(self.config.log_dir)
        return (
            f"{results(logs)}\n  checkpoint  {final}\n  report      {logs / 'report.html'} (curves, completions)\n"
            f"  next        python test.py --checkpoint {shlex.quote(str(final))}"
        )


def run(config: TrainConfig, grpo: GRPOConfig, stop: StopRequest) -> None:
    """Load, train, report."""
    remove_debris(Path(config.checkpoint_dir))
    path, tensors, state = open_resume(config.resume, Path(config.checkpoint_dir))
    if path:  # the run's own type, whatever this machine would choose; older checkpoints say it in their model alone
        own = state["settings"].setdefault("dtype", saved_dtype(path))
        config.dtype = own if config.dtype == "auto" else config.dtype
    with closing(RunLog(Path(config.log_dir), path is not None, config.tensorboard)) as run_log:
        settings = asdict(config) | asdict(grpo)
        log.debug("settings: %s", json.dumps(settings))  # long, and in settings.json: for the file only
        training = Run(config, grpo, run_log, stop)
        about = training.versions | training.identity
        log.info("device: %s", about["device"])
        log.debug("run: %s", json.dumps(about))
        if path:
            training.resume(path, tensors, state)
            run_log.go_on(state["log_positions"])
        else:
            training.saver.warn_of_others()
        run_log.settings(settings | {"dtype": config.dtype})
        try:
            training.train()
        except Stopped:
            training.stop_here()
        except RewardError as error:
            training.stop_here()
            done = f"{training.progress.phase} step {training.progress.step}"
            raise UserError(f"After {done}: {error} Mend it and --resume with --allow_changes true.") from error
        else:
            log.info("done\n%s", training.summary())


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say; returns the exit status."""
    try:
        config, grpo = parse_flags((TrainConfig, GRPOConfig), argv, PRESETS)
        with exclusive(Path(config.checkpoint_dir), Path(config.log_dir)), stop_request() as stop:
            with memory_errors():
                run(config, grpo, stop)
            return 128 + stop.signum if stop.signum else 0
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train.py: stopped at once; --resume goes on from the last checkpoint.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
