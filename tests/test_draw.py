import json
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from benchmarks import draw
from benchmarks.draw import draw_curves, main
from benchmarks.report import read_run
from src.errors import UserError

SETTINGS = {"seed": 0, "learning_rate": 1e-4, "log_dir": "logs", "group_size": 8, "not_compared": ["seed", "log_dir"]}


def make_run(folder: Path, accuracy: list[float], **settings: object) -> Path:
    """A log folder with a validation and two GRPO steps for each of these accuracies."""
    folder.mkdir()
    lines = [{"phase": "cold_start", "step": 1, "loss": 9.0}]
    for i, value in enumerate(accuracy):
        ends = {"eval/accuracy_low": value - 0.1, "eval/accuracy_high": value + 0.1}
        lines.append({"phase": "eval", "step": 2 * i, "eval/accuracy": value, **ends})
        lines += [{"phase": "grpo", "step": 2 * i + n, "reward": value * n, "grad_norm": 1.0} for n in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    (folder / "settings.json").write_text(json.dumps(SETTINGS | settings), encoding="utf-8")
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list:
    """The figures that are drawn."""
    figures = []

    class Watched(draw.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            figures.append(self)

    monkeypatch.setattr(draw, "Figure", Watched)
    return figures


def panel(figure, title: str):
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left") == title]
    return axes


def test_one_run_shows_its_accuracy_inside_its_interval(tmp_path: Path, drawn: list) -> None:
    draw_curves([read_run(make_run(tmp_path / "a", [0.3, 0.5]))], tmp_path / "curves.png")
    axes = panel(drawn[0], "Held-out greedy accuracy")
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [[0, 0.3], [2, 0.5]]
    corners = axes.collections[0].get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx(0.2) and corners[:, 1].max() == pytest.approx(0.6)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["curves.png"]


def test_seeds_of_one_setting_become_their_mean_inside_a_band(tmp_path: Path, drawn: list) -> None:
    runs = [make_run(tmp_path / f"s{s}", [0.1 * s, 0.2 * s], seed=s, log_dir=f"l{s}") for s in (1, 2, 3)]
    draw_curves(list(map(read_run, runs)), tmp_path / "curves.png")
    axes = panel(drawn[0], "Held-out greedy accuracy")
    (line,) = axes.lines
    assert line.get_ydata().tolist() == pytest.approx([0.2, 0.4])
    assert sorted(axes.collections[0].get_paths()[0].vertices[:, 1])[-1] == pytest.approx(0.6)


def test_title_legend_and_panels_stand_one_below_the_other_however_many_runs(tmp_path: Path, drawn: list) -> None:
    text = "which is rather long, as a list of rewards is"
    runs = [read_run(make_run(tmp_path / str(g), [0.1, 0.2], rewards=f"{g} {text}", model="x" * 60)) for g in range(7)]
    draw_curves(runs, tmp_path / "curves.png")
    renderer = FigureCanvasAgg(drawn[0]).get_renderer()
    title, legend = (part.get_window_extent(renderer) for part in (drawn[0]._suptitle, *drawn[0].legends))
    assert title.y0 > legend.y1 - 6  # its frame, which is not drawn, has a margin
    assert legend.y0 > max(axes.get_tightbbox(renderer).y1 for axes in drawn[0].axes)


def test_runs_with_other_settings_are_lines_named_by_the_setting(tmp_path: Path, drawn: list) -> None:
    runs = [make_run(tmp_path / f"g{g}", [0.1, 0.2], group_size=g) for g in (4, 8)]
    draw_curves(list(map(read_run, runs)), tmp_path / "curves.png")
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["group_size 4", "group_size 8"]


def test_runs_with_other_rewards_are_compared_by_how_often_they_are_right(tmp_path: Path, drawn: list) -> None:
    runs = [make_run(tmp_path / f"r{i}", [0.1], rewards=f"mine.py:{name}=2") for i, name in enumerate(("one", "two"))]
    for run, accuracy in zip(runs, (0.25, 0.75), strict=True):
        with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"phase": "grpo", "step": 3, "reward": 0.0, "accuracy": accuracy}) + "\n")
    draw_curves(list(map(read_run, runs)), tmp_path / "curves.png")
    bold = [line for line in panel(drawn[0], "Accuracy of sampled completions").lines if line.get_linewidth() == 2]
    assert [line.get_xydata().tolist() for line in bold] == [[[3, 0.25]], [[3, 0.75]]]


def test_runs_without_a_validation_are_named_all_the_same(tmp_path: Path, drawn: list) -> None:
    runs = [make_run(tmp_path / f"g{g}", [0.1, 0.2], group_size=g) for g in (4, 8)]
    for path in (run / "metrics.jsonl" for run in runs):
        path.write_text("".join(line for line in path.read_text().splitlines(True) if "eval" not in line))
    draw_curves(list(map(read_run, runs)), tmp_path / "curves.png")
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["group_size 4", "group_size 8"]


def test_settings_that_do_not_tell_runs_apart_leave_them_one_line(tmp_path: Path, drawn: list) -> None:
    free = {"not_compared": ["save_every", "seed", "log_dir"]}
    runs = [make_run(tmp_path / f"s{s}", [0.1 * s, 0.2 * s], seed=s, save_every=s, **free) for s in (1, 2)]
    draw_curves(list(map(read_run, runs)), tmp_path / "curves.png")
    assert len(panel(drawn[0], "Held-out greedy accuracy").lines) == 1 and not drawn[0].legends
    assert "not_compared" not in read_run(runs[0]).settings


def test_broken_lines_as_a_crash_leaves_them_are_passed_over(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", [0.3])
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('[1]\n"x"\n{"phase": "grpo"}\n\x00\n{"phase": "grpo", "step": 3, "rew')
    assert read_run(folder).curves["reward"] == {1: 0.3, 2: 0.6}


def test_a_run_without_a_grpo_step_and_a_place_that_cannot_be_written_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no GRPO step yet"):
        read_run(make_run(tmp_path / "a", []))
    with pytest.raises(UserError, match="Cannot write"):
        draw_curves([read_run(make_run(tmp_path / "b", [0.1]))], tmp_path / "nowhere" / "curves.png")


def test_the_command_line_writes_into_the_first_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / name, [0.1, 0.4]) for name in ("a", "b")]
    assert main(list(map(str, runs))) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a" / "curves.png")
    assert (tmp_path / "a" / "curves.png").exists()


@pytest.mark.parametrize("missing", ["metrics.jsonl", "settings.json"])
def test_a_folder_that_is_no_run_is_named_in_one_line(
    tmp_path: Path, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "a", [0.3])
    (folder / missing).unlink()
    assert main([str(folder)]) == 1
    assert str(folder) in capsys.readouterr().err
