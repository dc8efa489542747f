"""Time of one GRPO step, ours and TRL's in turns, on the same model, problems and completion lengths.

    python benchmarks/bench_step.py --model DIR --dataset PATH --prompts 4 --group_size 8 --tokens 64

Completions are made to reach their full length in both. TRL runs as it comes and tuned: without gradient checkpointing,
with the `grpo` loss; "compiled" is that with `torch_compile`. `--growth` leaves TRL out and shows how our step grows
with prompts, group size and length.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import (
    CPU_TIME,
    SHAPES,
    count_cpu_time,
    describe,
    endless_sampler,
    finish,
    model_folder,
    peak_memory,
    synchronize,
    table,
)
from src.data import Example, chat_messages, load_examples
from src.engine.models import load_model
from src.engine.processes import Processes
from src.grpo import PARTS, GRPOConfig, GRPOTrainer
from src.rewards import DEFAULT_WEIGHTS, REWARD_FUNCTIONS

TUNED: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "tuned": {"gradient_checkpointing": False, "loss_type": "grpo", "disable_dropout": True, "report_to": "none"},
}
TUNED["compiled"] = TUNED["tuned"] | {"torch_compile": True}


class OurStep:
    """Our trainer on one batch of problems, taken again and again."""

    def __init__(self, folder: str, device: torch.device, examples: list[Example], args: argparse.Namespace):
        self.device, self.examples, self.count = device, examples, 0
        model, tokenizer = load_model(folder, device)
        config = GRPOConfig(
            prompts_per_step=len(examples),
            group_size=args.group_size,
            max_completion_tokens=args.tokens,
            kl_coef=args.kl_coef,
        )
        sampler = endless_sampler(model, tokenizer, len(examples) * args.group_size)
        self.trainer = GRPOTrainer(model, tokenizer, sampler, config)

    def __call__(self) -> dict[str, float]:
        synchronize(self.device)
        start = time.perf_counter()
        with peak_memory(self.device) as peak:
            metrics, rollout = self.trainer.step(self.count, self.examples)
            synchronize(self.device)
        assert bool(rollout.batch.completion_mask.all()), "a completion ended early"
        self.count += 1
        return metrics | {"seconds": time.perf_counter() - start, "memory": peak[0]}


def batch_reward(function: Callable[[str, str], float]) -> Callable[..., list[float]]:
    """One of our rewards in the form TRL takes."""

    def reward(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float]:
        return [function(c[0]["content"], a) for c, a in zip(completions, answer, strict=True)]

    reward.__name__ = function.__name__
    return reward


class Turns(TrainerCallback):
    """Takes one step of ours before each of TRL's, and times both; the first of each is a warm-up."""

    def __init__(self, ours: OurStep, device: torch.device):
        self.ours, self.device = ours, device
        self.pairs: list[tuple[dict[str, float], dict[str, float]]] = []
        self.generating = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.our_step = self.ours()
        self.generating, self.memory = 0.0, peak_memory(self.device)
        self.peak = self.memory.__enter__()
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        seconds = time.perf_counter() - self.start
        self.memory.__exit__(None, None, None)
        self.pairs.append((self.our_step, {"seconds": seconds, "sampling": self.generating, "memory": self.peak[0]}))


def run_trl(folder: str, ours: OurStep, args: argparse.Namespace, settings: dict[str, Any]) -> Turns:
    """`args.steps` steps of TRL's trainer, each after one of ours."""
    import trl
    from datasets import Dataset

    device, turns = ours.device, Turns(ours, ours.device)
    rows = len(ours.examples) * args.group_size
    model, tokenizer = load_model(folder, device)
    config = trl.GRPOConfig(
        output_dir=f"{folder}/trl",
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        num_generations=args.group_size,
        max_completion_length=args.tokens,
        beta=args.kl_coef,
        reward_weights=list(DEFAULT_WEIGHTS),
        generation_kwargs={"min_new_tokens": args.tokens},
        max_steps=args.steps + 1,
        shuffle_dataset=False,
        save_strategy="no",
        logging_strategy="no",
        use_cpu=device.type == "cpu",
        bf16=device.type == "cuda",
        **{"report_to": "none", "disable_tqdm": True} | settings,
    )
    data = [{"prompt": chat_messages(e.question), "answer": e.answer} for e in ours.examples]
    rewards = [batch_reward(function) for function in REWARD_FUNCTIONS]
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        callbacks=[turns],
    )
    generate = trainer._generate_single_turn

    def timed_generate(*given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        result = generate(*given, **named)
        assert all(len(ids) == args.tokens for ids in result[0]), "a completion ended early"
        turns.generating += time.perf_counter() - start
        return result

    trainer._generate_single_turn = timed_generate
    trainer.train()
    turns.pairs = turns.pairs[1:]
    return turns


def middle(rows: list[dict[str, float]], key: str) -> float:
    """The median of one column."""
    return statistics.median(row[key] for row in rows)


def our_row(name: str, rows: list[dict[str, float]], tokens: int) -> list[Any]:
    """One line of the table: time and its parts, decode time a token, tokens a second, memory."""
    parts = [f"{middle(rows, f'seconds/{part}'):.3f}" for part in PARTS]
    seconds, sampling = middle(rows, "seconds"), middle(rows, "seconds/sampling")
    rate = middle(rows, "tokens_per_second")
    return [
        name,
        f"{seconds:.3f}",
        *parts,
        f"{1000 * sampling / tokens:.2f}",
        f"{rate:.0f}",
        round(middle(rows, "memory")),
    ]


def compare(folder: str, device: torch.device, examples: list[Example], args: argparse.Namespace) -> dict[str, Any]:
    """Ours against TRL in each of its settings; prints the table, returns the figures."""
    header = ["", "step, s", *(f"{part}, s" for part in PARTS), "decode, ms a token", "tokens/s", "peak memory, MiB"]
    rows, figures = [], {}
    for name in args.trl:
        settings = TUNED[name]
        turns = run_trl(folder, OurStep(folder, device, examples, args), args, settings)
        ours, theirs = map(list, zip(*turns.pairs, strict=True))
        ratios = [b["seconds"] / a["seconds"] for a, b in turns.pairs]
        seconds, sampling = middle(theirs, "seconds"), middle(theirs, "sampling")
        tokens = len(examples) * args.group_size * args.tokens
        rows.append(our_row(f"ours (beside TRL {name})", ours, args.tokens))
        rest = ["", "", f"{seconds - sampling:.3f} (with all but sampling)", ""]
        speed = [f"{1000 * sampling / args.tokens:.2f}", f"{tokens / seconds:.0f}", round(middle(theirs, "memory"))]
        rows.append([f"TRL, {name}", f"{seconds:.3f}", f"{sampling:.3f}", *rest, *speed])
        figures[name] = {
            "ours_s": middle(ours, "seconds"),
            "trl_s": seconds,
            "ratio": statistics.median(ratios),
            "ratios": [round(ratio, 2) for ratio in ratios],
            "sampling_ratio": sampling / middle(ours, "seconds/sampling"),
            "memory_ratio": middle(theirs, "memory") / max(1.0, middle(ours, "memory")),
        }
    print(table(header, rows))
    for name, figure in figures.items():
        print(f"\nTRL {name}: {figure['ratio']:.2f} times our time a step (each pair: {figure['ratios']})")
    return figures


def growth(folder: str, device: torch.device, examples: list[Example], args: argparse.Namespace) -> dict[str, Any]:
    """Our step with one of prompts, group size and length doubled and doubled again."""
    rows, figures = [], {}
    for name in ("prompts", "group_size", "tokens"):
        for factor in (1, 2, 4):
            sizes = argparse.Namespace(**vars(args) | {name: getattr(args, name) * factor})
            step = OurStep(folder, device, examples[: sizes.prompts], sizes)
            step()
            steps = [step() for _ in range(args.steps)]
            label = f"{sizes.prompts} x {sizes.group_size} x {sizes.tokens}"
            rows.append(our_row(label, steps, sizes.tokens))
            figures[label] = {"seconds": middle(steps, "seconds"), "memory": middle(steps, "memory")}
    header = ["prompts x group x tokens", "step, s", *(f"{part}, s" for part in PARTS)]
    print(table([*header, "decode, ms a token", "tokens/s", "peak memory, MiB"], rows))
    return figures


def main() -> None:
    """Measure as the flags say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="model folder, Hub id, or tiny")
    parser.add_argument("--shape", default="pretrained", choices=["pretrained", *SHAPES], help="random weights instead")
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--kl_coef", type=float, default=0.04)
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one warm-up")
    trl = {"choices": [*TUNED], "default": ["as it comes", "tuned"], "help": "TRL's settings to run"}
    parser.add_argument("--trl", nargs="+", **trl)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--device")
    parser.add_argument("--cpu_time", action="store_true", help=CPU_TIME)
    args = parser.parse_args()
    if args.cpu_time:
        count_cpu_time()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    device = Processes().choose_device(args.device)
    examples = load_examples(args.dataset, "train")[0][: args.prompts * (4 if args.growth else 1)]
    folder = model_folder(args.model, args.shape, device)
    figures = (growth if args.growth else compare)(folder, device, examples, args)
    finish(
        "step",
        {**vars(args), "model": Path(args.model).name, "dataset": Path(args.dataset).name}
        | describe(device)
        | {"figures": figures},
    )


if __name__ == "__main__":
    main()
