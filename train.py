"""Fine-tune a small chat model for math reasoning with GRPO: `python train.py --help`.

In order: settings, data, model, cold start (if asked for), GRPO with validation and checkpoints, the last checkpoint.
"""

import copy
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from src.checkpoint import exclusive, load_state, remove_debris, save_checkpoint
from src.cold_start import supervised_gradients, target_batch
from src.config import PRESETS, TrainConfig, changed_settings
from src.contamination import report_overlap
from src.data import Example, drop_long_prompts, fingerprint_examples, load_examples
from src.errors import UserError
from src.evaluation import evaluate
from src.grpo import GRPOConfig, GRPOTrainer, Rollout
from src.models import choose_device, end_token_ids, fingerprint_model, load_model, pad_token_id
from src.optim import MasterAdamW
from src.report import draw_curves, read_run
from src.reward_set import RewardError, choose_rewards
from src.sampling import Sampler
from src.saving import Progress, find_resume, step_name
from src.seeding import batch_indices
from src.settings import parse_flags
from src.stopping import Stopped, StopRequest, stop_request
from src.tracking import LOSS_NOTE, RunLog, describe_run, printable

log = logging.getLogger("src.train")


class Run:
    """One training run, from its settings to its last checkpoint."""

    def __init__(self, config: TrainConfig, grpo: GRPOConfig, run_log: RunLog, stop: StopRequest):
        self.config, self.grpo, self.run_log, self.stop = config, grpo, run_log, stop
        self.rewards = choose_rewards(grpo.rewards, grpo.reward_weights)
        self.device = choose_device(config.device)
        self.model, self.tokenizer = load_model(config.model, self.device, config.seed)
        self.train_set, self.test_set = (self._load_split(split) for split in ("train", "test"))
        self.targets = [example for example in self.train_set if example.reasoning]
        self._check_data()
        self.rewards.try_out(self.train_set)
        self.identity = {"model": fingerprint_model(self.model), "data": fingerprint_examples(self.train_set)}
        self.identity["rewards"] = self.rewards.fingerprint
        rows = max(64, grpo.prompts_per_step * grpo.group_size)
        end_ids = end_token_ids(self.model, self.tokenizer)
        self.sampler = Sampler(self.model, end_ids, pad_token_id(self.tokenizer), rows)
        self.optimizer = MasterAdamW(self.model)
        self.trainer: GRPOTrainer | None = None
        self.progress = Progress()
        self.saved: Progress | None = None

    def _load_split(self, split: str) -> list[Example]:
        c = self.config
        columns = (c.question_column, c.answer_column, c.answer_pattern)
        examples, dropped = load_examples(c.dataset, split, c.seed, *columns)
        kept, too_long = drop_long_prompts(examples, self.tokenizer, self.grpo.max_prompt_tokens, c.system_prompt)
        if too_long:
            dropped[f"prompt over {self.grpo.max_prompt_tokens} tokens"] = too_long
        reasons = "".join(f"; dropped {count}: {reason}" for reason, count in sorted(dropped.items()))
        log.info("data: %d %s problems from %s%s", len(kept), split, c.dataset, reasons)
        if not kept:
            raise UserError(
                f"No {split} problem fits into --max_prompt_tokens {self.grpo.max_prompt_tokens}: raise it."
            )
        return kept

    def _check_data(self) -> None:
        sizes = {"prompts_per_step": (self.grpo.prompts_per_step, self.train_set)}
        if without := len(self.train_set) - len(self.targets):
            log.info("data: %d training problems have no reasoning, so no target for a cold start", without)
        if self.config.cold_start_steps:
            sizes["cold_start_batch_size"] = (self.config.cold_start_batch_size, self.targets)
            if not self.targets:
                raise UserError("--cold_start_steps needs answers with reasoning, and the data has none: leave it out.")
        for name, (size, problems) in sizes.items():
            if size > len(problems):
                raise UserError(f"--{name} is {size}, but there are {len(problems)} training problems: lower it.")
        report_overlap(self.train_set, self.test_set)

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
                loss = supervised_gradients(self.model, batch, self.grpo.token_budget)
                norm = self.optimizer.step(c.cold_start_learning_rate, self.grpo.max_grad_norm)
                self.progress.step += 1
                self._log_step({"loss": loss, "grad_norm": norm, "lr": c.cold_start_learning_rate})
                bar.set_postfix(loss=f"{loss:.3f}")
                bar.update()
                self._save_if_due()
                self.stop.raise_if_asked()
        self._start_grpo()
        if c.cold_start_steps:  # with a KL term this is the reference, which a resumed run needs
            self._save("cold_start", must=self.grpo.kl_coef > 0)

    def _start_grpo(self) -> None:
        """The model as it is now becomes the reference; the optimizer starts anew."""
        self.optimizer.close()
        parts = (self.model, self.tokenizer, self.sampler, self.grpo)
        self.trainer = GRPOTrainer(*parts, self.config.seed, self.rewards, self.config.system_prompt)
        self.optimizer = self.trainer.optimizer
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
                metrics, rollout = self.trainer.step(step, examples)
                self.progress.step, self.progress.evaluated = step + 1, False
                self._log_step(metrics)
                self._log_samples(examples, rollout)
                bar.set_postfix(self._postfix(metrics))
                bar.update()

    def _validate_if_due(self, bar: tqdm) -> None:
        p, every = self.progress, self.config.eval_every
        due = p.step in (0, self.total_steps) or p.step % self.steps_per_epoch == 0 or (every and p.step % every == 0)
        if p.evaluated or not due:
            return
        started = time.perf_counter()
        subset = self.test_set[: self.config.eval_samples or None]
        result = evaluate(
            self.sampler,
            self.tokenizer,
            subset,
            self.grpo.max_completion_tokens,
            self.rewards,
            self.config.system_prompt,
            on_progress=lambda done: self.stop.raise_if_asked(),
        )
        p.evaluated = True
        p.before, p.after = result.accuracy if p.before is None else p.before, result.accuracy
        if result.accuracy > p.best:
            p.best, p.best_step = result.accuracy, p.step
        metrics = result.metrics(self.rewards.weights)
        self.run_log.metrics("eval", p.step, metrics | {"seconds": time.perf_counter() - started})
        log.info(
            "step %d: accuracy %.1f%% (95%% interval %.1f to %.1f, %d problems), reward %.3f",
            p.step,
            *(100 * metrics[f"eval/accuracy{end}"] for end in ("", "_low", "_high")),
            len(subset),
            metrics["eval/reward"],
        )
        bar.set_postfix(self._postfix({}))
        self._draw()

    def _draw(self) -> None:
        """logs/curves.png, so far."""
        folder = Path(self.config.log_dir)
        try:
            draw_curves([read_run(folder)], folder / "curves.png")
        except UserError as error:
            log.warning("%s The run goes on.", error)

    def _save_if_due(self) -> None:
        p, every = self.progress, self.config.save_every
        if p.step == 0 or p == self.saved:
            return
        in_grpo = p.phase == "grpo"
        if every and p.step % every == 0:
            self._save(step_name(p))
        if in_grpo and p.step % self.steps_per_epoch == 0:
            self._save(f"epoch_{p.step // self.steps_per_epoch}")
        if in_grpo and p.step == self.total_steps:
            self._save("final", must=True)

    def _save(self, name: str, must: bool = False) -> None:
        """Save a checkpoint. When it fails the run says so and goes on, unless it must not fail."""
        path = Path(self.config.checkpoint_dir) / name
        try:
            save_checkpoint(path, self.model, self.tokenizer, self.optimizer.state_tensors(), self._state())
        except UserError as error:
            if must:
                raise
            log.warning("%s The run goes on and tries again at the next save.", error)
            return
        self.saved = copy.copy(self.progress)
        log.info("step %d: saved %s", self.progress.step, path)

    def stop_here(self) -> None:
        """Save what there is after a request to stop."""
        p = self.progress
        if p.step and p != self.saved:
            self._save(step_name(p), must=True)
        log.info("stopped at %s step %d; go on with the same command and --resume", p.phase, p.step)

    def _state(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "progress": asdict(self.progress),
            "settings": asdict(self.config) | asdict(self.grpo),
            "identity": self.identity,
            "skipped_steps": trainer.skipped_steps if trainer else 0,
            "token_budget": trainer.token_budget if trainer else self.grpo.token_budget,
            "log_positions": self.run_log.positions(),
            "saved_at": time.time(),
        }

    def resume(self, path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint holds."""
        changed = changed_settings(state["settings"], asdict(self.config) | asdict(self.grpo))
        changed += [f"{k} (its content)" for k, v in state["identity"].items() if v != self.identity[k]]
        if changed and not self.config.allow_changes:
            raise UserError(
                f"The run in '{path}' had other settings: {'; '.join(changed)}. Resume it with the same ones, or pass "
                "--allow_changes true to go on with the new ones."
            )
        progress = Progress(**state["progress"])
        if progress.phase == "grpo":
            if self.config.cold_start_steps and self.grpo.kl_coef and progress.step:
                reference, _ = load_state(path.parent / "cold_start")
                self.optimizer.load_state_tensors(reference)
            self._start_grpo()
            self.trainer.skipped_steps = state["skipped_steps"]
            self.trainer.token_budget = state["token_budget"]
        self.optimizer.load_state_tensors(tensors)
        self.progress, self.saved = progress, copy.copy(progress)
        note = f" with changed settings: {'; '.join(changed)}" if changed else ""
        log.info("resuming from %s: %s step %d%s", path, progress.phase, progress.step, note)

    def _bar(self, name: str, total: int) -> tqdm:
        return tqdm(total=total, initial=self.progress.step, desc=name, unit="step", disable=None, dynamic_ncols=True)

    def _postfix(self, metrics: Mapping[str, float]) -> dict[str, str]:
        self.shown = {**getattr(self, "shown", {}), **metrics}
        names = {"reward": "reward", "eval/accuracy": "accuracy", "tokens_per_second": "tok/s"}
        return {label: f"{self.shown[key]:.3g}" for key, label in names.items() if key in self.shown}

    def _log_step(self, metrics: dict[str, float]) -> None:
        self.run_log.metrics(self.progress.phase, self.progress.step, metrics)
        values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        log.debug("%s step %d: %s", self.progress.phase, self.progress.step, values)

    def _log_samples(self, examples: Sequence[Example], rollout: Rollout) -> None:
        """One problem's whole group to samples.jsonl, its first completion to the log."""
        step, every = self.progress.step, self.config.sample_every
        if not every or step % every:
            return
        rows = rollout.describe(examples[0].question, examples[0].answer, self.rewards)
        self.run_log.samples([{"step": step, **row} for row in rows])
        first = rows[0]
        log.debug(
            "sample of step %d, reward %.2f %s\n  question: %s\n  truth: %s\n  completion: %s",
            step,
            first["reward"],
            first["rewards"],
            *(printable(first[key]) for key in ("question", "answer", "completion")),
        )

    def summary(self) -> str:
        """What the run has come to, and what to do next."""
        p, final = self.progress, Path(self.config.checkpoint_dir) / "final"
        return (
            f"accuracy before GRPO {100 * p.before:.1f}%, after {100 * p.after:.1f}%, "
            f"best {100 * p.best:.1f}% at step {p.best_step}\n"
            f"checkpoint: {final}\ncurves: {Path(self.config.log_dir) / 'curves.png'}\n"
            f"next: python test.py --checkpoint {final}"
        )


def run(config: TrainConfig, grpo: GRPOConfig, stop: StopRequest) -> None:
    """Load, train, report."""
    remove_debris(Path(config.checkpoint_dir))
    path = find_resume(config.resume, Path(config.checkpoint_dir))
    tensors, state = load_state(path) if path else ({}, {})
    with closing(RunLog(Path(config.log_dir), state.get("log_positions"))) as run_log:
        settings = asdict(config) | asdict(grpo)
        run_log.settings(settings)
        log.info("settings: %s", json.dumps(settings))
        training = Run(config, grpo, run_log, stop)
        log.info("run: %s", json.dumps(describe_run(training.device) | training.identity))
        if path:
            training.resume(path, tensors, state)
        try:
            training.train()
        except Stopped:
            training.stop_here()
        except RewardError as error:
            training.stop_here()
            done = f"{training.progress.phase} step {training.progress.step}"
            raise UserError(f"After {done}: {error} Mend it and --resume with --allow_changes true.") from error
        else:
            log.info("done: %s", training.summary())


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say; returns the exit status."""
    try:
        config, grpo = parse_flags((TrainConfig, GRPOConfig), argv, PRESETS)
        with exclusive(Path(config.checkpoint_dir), Path(config.log_dir)), stop_request() as stop:
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
