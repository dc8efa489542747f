"""What the benchmarks share: models, memory, timing and tables."""

import json
import platform
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from src.engine.models import choose_dtype, load_model, pad_token_id
from src.engine.sampling import Sampler
from src.tiny import embedded_models

# Random weights in these shapes are as fast or slow as trained ones; tied embeddings, as in Qwen2.5.
SHAPES = {
    "small": dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    | dict(intermediate_size=512, vocab_size=0),
    "qwen2.5-0.5b": dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2)
    | dict(intermediate_size=4864, vocab_size=151936),
    "qwen2.5-1.5b": dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2)
    | dict(intermediate_size=8960, vocab_size=151936),
}
CPU_TIME = (
    "count this process's CPU seconds, in one thread, instead of the clock's: for a machine that does other work too"
)
NO_END: list[int] = []  # end tokens of a sampler whose completions all reach their full length


def model_folder(model: str, shape: str, device: torch.device) -> str:
    """A folder with the model to measure: `model` itself, or random weights of `shape` with its tokenizer."""
    if shape == "pretrained" and model != "tiny":
        return model
    pretrained, tokenizer = load_model(model, torch.device("cpu"), embedded=embedded_models(0))
    folder = tempfile.mkdtemp(prefix="benchmark_")
    if shape != "pretrained":
        sizes = dict(SHAPES[shape])
        sizes["vocab_size"] = sizes["vocab_size"] or len(tokenizer)
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": pad_token_id(tokenizer), "bos_token_id": None}
        config = Qwen2Config(**sizes, **ends, tie_word_embeddings=True, max_position_embeddings=4096)
        torch.manual_seed(0)
        with torch.device(device):
            pretrained = Qwen2ForCausalLM(config)
        pretrained = pretrained.to(choose_dtype("auto", device, pretrained.num_parameters()))
    pretrained.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def endless_sampler(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: int) -> Sampler:
    """A sampler whose completions never end early, so that all have equal lengths."""
    return Sampler(model, NO_END, pad_token_id(tokenizer), rows)


def count_cpu_time() -> None:
    """From here on every timer of this process counts CPU seconds, which others' work hardly changes."""
    torch.set_num_threads(1)
    time.perf_counter = time.process_time


def synchronize(device: torch.device) -> None:
    """Wait until the GPU has done what it was asked; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device: torch.device) -> dict[str, Any]:
    """Machine and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": f"{device.type} ({name}, {torch.get_num_threads()} threads)", **versions}


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def finish(name: str, result: dict[str, Any]) -> None:
    """The last line: everything, for programs."""
    print(json.dumps({"benchmark": name, **result}), flush=True)
