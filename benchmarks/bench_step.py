"""Time of one GRPO step, ours and TRL's in turns, on the same model, problems and completion lengths.

    python benchmarks/bench_step.py --model DIR --dataset PATH --prompts 4 --group_size 8 --tokens 64

Every step has other problems and another length, the same in both: all completions are made to reach it, between half
of `--tokens` and all of it. TRL runs as it comes and tuned: without gradient checkpointing, with the `grpo` loss;
"compiled" is that with `torch_compile`, "bf16" with `bf16=True`. `--apart` takes each in a process of its own, for
models that do not fit into memory twice, and measures its peak on a CPU. `--growth` leaves TRL out and shows how our
step grows with prompts, group size and length.
"""

import argparse
import multiprocessing
import os
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
TUNED |= {f"{name}, bf16": TUNED[name] | {"bf16": True} for name in ("tuned", "compiled")}


def length_of(step: int, longest: int) -> int:
    """How long the completions of a step are."""
    return random.Random(step).randint((longest + 1) // 2, longest)


class OurStep:
    """Our trainer; each call takes a step, on the next problems."""

    def __init__(self, folder: str, device: torch.device, examples: list[Example], args: argparse.Namespace):
        self.device, self.examples, self.args, self.count = device, examples, args, 0
        model, tokenizer = load_model(folder, device, args.dtype)
        config = GRPOConfig(prompts_per_step=args.prompts, group_size=args.group_size, kl_coef=args.kl_coef)
        sampler = endless_sampler(model, tokenizer, args.prompts * args.group_size)
        self.trainer = GRPOTrainer(model, tokenizer, sampler, config)

    def __call__(self) -> dict[str, float]:
        length, first = length_of(self.count, self.args.tokens), self.count * self.args.prompts
        self.trainer.config = replace(self.trainer.config, max_completion_tokens=length)
        synchronize(self.device)
        start = time.perf_counter()
        metrics, rollout = self.trainer.step(self.count, self.examples[first : first + self.args.prompts])
        synchronize(self.device)
        assert bool(rollout.batch.completion_mask.all()), "a completion ended early"
        self.count += 1
        return metrics | {"seconds": time.perf_counter() - start}


def batch_reward(function: Callable[[str, str], float]) -> Callable[..., list[float]]:
    """One of our rewards in the form TRL takes."""

    def reward(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float]:
        return [function(c[0]["content"], a) for c, a in zip(completions, answer, strict=True)]

    reward.__name__ = function.__name__
    return reward


class Turns(TrainerCallback):
    """Takes one step of ours, if there is one, before each of TRL's, and times both; the first of each is a warm-up."""

    def __init__(self, ours: OurStep | None, device: torch.device):
        self.ours, self.device = ours, device
        self.pairs: list[tuple[dict[str, float], dict[str, float]]] = []
        self.generating = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.our_step = self.ours() if self.ours else {}
        self.generating, self.start = 0.0, time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        self.pairs.append((self.our_step, {"seconds": time.perf_counter() - self.start, "sampling": self.generating}))


def run_trl(
    folder: str,
    device: torch.device,
    examples: list[Example],
    args: argparse.Namespace,
    settings: dict[str, Any],
    ours: OurStep | None = None,
) -> Turns:
    """`args.steps` steps of TRL's trainer, each after one of ours."""
    import trl
    from datasets import Dataset

    turns, rows = Turns(ours, device), args.prompts * args.group_size
    model, tokenizer = load_model(folder, device, "fp32" if device.type == "cpu" else "auto")
    config = trl.GRPOConfig(
        output_dir=f"{folder}/trl",
        per_device_train_batch_size=args.micro_batch or rows,
        gradient_accumulation_steps=rows // (args.micro_batch or rows),
        num_generations=args.group_size,
        max_completion_length=args.tokens,
        beta=args.kl_coef,
        reward_weights=list(DEFAULT_WEIGHTS),
        max_steps=args.steps + 1,
        shuffle_dataset=False,
        save_strategy="no",
        logging_strategy="no",
        use_cpu=device.type == "cpu",
        **{"bf16": device.type == "cuda", "report_to": "none", "disable_tqdm": True} | settings,
    )
    data = [{"prompt": chat_messages(e.question), "answer": e.answer} for e in examples]
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
        start, length = time.perf_counter(), length_of(len(turns.pairs), args.tokens)
        trainer.generation_config.max_new_tokens = trainer.generation_config.min_new_tokens = length
        result = generate(*given, **named)
        assert all(len(ids) == length for ids in result[0]), "a completion ended early"
        turns.generating += time.perf_counter() - start
        return result

    trainer._generate_single_turn = timed_generate
    trainer.train()
    turns.pairs = turns.pairs[1:]
    return turns


def middle(rows: list[dict[str, float]], key: str) -> float:
    """The median of one column."""
    return statistics.median(row[key] for row in rows)


def our_row(name: str, rows: list[dict[str, float]]) -> list[Any]:
    """One line of the table: time and its parts, decode time a token of the longest completion, tokens a second."""
    parts = [f"{middle(rows, f'seconds/{part}'):.3f}" for part in PARTS]
    sampling = statistics.median(row["seconds/sampling"] / row["completion_tokens"] for row in rows)
    return [
        name,
        f"{middle(rows, 'seconds'):.3f}",
        *parts,
        f"{1000 * sampling:.2f}",
        f"{middle(rows, 'tokens_per_second'):.0f}",
    ]


def compare(folder: str, device: torch.device, examples: list[Example], args: argparse.Namespace) -> dict[str, Any]:
    """Ours against TRL in each of its settings; prints the table, returns the figures."""
    header = ["", "step, s", *(f"{part}, s" for part in PARTS), "decode, ms a token", "tokens/s"]
    rows, figures = [], {}
    for name in args.trl:
        turns = run_trl(folder, device, examples, args, TUNED[name], OurStep(folder, device, examples, args))
        ours, theirs = map(list, zip(*turns.pairs, strict=True))
        ratios = [b["seconds"] / a["seconds"] for a, b in turns.pairs]
        seconds, sampling = middle(theirs, "seconds"), middle(theirs, "sampling")
        rows.append(our_row(f"ours (beside TRL {name})", ours))
        rest = ["", "", f"{seconds - sampling:.3f} (with all but sampling)", "", "", "", ""]
        rows.append([f"TRL, {name}", f"{seconds:.3f}", f"{sampling:.3f}", *rest])
        figures[name] = {
            "ours_s": middle(ours, "seconds"),
            "trl_s": seconds,
            "ratio": statistics.median(ratios),
            "ratios": [round(ratio, 2) for ratio in ratios],
            "sampling_ratio": sampling / middle(ours, "seconds/sampling"),
        }
    print(table(header, rows))
    for name, figure in figures.items():
        print(f"\nTRL {name}: {figure['ratio']:.2f} times our time a step (each pair: {figure['ratios']})")
    return figures


def in_child(run: Callable[[], Any]) -> tuple[Any, float]:
    """What `run` returns in a process of its own, and that one's peak memory in GB.

    This process must not have computed anything before: a forked one cannot use its threads.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    if not (child := os.fork()):
        status = 1
        try:
            sender.send(run())
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status, usage = os.wait4(child, 0)
    assert status == 0, "it failed"
    return receiver.recv(), usage.ru_maxrss * 1024 / 1e9


def apart(folder: str, device: torch.device, examples: list[Example], args: argparse.Namespace) -> dict[str, Any]:
    """Ours, TRL in each of its settings, and ours again, each in a process of its own: seconds and peak memory."""

    def ours() -> list[float]:
        step = OurStep(folder, device, examples, args)
        return [step()["seconds"] for _ in range(args.steps + 1)][1:]

    def theirs(name: str) -> list[float]:
        return [pair[1]["seconds"] for pair in run_trl(folder, device, examples, args, TUNED[name]).pairs]

    work = {"ours": ours} | {f"TRL, {name}": partial(theirs, name) for name in args.trl} | {"ours again": ours}
    rows, figures = [], {}
    for name, run in work.items():
        seconds, peak = in_child(run)
        figures[name] = {"seconds": seconds, "peak_gb": peak}
    fastest = statistics.mean(figures["ours"]["seconds"] + figures["ours again"]["seconds"])
    for name, figure in figures.items():
        seconds = statistics.mean(figure["seconds"])
        each = ", ".join(f"{second:.1f}" for second in figure["seconds"])
        rows.append([name, f"{seconds:.1f} ({each})", f"{seconds / fastest:.2f}", f"{figure['peak_gb']:.1f}"])
    print(table(["", "step, s (mean, and each)", "times ours", "peak, GB"], rows))
    return figures


def growth(folder: str, device: torch.device, examples: list[Example], args: argparse.Namespace) -> dict[str, Any]:
    """Our step with one of prompts, group size and length doubled and doubled again."""
    rows, figures = [], {}
    for name in ("prompts", "group_size", "tokens"):
        for factor in (1, 2, 4):
            sizes = argparse.Namespace(**vars(args) | {name: getattr(args, name) * factor})
            step = OurStep(folder, device, examples, sizes)
            step()
            steps = [step() for _ in range(args.steps)]
            label = f"{sizes.prompts} x {sizes.group_size} x {sizes.tokens}"
            rows.append(our_row(label, steps))
            figures[label] = {"seconds": middle(steps, "seconds")}
    header = ["prompts x group x tokens", "step, s", *(f"{part}, s" for part in PARTS)]
    print(table([*header, "decode, ms a token", "tokens/s"], rows))
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
    parser.add_argument("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of ours")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--apart", action="store_true")
    parser.add_argument("--micro_batch", type=int, help="completions that TRL learns from at a time; all when left out")
    parser.add_argument("--device")
    parser.add_argument("--cpu_time", action="store_true", help=CPU_TIME)
    args = parser.parse_args()
    if args.cpu_time:
        count_cpu_time()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    device = Processes().choose_device(args.device)
    examples = load_examples(args.dataset, "train")[0][: args.prompts * (args.steps + 1) * (4 if args.growth else 1)]
    make = partial(model_folder, args.model, args.shape, device)
    folder = in_child(make)[0] if args.apart else make()
    measure = growth if args.growth else apart if args.apart else compare
    figures = measure(folder, device, examples, args)
    finish(
        "step",
        {**vars(args), "model": Path(args.model).name, "dataset": Path(args.dataset).name}
        | describe(device)
        | {"figures": figures},
    )


if __name__ == "__main__":
    main()
