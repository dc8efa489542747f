"""The page of a run, opened in a real browser where there is one, and read as a file everywhere."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.report import main, read_run, write_page
from src.errors import UserError
from tests.test_draw import make_run

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
FLAGS += ["--virtual-time-budget=5000", "--dump-dom"]
HOSTILE = '</script><img src=x onerror="window.pwned = 1"><!--<script>window.pwned = 2</script> \u2028 &lt;b&gt; 😀'


def completion(text: str, answer: str) -> str:
    return f"<reasoning>{text}</reasoning> <output>{text}</output> <answer>{answer}</answer>"


def sample(step: int, given: str, reward: float, text: str = "1+1 = 2", **more: object) -> dict:
    """One line of samples.jsonl to a problem whose answer is 7."""
    values = {"step": step, "question": f"Question {step}?", "answer": "7", "completion": completion(text, given)}
    values |= {"reward": reward, "rewards": {"formatting": reward / 4, "my_own": 1 - reward}}
    return values | {"truncated": False, "correct": float(given) == 7} | more


SAMPLES = [sample(1, "7", 2.0), sample(1, "5", 1.0), sample(2, "9", 3.0, "a needle"), sample(2, "7.0", 0.5)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The log folder of a run with four completions, two of them right."""
    folder = make_run(tmp_path / "logs", [0.2, 0.4, 0.6], model="some/model", dataset="some/data")
    write_samples(folder, SAMPLES)
    return folder


def write_samples(folder: Path, rows: list[dict]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "samples.jsonl").write_text("".join(lines), encoding="utf-8")


def page_data(path: Path) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.S)
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def browse(folder: Path, script: str, width: int = 1280) -> dict:
    """What `script`, the body of a function run inside the page after its own, returns.

    The page stands in a frame, since a window is never as narrow as a phone.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium to open the page with")
    write_page(folder, folder / "report.html")
    page = (folder / "report.html").read_text(encoding="utf-8")
    catch = '<script>var errors = []; window.addEventListener("error", e => errors.push(e.message));</script>'
    call = f"parent.document.body.dataset.result = JSON.stringify({{errors, ...(() => {{ {script} }})()}});"
    page = page.replace("<head>", f"<head>{catch}").replace("</body>", f"<script>{call}</script></body>")
    frame = f'<body><iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{escape(page)}"></iframe>'
    (folder / "watched.html").write_text(f'<!doctype html><meta charset="utf-8">{frame}', encoding="utf-8")
    command = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run([*command, (folder / "watched.html").as_uri()], capture_output=True, timeout=60)
    found = re.search(r'<body data-result="([^"]*)"', done.stdout.decode("utf-8"))
    assert found, done.stderr.decode("utf-8", "replace")[-2000:]
    result = json.loads(unescape(found[1]))
    assert result.pop("errors") == []
    return result


def test_what_a_model_writes_stays_text(folder: Path) -> None:
    hostile = sample(3, "7", 1.0, HOSTILE, question=HOSTILE, answer=HOSTILE, rewards={HOSTILE: 1.0})
    write_samples(folder, [hostile])
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    (folder / "settings.json").write_text(json.dumps(settings | {"model": HOSTILE, HOSTILE: HOSTILE}), encoding="utf-8")
    seen = browse(
        folder,
        'document.getElementById("find").value = "onerror"; choose();'
        'return {pwned: String(window.pwned), images: document.querySelectorAll("img").length,'
        'scripts: document.scripts.length, text: document.querySelector(".sample pre").textContent,'
        'question: document.querySelector(".question").textContent, title: document.querySelector("h1").textContent}',
    )
    assert seen["pwned"] == "undefined" and seen["images"] == 0
    assert seen["scripts"] == 4  # the data, the page's own, and this test's two
    assert seen["text"] == completion(HOSTILE, "7")
    assert seen["question"] == HOSTILE and HOSTILE in seen["title"]


def test_completions_can_be_sorted_filtered_and_searched(folder: Path) -> None:
    seen = browse(
        folder,
        """
        const shown = () => [...document.querySelectorAll(".sample .head b")].map(node => +node.textContent);
        const set = (id, value) => {
          document.getElementById(id).value = value;
          document.getElementById(id).dispatchEvent(new Event("input", {bubbles: true}));
          return shown();
        };
        const result = {first: shown(), sorts: [...document.getElementById("sort").options].map(o => o.value)};
        result.reward = set("sort", "reward");
        result.lowest = set("order", "1");
        result.own = set("sort", "reward/my_own");
        result.right = set("show", "right");
        result.wrong = set("show", "wrong");
        result.step = set("step", "2");
        set("step", ""); set("show", "all");
        result.found = set("find", "NEEDLE");
        result.marked = document.querySelector("mark").textContent;
        result.nothing = set("find", "hay");
        result.count = document.getElementById("count").textContent;
        showStep(1);
        result.clicked = shown();
        document.getElementById("cheats").click();
        result.cheats = shown();
        result.verdicts = [...document.querySelectorAll(".verdict")].map(node => node.textContent);
        return result;
        """,
    )
    assert seen["first"] == [3, 0.5, 2, 1]  # the latest step first
    assert seen["sorts"] == ["step", "reward", "reward/formatting", "reward/my_own"]
    assert seen["reward"] == [3, 2, 1, 0.5] and seen["lowest"] == [0.5, 1, 2, 3]
    assert seen["own"] == [3, 2, 1, 0.5]  # my_own is 1 - reward
    assert seen["right"] == [2, 0.5] and seen["wrong"] == [3, 1] and seen["step"] == [3]
    assert seen["found"] == [3] and seen["marked"] == "needle" and seen["nothing"] == []
    assert seen["count"].startswith("0 of 4 completions")
    assert seen["clicked"] == [2, 1]
    assert seen["cheats"] == [1] and seen["verdicts"] == ["wrong"]  # among those of the step that is chosen


def test_fields_are_highlighted_and_what_stands_outside_them_is_too(folder: Path) -> None:
    text = "Well, <reasoning>a</reasoning>\n<answer>7</answer> <output>b"
    write_samples(folder, [sample(1, "7", 1.0, completion=text)])
    script = 'return {parts: [...document.querySelectorAll(".sample pre span")].map(n => [n.className, n.textContent])}'
    parts = [part for part in browse(folder, script)["parts"] if part[0] not in ("tag", "")]
    assert parts == [["outside", "Well, "], ["reasoning", "a"], ["answer", "7"], ["output", "b"]]


def test_the_curves_are_drawn_and_read_with_the_keyboard(folder: Path) -> None:
    seen = browse(
        folder,
        """
        const chart = document.querySelector(".chart svg"), read = () => chart.previousSibling.textContent;
        const press = key => chart.dispatchEvent(new KeyboardEvent("keydown", {key}));
        const result = {paths: chart.querySelectorAll("path").length, last: read()};
        press("PageDown"); result.first = read();
        press("ArrowRight"); press("ArrowRight"); result.second = read();
        press("Enter"); result.step = document.getElementById("step").value;
        const titles = [...document.querySelectorAll("#charts .values")].map(node => node.textContent);
        return {...result, rewards: titles[2], tiles: document.getElementById("tiles").textContent};
        """,
    )
    assert seen["paths"] == 2  # the interval and the line
    assert seen["last"] == "60.0% (50.0% to 70.0%) at step 4"
    assert seen["first"] == "20.0% (10.0% to 30.0%) at step 0" and seen["second"].endswith("at step 2")
    assert seen["step"] == "2"
    assert "20.0%accuracy at step 0" in seen["tiles"] and "60.0%accuracy at step 4" in seen["tiles"]


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(folder: Path, width: int) -> None:
    long = "x" * 500
    write_samples(folder, [sample(1, "7", 1.0, long, question=long, answer=long, rewards={long: 1.0})])
    script = """
        document.querySelectorAll("details").forEach(node => { node.open = true; });
        return {inner: innerWidth, scroll: document.documentElement.scrollWidth};
        """
    assert browse(folder, script, width) == {"inner": width, "scroll": width}


def test_the_page_loads_nothing_from_elsewhere(folder: Path) -> None:
    write_page(folder, folder / "report.html")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not a place
    assert not re.search(r"<(script|img|link)[^>]+(src|href)=\"(?!data:)", page)
    assert "default-src 'none'" in page


def test_a_completion_is_right_when_its_line_says_so(folder: Path) -> None:
    write_page(folder, folder / "report.html")
    data = page_data(folder / "report.html")
    assert [row["correct"] for row in data["samples"]] == [True, False, False, True]
    assert data["total"] == 4 and data["settings"]["model"] == "some/model"


def test_a_page_of_many_completions_keeps_whole_groups_of_evenly_spread_steps(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [sample(step, "7", 1.0, "y" * 100) for step in range(10, 101, 10) for _ in range(2)]
    write_samples(folder, rows)
    monkeypatch.setattr(report, "PAGE_BYTES", (folder / "samples.jsonl").stat().st_size * 2 // 5)
    write_page(folder, folder / "report.html")
    data = page_data(folder / "report.html")
    assert [row["step"] for row in data["samples"]] == [10, 10, 40, 40, 70, 70, 100, 100]
    assert data["total"] == 20
    seen = browse(folder, 'return {count: document.getElementById("count").textContent}')
    assert seen["count"].startswith("8 of 8 completions (of 20;")


def test_curves_are_in_order_and_what_is_not_finite_is_left_out(folder: Path) -> None:
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        for step, loss in ((2, "3.0"), (3, "NaN"), (4, "5.0"), (1, "1.0"), (5, "6.0")):
            file.write(f'{{"phase": "grpo", "step": {step}, "loss": {loss}}}\n')
    write_page(folder, folder / "report.html")
    assert page_data(folder / "report.html")["curves"]["loss"] == [[1, 2, 4, 5], [1.0, 3.0, 5.0, 6.0]]


def test_lines_cut_short_and_a_missing_file_of_samples_leave_a_page_without_them(folder: Path) -> None:
    with open(folder / "samples.jsonl", "a", encoding="utf-8") as file:
        file.write('[1]\n{"step": 3, "completion": "x"}\n{"step": 3, "quest')
    write_page(folder, folder / "report.html")
    assert len(page_data(folder / "report.html")["samples"]) == 4
    (folder / "samples.jsonl").unlink()
    assert browse(folder, 'return {count: document.getElementById("count").textContent}')["count"].startswith("0 of 0")


def test_the_command_line_writes_the_page_or_says_in_one_line_why_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html") and (folder / "report.html").exists()
    assert main([str(folder / "nowhere")]) == 1
    assert "nowhere' is no log folder of a run" in capsys.readouterr().err
    with pytest.raises(UserError, match="Cannot write"):
        write_page(folder, folder / "nowhere" / "page.html")


def test_an_invalid_byte_or_an_odd_row_costs_its_line_and_the_page_is_made(folder: Path) -> None:
    whole = len((folder / "metrics.jsonl").read_bytes().splitlines())
    odd = [
        b'{"phase": "grpo", "step": 1, "reward": "much"}',
        b"[1, 2]",
        b'{"phase": "grpo", "step": "\xff"}',
        b"[" * 10**5,
    ]
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b"\n".join(odd) + b"\n")
    rows = [sample(3, "7", 1.0, question=7), sample(4, "7", 1.0, rewards={"my_own": "x"}), sample({"a": 1}, "7", 1.0)]
    write_samples(folder, [*SAMPLES, *rows])
    with open(folder / "samples.jsonl", "ab") as file:
        file.write(b'{"step": 5, "question": "\xff\xfe"}\n')
    before = read_run(folder)
    write_page(folder, folder / "report.html")
    assert len(page_data(folder / "report.html")["samples"]) == len(SAMPLES)
    (folder / "metrics.jsonl").write_bytes(b"".join((folder / "metrics.jsonl").read_bytes().splitlines(True)[:whole]))
    assert read_run(folder).curves == before.curves
