"""Rows of a dataset, from the Hugging Face Hub, a local file or folder, or made on the spot."""

from __future__ import annotations

import glob
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from src.errors import UserError, one_line
from src.hub import hub_problem
from src.problems import synthetic_rows

READERS = {
    ".jsonl": datasets.Dataset.from_json,
    ".json": datasets.Dataset.from_json,
    ".csv": datasets.Dataset.from_csv,
    ".parquet": datasets.Dataset.from_parquet,
}
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def read_rows(dataset: str, split: str, seed: int) -> list[dict[str, Any]]:
    """The rows of one split of a dataset; the arguments are those of `src.data.load_examples`.

    Raises:
        UserError: the dataset cannot be found, reached or read, or lacks the split.
    """
    local_path = os.path.expanduser(dataset)
    is_local = os.path.exists(local_path)
    path = Path(local_path)
    if (is_local or dataset == "synthetic") and split not in ("train", "test"):
        raise UserError(f"'{dataset}' has no split '{split}': choose train or test.")
    if dataset == "synthetic":
        return synthetic_rows(split, seed)
    if is_local and path.is_dir():
        return _read_file(_split_file(path, split))
    if is_local:
        rows = _read_file(path)
        first_test_row = len(rows) - min(1000, max(1, len(rows) // 10))
        return rows[:first_test_row] if split == "train" else rows[first_test_row:]
    if HUB_ID.fullmatch(dataset) and path.suffix.lower() not in READERS:
        return _read_hub(dataset, split)
    raise UserError(f"There is no file or folder '{dataset}': check the path, or name a Hub dataset like openai/gsm8k.")


def _split_file(folder: Path, split: str) -> Path:
    files = [path for path in sorted(folder.glob(f"{split}.*")) if path.suffix.lower() in READERS]
    if len(files) != 1:
        found = " and ".join(path.name for path in files) or "none"
        raise UserError(
            f"'{folder}' should hold one file for the {split} split, but holds {found}: "
            f"put its rows in one of {', '.join(split + suffix for suffix in READERS)}."
        )
    return files[0]


def _read_file(path: Path) -> list[dict[str, Any]]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"Cannot tell the format of '{path}': its name should end in one of {', '.join(READERS)}.")
    # A cache that lives as long as the call: nothing stale is ever served, and nothing is left behind.
    with tempfile.TemporaryDirectory() as cache, _quiet_datasets():
        try:
            return reader(glob.escape(str(path)), cache_dir=cache, keep_in_memory=True).to_list()
        except Exception as error:  # whatever pandas, pyarrow or the standard library thinks of a damaged file
            raise UserError(
                f"Cannot read rows from '{path}' ({one_line(error.__cause__ or error)}): "
                "check that the file is not empty or damaged, and that its text is UTF-8."
            ) from error


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    had_bars, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()


def _read_hub(dataset: str, split: str) -> list[dict[str, Any]]:
    config = "main" if dataset == "openai/gsm8k" else None
    problem = hub_problem()
    was_offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = was_offline or problem is not None  # offline, a cached dataset still loads
    try:
        return datasets.load_dataset(dataset, config, split=split).to_list()
    except Exception as error:  # whatever the HTTP client, pyarrow or the standard library raises
        reason = problem if problem and isinstance(error, ConnectionError) else one_line(error)
        raise UserError(
            f"Cannot load the {split} split of '{dataset}' from the Hugging Face Hub ({reason}), and no file or folder "
            "has that name: check the name, the split and the network, or pass a local path, or `synthetic`."
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
