"""Tiny models with peaked distributions, and the plain ways to sample and to score that the fast ones must equal.

The plain ways run the whole text again for every row and token: no cache, no padding, no batch.
"""

import importlib.util
import json
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from src.data import SYSTEM_PROMPT
from src.engine.kv_cache import left_pad
from src.engine.logprobs import Batch
from src.rewards import REWARD_FUNCTIONS
from src.run.state import Progress, State

VOCABULARY = 97
LONG = 300_000  # characters of a text by which linear work is told from quadratic
BORDER = 1e-6  # of a cumulative probability; of logits, a hundred times as much
WINDOW = 6  # of the sliding layers
ARCHITECTURES = {
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": WINDOW},
    "phi": {},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": False,  # tied, it repeats the last token for ever
    },
}


def tiny_model(kind: str = "llama", seed: int = 0, **settings) -> PreTrainedModel:
    """Two layers of width 32 in fp32; weights and biases so large that the next token is anything but uniform."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    config = AutoConfig.for_model(kind, **{**sizes, **ARCHITECTURES[kind], **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(0, 0.3, generator=random)
    return model


def random_texts(lengths: Iterable[int], seed: int, low: int = 3, high: int = VOCABULARY) -> list[list[int]]:
    """Token lists of these lengths."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(low, high, (length,), generator=random).tolist() for length in lengths]


def make_batch(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int = 0) -> Batch:
    """Pad prompts on the left and completions on the right; each prompt has as many completions as any other."""
    prompt_ids, prompt_mask = left_pad(prompts, pad_id, "cpu")
    reversed_ids, reversed_mask = left_pad([row[::-1] for row in completions], pad_id, "cpu")
    return Batch(prompt_ids, prompt_mask, reversed_ids.flip(1), reversed_mask.flip(1))


def plain_logps(model: nn.Module, prompt: Sequence[int], completion: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Log-probabilities (c,) of one completion, from one pass over prompt and completion."""
    ids = torch.tensor([[*prompt, *completion]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]  # (c, V)
    logps = (logits.float() / temperature).log_softmax(-1)
    return torch.stack([logps[i, token] for i, token in enumerate(completion)])


def plain_sample(
    model: nn.Module, prompt: Sequence[int], uniforms: Sequence[float], temperature: float, end_ids: Sequence[int]
) -> list[int]:
    """One completion, one token a uniform number, until an end token: the first token whose cdf lies above it.

    No draw may lie so near the border of two tokens that rounding, which differs from processor to processor, decides.
    """
    completion: list[int] = []
    for uniform in uniforms:
        ids = torch.tensor([[*prompt, *completion]], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, -1].double().cpu()
        if temperature == 0:
            token, (best, second) = int(logits.argmax()), logits.topk(2).values
            margin = float(best - second) / 100
        else:
            cdf = (logits / temperature).softmax(-1).cumsum(-1)
            token, margin = int((cdf <= float(uniform)).sum()), float((cdf - float(uniform)).abs().min())
        assert margin > BORDER, f"token {len(completion)}: take other draws"
        completion.append(token)
        if token in end_ids:
            break
    return completion


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter's gradient."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """The same names, and each tensor equal up to `tolerance` of its largest number."""
    assert actual.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        error = float((actual[name] - tensor).abs().max())
        assert error <= tolerance * float(tensor.abs().max()), f"{name} is off by {error}"


SPECIALS = ["<pad>", "<start>", "<end>", "<unk>"]
TEXT = "<reasoning></reasoning><output></output><answer></answer>Tom He has finds apples How many now ? . + ="


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words, tags and numbers below 40 as tokens, the whole system prompt as one; a template that shows it."""
    splitter = pre_tokenizers.Split(Regex(r"</?\w+>|\w+|\W"), behavior="isolated")
    pieces = {piece for piece, _ in splitter.pre_tokenize_str(TEXT)}
    tokens = [*SPECIALS, *sorted(pieces), *map(str, range(40))]
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = splitter, decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": ["<start>"]})
    fast.add_tokens([SYSTEM_PROMPT])
    fast.chat_template = "{% for m in messages %}<start>{{ m['content'] }}<end>{% endfor %}<start>"
    return fast


def state(**entries: Any) -> State:
    """What a checkpoint says of itself, by default of a run that has done nothing."""
    counts = {"skipped_steps": 0, "skips_in_a_row": 0, "token_budget": 1, "saved_at": 1.0, "saves": 0, "processes": 1}
    return State(
        **{"run": "a", "progress": Progress(), "settings": {}, "identity": {}, "reference": None, "log_lines": {}}
        | counts
        | entries
    )


def score(completions: Sequence[str], answers: Sequence[str]) -> list[list[float]]:
    """Every built-in reward of every completion, (B, 4)."""
    pairs = zip(completions, answers, strict=True)
    return [[reward(completion, answer) for reward in REWARD_FUNCTIONS] for completion, answer in pairs]


def write_sums(folder: Path) -> None:
    """A small data set, other numbers in each split: train.jsonl and test.jsonl of 9 problems."""
    folder.mkdir()
    for split, first in (("train", 1), ("test", 21)):
        rows = [{"question": f"{i} + 1?", "answer": f"{i}+1 = {i + 1} #### {i + 1}"} for i in range(first, first + 9)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def change(file: Path, **entries: object) -> None:
    """Set entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | entries), encoding="utf-8")


@contextmanager
def no_hang(seconds: float = 30, timer: int = signal.ITIMER_VIRTUAL) -> Iterator[None]:
    """Fail what is nowhere near its end after so much processor time of this process (or time, with ITIMER_REAL).

    For work on texts of `LONG` characters: linear work takes at most about a second, so no machine and no load makes
    it fail; work that looks at every pair of characters takes minutes.
    """

    def stop(signum: int, frame: object) -> None:
        raise AssertionError(f"not done after {seconds} s")

    signum = signal.SIGVTALRM if timer == signal.ITIMER_VIRTUAL else signal.SIGALRM
    before = signal.signal(signum, stop)
    signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        signal.setitimer(timer, 0)
        signal.signal(signum, before)


def load_script(name: str) -> ModuleType:
    """A script as a module; `import test` would find the standard library's."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", Path(__file__).parents[1] / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
