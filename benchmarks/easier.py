"""GSM8K with fewer training problems, those of few calculations, as a folder for --dataset; all test problems are kept.

    python benchmarks/easier.py FOLDER --calculations 3 && python train.py --dataset FOLDER

Where no answer of a group is right, the group teaches at most the form, and a weak model is right more often on easier
problems; what that was worth stands in docs/results.md. A problem's calculations are the marks in its solution,
`<<48/2=24>>`.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from src.errors import UserError, writing
from src.rows import read_rows


def write_easier(dataset: str, folder: Path, calculations: int) -> dict[str, int]:
    """Write train.jsonl, the problems of 1 to `calculations`, and test.jsonl; returns the number of problems in each.

    Raises:
        UserError: the problems cannot be read, none is that easy, or the folder is there already or cannot be written.
    """
    rows = {split: read_rows(dataset, split, 0, [], others=("question", "answer")) for split in ("train", "test")}
    rows["train"] = [row for row in rows["train"] if 1 <= str(row.get("answer")).count("<<") <= calculations]
    if not all(any("answer" in row for row in kept) for kept in rows.values()):
        form = "GSM8K's form: question, and answer with its calculations marked as <<1+1=2>>"
        raise UserError(
            f"'{dataset}' has no training problem of 1 to {calculations} calculations, or is not in {form}."
        )
    with writing(f"to '{folder}'", "name a new folder"):
        folder.mkdir(parents=True)
        for split, kept in rows.items():
            lines = (json.dumps(row, default=str) + "\n" for row in kept)
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {split: len(kept) for split, kept in rows.items()}


def main(argv: list[str] | None = None) -> int:
    """Write the folder named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write GSM8K with the training problems of few calculations alone.")
    parser.add_argument("folder", type=Path, help="a new folder, for --dataset of train.py")
    parser.add_argument("--dataset", default="openai/gsm8k", help="GSM8K: its Hub id, or a folder with its columns")
    parser.add_argument("--calculations", type=int, default=3, help="the most in a training problem (default: 3)")
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
