"""Rows of a dataset, from the Hugging Face Hub, a local file or folder, or made on the spot.

A cell holds what the file says: no text becomes a date, no "NA" a gap, and no whole number loses digits.
"""

import csv
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from pyarrow import parquet

from src.errors import UserError, one_line
from src.hub import hub_problem, local_path
from src.problems import SPLIT_SIZES, synthetic_rows

log = logging.getLogger(__name__)

Row = dict[str, Any]
Splits = dict[str, Iterable[Row]]  # by name; a file is read when its rows are asked for

FILE = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|parquet)(\.gz|\.bz2|\.xz)?$", re.IGNORECASE)
FORMATS = ".jsonl, .ndjson, .json, .csv, .tsv or .parquet, where text may be packed (.gz, .bz2, .xz)"
open_text = partial(LocalFileSystem().open, mode="rt", compression="infer", encoding="utf-8-sig", newline="")
SPLIT = re.compile(r"(?<![a-z])((train|test)(ing)?|validation|valid|val|dev)(?![a-z])", re.IGNORECASE)
SHARD = re.compile(r"-\d+-of-(\d+)(?!\d)")
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?")


def read_rows(
    dataset: str, split: str, seed: int, needed: Sequence[str], others: Collection[str] | None = None
) -> list[Row]:
    """The rows of one split of a dataset, as `src.data.load_examples` describes it.

    needed: the columns that have to be there, or parts of them (`cell`); others: what to keep beside them, None: all.

    Raises:
        UserError: the dataset cannot be found, reached or read, or lacks the split or a column.
    """
    splits = _find_splits(dataset, seed)
    # `dev` is a validation split, too.
    named = {_split_name(name): name for name in splits if SPLIT.fullmatch(name)} | {name: name for name in splits}
    held_out = named.get("test") or named.get("validation") or named.get("train", "train")
    source = held_out if split == "test" else named.get(split, split)
    if source not in splits:
        raise UserError(f"'{dataset}' has no split '{split}': choose one of {one_line(', '.join(splits))}.")
    if split == "test" and _split_name(source) != split:
        log.info("data: '%s' has no test split: held out is what its %s split has for it", dataset, source)
    kept = None if others is None else {*needed, *(name.split(".")[0] for name in needed), *others}
    rows: list[Row] = []
    seen: dict[str, None] = {}
    for row in splits[source]:
        seen |= dict.fromkeys(row)
        rows.append({name: row[name] for name in row if kept is None or name in kept})
    if rows and not all({name, name.split(".")[0]} & seen.keys() for name in needed):
        has, advice = one_line(", ".join(seen)), "name its own with --question_column and --answer_column"
        raise UserError(f"'{dataset}' has no columns {' and '.join(needed)} (it has {has}): {advice}.")
    if source == held_out == named.get("train", "train"):
        end = len(rows) - min(1000, max(1, len(rows) // 10))
        return rows[:end] if split == "train" else rows[end:]
    return rows


def _find_splits(dataset: str, seed: int) -> Splits:
    if dataset == "synthetic":
        return {split: synthetic_rows(split, seed) for split in SPLIT_SIZES}
    local = os.path.expanduser(dataset)
    path = Path(local)
    if os.path.isfile(local):
        first = next(_file_rows(path))
        named = {_split_name(name): name for name, rows in first.items() if isinstance(rows, list)}
        lists = named if named and len(named.keys() - {None}) == len(first) else {"train": None}
        return {split: _file_rows(path, name) for split, name in lists.items()}
    if os.path.isdir(local) and not {"dataset_dict.json", "state.json"} & {file.name for file in path.glob("*")}:
        return _folder_splits(path)
    if os.path.isdir(local) or not (local_path(dataset) or FILE.search(dataset)):
        return _saved_splits(dataset, path)
    raise UserError(f"There is no file or folder '{dataset}': check the path, or name a Hub dataset like openai/gsm8k.")


def _split_name(name: str) -> str | None:
    """The split that a file, a folder or a list is named for."""
    found = SPLIT.search(name)
    return found and (found[2] or "validation").lower()


def _folder_splits(folder: Path) -> Splits:
    """The splits of a folder by the names in it: `train.csv`, or as on the Hub, `main/train-00000-of-00002.parquet` or
    `default/test/0000.parquet`.
    """
    found: dict[Path, dict[str, list[Path]]] = {}  # by data set, then split
    for path in sorted(path for depth in ("*", "*/*", "*/*/*") for path in folder.glob(depth)):
        inner = path.relative_to(folder)
        named = inner if _split_name(inner.name) else inner.parent
        if (split := _split_name(named.name)) and FILE.search(inner.name) and "/." not in f"/{inner}":
            found.setdefault(named.parent, {}).setdefault(split, []).append(path)
    usual = next((place for place in map(Path, (".", "data", "default", "main")) if place in found), None)
    found = {usual: found[usual]} if usual else found
    if len(found) != 1:
        several = f"several data sets ({one_line(', '.join(map(str, found)))}): give the folder of one as --dataset"
        none = f"no file of a split: put the rows in train.* and test.*, each {FORMATS}"
        raise UserError(f"'{folder}' holds {several if found else none}.")
    return {split: _shard_rows(folder, split, paths) for files in found.values() for split, paths in files.items()}


def _shard_rows(folder: Path, split: str, files: Sequence[Path]) -> Iterator[Row]:
    shard, names = SHARD.search(files[0].name), " and ".join(path.name for path in files)
    expected = int(shard[1]) if shard else len(files) if files[0].stem.isdigit() else 1
    if len(files) != expected:
        raise UserError(f"'{folder}' should hold {expected} {split} file(s), but holds {names}: fetch or remove some.")
    for path in files:
        yield from _file_rows(path)


def _file_rows(path: Path, key: str | None = None) -> Iterator[Row]:
    """The rows of a file; key: of the one object in it, with a list for each split."""
    kind = FILE.search(path.name)
    if not kind:
        raise UserError(f"Cannot tell the format of '{path}': its name should end in {FORMATS}.")
    count = 0
    try:
        rows = READERS.get(kind[1].lower(), _json_rows)(path)
        for row in rows if key is None else next(rows)[key]:
            if not isinstance(row, dict):
                raise ValueError(f"{str(row)[:40]!r} is no row")
            yield row
            count += 1
        if not count:
            raise ValueError("it holds no rows")
    except Exception as error:  # whatever pyarrow or the standard library thinks of a damaged file
        reason = f"{one_line(error)}; {count} rows were fine"
        advice = "check that the file is not empty or damaged, and that its text is UTF-8"
        raise UserError(f"Cannot read rows from '{path}' ({reason}): {advice}.") from error


def _json_rows(path: Path) -> Iterator[Row]:
    """One object a line, or a list of objects, or one object."""
    with open_text(path) as file:
        lines = filter(str.strip, file)
        head = next(lines, "[]")
        try:
            first = json.loads(head)
        except ValueError:  # it goes on on the next line
            first = json.loads(head + file.read())
        yield from first if isinstance(first, list) else [first]
        yield from map(json.loads, lines)


def _separated_rows(path: Path) -> Iterator[Row]:
    """CSV with the separator that makes most of the header; a cell that is a bare number is that number."""
    csv.field_size_limit(2**31 - 1)  # 131,072 characters by default
    with open_text(path) as file:
        header = file.readline()
        file.seek(0)
        mark = max(",;\t|", key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))
        reader = csv.DictReader(file, delimiter=mark, strict=True)
        names = list(filter(None, reader.fieldnames or []))
        if len(names) != len({*names}):
            raise ValueError("two of its columns have the same name")
        for row in reader:
            if None in row:
                raise ValueError(f"line {reader.line_num} has more cells than the header: quote those with a {mark!r}")
            yield {name: json.loads(cell) if NUMBER.fullmatch(cell or "") else cell for name, cell in row.items()}


def _parquet_rows(path: Path) -> Iterator[Row]:
    with parquet.ParquetFile(path) as file:
        yield from _plain_rows(file.iter_batches(100), datasets.Features.from_arrow_schema(file.schema_arrow))


READERS = {"csv": _separated_rows, "tsv": _separated_rows, "parquet": _parquet_rows}


def _saved_splits(dataset: str, folder: Path) -> Splits:
    """The splits of what `datasets` saved to a folder, or loads from the Hub."""
    was_offline, problem, place = datasets.config.HF_HUB_OFFLINE, None, "its folder"
    try:
        if folder.is_dir():
            saved = datasets.load_from_disk(folder)
        else:
            problem, place = hub_problem(), "the Hugging Face Hub, and no file or folder has that name"
            datasets.config.HF_HUB_OFFLINE = was_offline or problem is not None  # offline, a cached dataset still loads
            saved = datasets.load_dataset(dataset, "main" if dataset == "openai/gsm8k" else None)
    except Exception as error:  # whatever the HTTP client, pyarrow or the standard library raises
        reason = problem if problem and isinstance(error, ConnectionError) else one_line(error)
        advice = "check the name and the network, or pass a local path, or `synthetic`"
        raise UserError(f"Cannot load '{dataset}' from {place} ({reason}): {advice}.") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
    splits = saved if isinstance(saved, dict) else {"train": saved}
    return {name: _plain_rows(s.with_format("arrow").iter(100), s.features) for name, s in splits.items()}


def _plain_rows(tables: Iterable[Any], features: datasets.Features) -> Iterator[Row]:
    """The rows of Arrow tables."""
    return (_plain(row, features) for table in tables for row in table.to_pylist())


def _plain(value: Any, feature: Any) -> Any:
    """A class label as its name, and a number of 16 or 32 bits as the shortest that stands for it, at any depth."""
    if value is None:
        return None
    if isinstance(feature, datasets.ClassLabel):
        return feature.int2str(value) if value >= 0 else None
    if isinstance(feature, datasets.Json):
        return json.loads(value)
    if isinstance(feature, dict):
        return {name: _plain(value[name], inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return [_plain(entry, feature.feature) for entry in value]
    if getattr(feature, "dtype", "") in ("float16", "float32"):
        return float(str(np.dtype(feature.dtype).type(value)))
    return value
