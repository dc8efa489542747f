"""Where the rows of a split are, whoever has laid them down; what is held out where nobody has."""

import json
import logging
from pathlib import Path

import datasets
import pytest

from src import rows
from src.data import load_examples
from tests.test_data import answers, row, user_error, write_jsonl


def write(path: Path, *numbers: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list([row(n) for n in numbers]).to_parquet(path)
    else:
        write_jsonl(path, [row(n) for n in numbers])


def loaded(dataset: object, *splits: str) -> list[list[str]]:
    return [answers(load_examples(str(dataset), split)[0]) for split in splits or ("train", "test")]


class TestFolders:
    @pytest.mark.parametrize(
        ("train", "test"),
        [
            ("train.jsonl", "test.parquet"),
            ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001-0a1b2c3d4e5f6789.parquet"),
            ("ARC-Easy/train-00000-of-00001.parquet", "ARC-Easy/validation-00000-of-00001.parquet"),
            ("default/train/0000.parquet", "default/test/0000.parquet"),
            ("gsm8k_train.jsonl", "gsm8k.Testing.jsonl"),
            ("train/rows.jsonl", "dev/rows.jsonl"),
        ],
    )
    def test_the_names_in_it_say_which_file_is_which_split(self, tmp_path, train, test):
        write(tmp_path / train, 1)
        write(tmp_path / test, 2)
        write(tmp_path / ".cache" / "huggingface" / "train.jsonl", 3)
        (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
        (tmp_path / "dataset_infos.json").write_text("{}")
        (tmp_path / "latest.json").write_text("{}")
        (tmp_path / "trained.json").write_text("{}")
        assert loaded(tmp_path) == [["1"], ["2"]]

    def test_numbered_files_are_one_split_when_all_are_there(self, tmp_path):
        for number in range(3):
            write(tmp_path / "data" / f"train-0000{number}-of-00003.parquet", number)
        write(tmp_path / "data" / "test-00000-of-00001.parquet", 9)
        assert loaded(tmp_path) == [["0", "1", "2"], ["9"]]
        (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
        assert (
            "should hold 3 train file(s), but holds train-00000-of-00003.parquet and "
            "train-00002-of-00003.parquet: fetch or remove some"
        ) in user_error(str(tmp_path))

    def test_of_several_data_sets_the_main_one_is_read_and_any_other_by_its_folder(self, tmp_path):
        for number, name in enumerate(("main", "socratic", "other")):
            for split in ("train", "test"):
                write(tmp_path / name / f"{split}-00000-of-00001.parquet", number)
        assert loaded(tmp_path) == [["0"], ["0"]] and loaded(tmp_path / "socratic") == [["1"], ["1"]]
        (tmp_path / "main").rename(tmp_path / "gsm8k")
        message = user_error(str(tmp_path))
        assert message.startswith(f"'{tmp_path}' holds several data sets (gsm8k, other, socratic): give the folder of")

    def test_files_in_the_folder_itself_go_before_those_of_folders_in_it(self, tmp_path):
        for number, name in enumerate((".", "old", "data")):
            for split in ("train", "test"):
                write(tmp_path / name / f"{split}.jsonl", number)
        assert loaded(tmp_path) == [["0"], ["0"]]
        (tmp_path / "train.jsonl").unlink()
        (tmp_path / "test.jsonl").unlink()
        assert loaded(tmp_path) == [["2"], ["2"]]

    def test_a_folder_may_be_a_link(self, tmp_path):
        write(tmp_path / "elsewhere" / "train.jsonl", 1)
        write(tmp_path / "elsewhere" / "test.jsonl", 2)
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "data").symlink_to(tmp_path / "elsewhere")
        assert loaded(tmp_path / "set") == [["1"], ["2"]]

    def test_a_folder_without_a_file_of_a_split(self, tmp_path):
        write(tmp_path / "rows.jsonl", 1)
        (tmp_path / "train.txt").write_text("notes")
        message = user_error(str(tmp_path))
        assert message.startswith(f"'{tmp_path}' holds no file of a split: put the rows in train.* and test.*")

    def test_a_folder_with_two_files_for_the_split(self, tmp_path):
        for name in ("train.jsonl", "train.json"):
            write(tmp_path / name, 1)
        assert "should hold 1 train file(s), but holds train.json and train.jsonl: " in user_error(str(tmp_path))

    @pytest.mark.parametrize("several", [True, False])
    def test_what_datasets_saved_to_disk_is_read_in_its_order(self, tmp_path, several):
        table = datasets.Dataset.from_list([row(n) for n in range(4)]).select([3, 1, 0])
        saved = datasets.DatasetDict({"train": table, "test": table.select([0])}) if several else table
        saved.save_to_disk(tmp_path / "saved")
        assert loaded(tmp_path / "saved") == ([["3", "1", "0"], ["3"]] if several else [["3", "1"], ["0"]])
        assert loaded(f"{tmp_path}/saved/") == loaded(tmp_path / "saved")
        for path in (tmp_path / "saved").rglob("state.json"):
            path.write_text("{")
        assert user_error(str(tmp_path / "saved")).startswith(f"Cannot load '{tmp_path}/saved' from its folder (")


class TestOneFile:
    @pytest.mark.parametrize("indent", [None, 1])
    def test_one_object_may_hold_a_list_for_each_split(self, tmp_path, indent):
        splits = {"Train": [row(1), row(2)], "valid": [row(3)]}
        path = tmp_path / "all.json"
        path.write_text(json.dumps(splits, indent=indent), encoding="utf-8")
        assert loaded(path, "train", "test", "validation") == [["1", "2"], ["3"], ["3"]]
        path.write_text(json.dumps(splits | {"test": [row(4)]}, indent=indent), encoding="utf-8")
        assert loaded(path) == [["1", "2"], ["4"]]

    def test_an_object_of_other_lists_is_no_split(self, tmp_path):
        (tmp_path / "all.json").write_text(json.dumps({"version": "1", "data": [row(1)]}), encoding="utf-8")
        assert "has no columns question and answer (it has version, data)" in user_error(str(tmp_path / "all.json"))

    def test_no_list_is_passed_over_where_two_have_the_name_of_one_split(self, tmp_path):
        for names in (("train", "train_extra"), ("valid", "dev")):
            (tmp_path / "all.json").write_text(json.dumps({name: [row(1)] for name in names}), encoding="utf-8")
            expected = f"has no columns question and answer (it has {', '.join(names)})"
            assert expected in user_error(str(tmp_path / "all.json"))

    def test_an_unknown_split(self, tmp_path):
        path = write_jsonl(tmp_path / "all.jsonl", [row(1), row(2)])
        assert user_error(path, "dev") == f"'{path}' has no split 'dev': choose one of train."
        assert user_error("synthetic", "dev") == "'synthetic' has no split 'dev': choose one of train, test."


class TestHeldOut:
    """What takes the place of a test split that is not there."""

    @staticmethod
    def as_folder(tmp_path: Path, splits: dict[str, list[dict]]) -> str:
        for name, found in splits.items():
            write_jsonl(tmp_path / f"{name}.jsonl", found)
        return str(tmp_path)

    @staticmethod
    def as_file(tmp_path: Path, splits: dict[str, list[dict]]) -> str:
        (tmp_path / "all.json").write_text(json.dumps(splits), encoding="utf-8")
        return str(tmp_path / "all.json")

    @staticmethod
    def as_saved(tmp_path: Path, splits: dict[str, list[dict]]) -> str:
        saved = {name: datasets.Dataset.from_list(found) for name, found in splits.items()}
        datasets.DatasetDict(saved).save_to_disk(tmp_path / "saved")
        return str(tmp_path / "saved")

    @staticmethod
    def as_hub(tmp_path: Path, splits: dict[str, list[dict]]) -> str:
        return "some/hub"

    @pytest.mark.parametrize("place", ["as_folder", "as_file", "as_saved"])
    def test_a_training_and_a_testing_split_are_those_of_train_and_test(self, tmp_path, place):
        splits = {"training": [row(n) for n in range(20)], "testing": [row(20)]}
        assert [len(split) for split in loaded(getattr(self, place)(tmp_path, splits))] == [20, 1]

    @pytest.mark.parametrize("place", ["as_folder", "as_file", "as_saved", "as_hub"])
    def test_the_validation_split_or_else_the_end_of_the_training_split(self, tmp_path, monkeypatch, caplog, place):
        train = [row(n) for n in range(20)]
        for splits, expected, held_out in (
            ({"train": train}, [18, 2], "train"),
            ({"training": train}, [18, 2], "training" if place in ("as_saved", "as_hub") else "train"),
            ({"train": train, "validation": [row(20)]}, [20, 1], "validation"),
            ({"train": train, "dev": [row(20)]}, [20, 1], "dev" if place in ("as_saved", "as_hub") else "validation"),
        ):
            folder = tmp_path / "-".join(splits)
            folder.mkdir()
            on_hub = datasets.DatasetDict({n: datasets.Dataset.from_list(found) for n, found in splits.items()})
            monkeypatch.setattr(rows, "hub_problem", lambda: None)
            monkeypatch.setattr(datasets, "load_dataset", lambda *args, on_hub=on_hub: on_hub)
            dataset = getattr(self, place)(folder, splits)
            caplog.clear()
            caplog.set_level(logging.INFO)
            found = loaded(dataset)
            assert [len(split) for split in found] == expected
            assert found[0] + found[1] == [str(n) for n in range(sum(expected))]
            [said] = [record.message for record in caplog.records if record.name == "src.rows"]
            assert said == f"data: '{dataset}' has no test split: held out is what its {held_out} split has for it"

    def test_without_a_training_split_there_is_nothing_to_train_on(self, tmp_path):
        write(tmp_path / "test.jsonl", 1, 2)
        assert loaded(tmp_path, "test") == [["1", "2"]]
        assert user_error(str(tmp_path)) == f"'{tmp_path}' has no split 'train': choose one of test."
