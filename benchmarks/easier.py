"""GSM8K's training problems of few calculations, written as a folder for --dataset; its test problems stay all there.

    python benchmarks/easier.py FOLDER --calculations 3 && python train.py --dataset FOLDER

A group teaches nothing when none of its answers is right, so a model that seldom is learns sooner from what it
sometimes solves. A problem's calculations are counted by the marks in its solution, `<<48/2=24>>`.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from src.errors import UserError, writing
from src.rows import read_rows


def write_easier(dataset: str, folder: Path, calculations: int) -> dict[str, int]:
    """Write train.jsonl, of 1 to so many calculations, and test.jsonl; returns the number of problems in each.

    Raises:
        UserError: the problems cannot be read, none is that easy, or the folder cannot be written.
    """
    numbers = {}
    for split in ("train", "test"):
        rows = read_rows(dataset, split, seed=0, needed=["question", "answer"])
        if split == "train":
            rows = [row for row in rows if 1 <= str(row["answer"]).count("<<") <= calculations]
        if not rows:
            raise UserError(
                f"'{dataset}' has no {split} problem of 1 to {calculations} calculations, marked as <<1+1=2>>."
            )
        with writing(f"to '{folder}'", "name another folder"):
            folder.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        numbers[split] = len(rows)
    return numbers


def main(argv: list[str] | None = None) -> int:
    """Write the folder named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dataset", default="openai/gsm8k", help="Hub id or folder of GSM8K")
    parser.add_argument("--calculations", type=int, default=3, help="that a training problem may take")
    args = parser.parse_args(argv)
    try:
        numbers = write_easier(args.dataset, args.folder, args.calculations)
    except UserError as error:
        print(f"easier: {error}", file=sys.stderr)
        return 1
    print(f"{args.folder}: {numbers['train']} training problems, {numbers['test']} test problems")
    return 0


if __name__ == "__main__":
    sys.exit(main())
