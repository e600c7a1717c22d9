"""Pictures on the page: the same prompts at every evaluation, groups of rollouts, and scores that only watch."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmrl import component, metrics, report
from mmrl.keeping import write_conversation
from mmrl.messages import Message, Picture
from mmrl.report.charts import chart_data
from mmrl.report.pictures import MAX_COLUMNS, is_picture
from mmrl.report.run import load
from mmrl.report.trained import trained_scores
from mmrl.transcripts import Question, Transcript, Turn, unmarked
from tests.core import picture_run
from tests.core.test_report import CONFIG, Inspector, data_of, open_in_chromium, text_of

TASKS = [1_000_000, 1_000_001, 1_000_006]  # the first of each family, of which evaluations between iterations do not ask the last
EVALUATIONS = ["paint-before", "paint-during-000001", "paint-during-000002", "paint-after", "more-after"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(component, "resolve", picture_run.resolve)
        run = picture_run.run(tmp_path_factory.mktemp("runs"))
    torch.use_deterministic_algorithms(True)
    return run


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    return report.build(run_dir).read_text(encoding="utf-8")


def record(run_dir: Path, name: str) -> dict[str, Any]:
    return json.loads((run_dir / "trajectories" / f"{name}.json").read_text())


def asked_in(evaluation: str) -> list[int]:
    return TASKS[:2] if "during" in evaluation else TASKS


def picture(run_dir: Path, kept: Mapping[str, Any]) -> Image.Image:
    """What the policy drew."""
    said = next(message for message in kept["messages"] if "calls" in message)
    return Image.open(run_dir / "trajectories" / kept["pictures"][said["parts"][-1]]["file"]).convert("RGB")


# ---------------------------------------------------------------- a run


def test_every_evaluation_keeps_pictures_of_the_same_prompts(run_dir: Path) -> None:
    kept = {path.stem for path in (run_dir / "trajectories").glob("*.json") if "-training-" not in path.stem}
    assert kept == {f"{evaluation}-{task}" for evaluation in EVALUATIONS for task in asked_in(evaluation)}
    reds = {}
    for evaluation in EVALUATIONS:
        tasks = asked_in(evaluation)
        told = [record(run_dir, f"{evaluation}-{task}") for task in tasks]
        assert [each["instruction"] for each in told] == [f"a field <b>{task}</b>" for task in tasks]
        reds[evaluation] = [picture_run.shade(picture(run_dir, each), 0) for each in told]
        assert [each["scores"]["red"] for each in told] == pytest.approx(reds[evaluation], abs=1e-4)
        assert all(each["scores"]["broken"] is None for each in told)
    # from the same noise: what training moved, it moved everywhere alike
    assert reds["paint-before"] != reds["paint-after"] != reds["more-after"]
    for values in reds.values():
        moved = [value - before for value, before in zip(values, reds["paint-before"], strict=False)]
        assert max(moved) - min(moved) < 2.5 / 255


def cells(page: str) -> tuple[list[str], list[list[str]]]:
    """The head of the grid, and its cells as HTML."""
    table = re.search(r'<table class="album">(.*?)</table>', page, flags=re.S)
    assert table is not None
    heads = [text_of(head) for head in re.findall(r"<th scope=\"col\">(.*?)</th>", table[1], flags=re.S)]
    rows = re.findall(r"<tr>(<th scope=\"row\">.*?)</tr>", table[1], flags=re.S)
    return heads, [re.split(r"<td>", row) for row in rows]


def embedded(cell: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/webp;base64,([^"]+)"', cell)
    return [Image.open(io.BytesIO(base64.b64decode(each))).convert("RGB") for each in found]


def test_the_grid_shows_prompts_by_evaluations_with_their_scores(run_dir: Path, page: str) -> None:
    heads, rows = cells(page)
    success = {(row["stage"], row["label"], row["iteration"]): 100 * row["success"] for row in metrics.read(run_dir)
               if row["kind"] == "evaluation"}  # fmt: skip
    assert heads == [
        "prompt",
        f"before paint success {success['paint', 'before', 0]:.1f} %",
        f"during paint iteration 1 success {success['paint', 'during', 1]:.1f} %",
        f"during paint iteration 2 success {success['paint', 'during', 2]:.1f} %",
        f"after paint success {success['paint', 'after', 3]:.1f} %",
        f"after more success {success['more', 'after', 1]:.1f} %",
    ]
    assert len(rows) == 3
    families = dict(zip(TASKS, ("edit", "new", "rare"), strict=True))
    for task, (asked, *drawn) in zip(TASKS, rows, strict=True):
        assert text_of(asked).startswith(f"a field <b>{task}</b> {families[task]} · task {task}")
        sources = embedded(asked)
        assert len(sources) == 1 - task % 2
        if sources:
            assert (sources[0].size, sources[0].getpixel((3, 3))) == ((6, 12), (task % 200, 200, 0))
        for evaluation, cell in zip(EVALUATIONS, drawn, strict=True):
            if task not in asked_in(evaluation):
                assert text_of(cell) == "–"
                continue
            told = record(run_dir, f"{evaluation}-{task}")
            red, cold = told["scores"]["red"], told["scores"]["cold"]
            mark = "✓" if red >= 0.5 else "✕"
            assert text_of(cell) == f"{mark} reward {red:.3g} red {red:.3g} cold {cold:.3g} broken failed"
            (shown,) = embedded(cell)
            assert shown.tobytes() == picture(run_dir, told).tobytes()  # tiny pictures lose nothing
            watched = {text_of(each).split()[0] for each in re.findall(r'<p class="score watched".*?</p>', cell)}
            assert watched == {"cold", "broken"} and 'class="small"' in cell
    assert "Nothing was trained on broken, cold, which only watch." in text_of(page)


def groups_of(page: str) -> list[str]:
    section = page[page.index('<section id="pictures"') :].partition("</section>")[0]
    return section.split('<div class="card" role="group">')[1:]


def test_groups_show_the_best_and_the_worst_and_what_they_were_worth(run_dir: Path, page: str) -> None:
    groups = groups_of(page)
    assert [re.search(r"(paint|more) · iteration \d", text_of(group))[0] for group in groups] == [  # type: ignore[index]
        "paint · iteration 1",
        "paint · iteration 3",
        "more · iteration 1",
    ]
    for group, stem in zip(groups, ("paint-training-000001", "paint-training-000003", "more-training-000001"), strict=True):
        told = sorted((record(run_dir, f"{stem}-{rank}") for rank in (1, 2, 3, 4)), key=lambda each: -each["return"])
        returns = torch.tensor([each["return"] for each in told], dtype=torch.float64)
        mean, std = float(returns.mean()), float(returns.std())
        assert f"group of 4: reward {mean:.3g} ± {std:.3g} (std)" in text_of(group)
        figures = group.split("<figure")[1:]
        for place, (figure, each) in enumerate(zip(figures, told, strict=True)):
            worth = (each["return"] - mean) / std
            said = text_of("<figure" + figure)
            rank = ["best", "reward", "reward", "worst"][place]
            assert f"{'✓' if each['success'] else '✕'} {rank} {each['return']:.3g}" in said
            advantage = float(re.search(r"advantage ([+−]?[\d.e−]+)", said)[1].replace("−", "-"))  # type: ignore[index]
            assert advantage == pytest.approx(worth, rel=0.02, abs=1e-3)
            assert embedded(figure)[-1].tobytes() == picture(run_dir, each).tobytes()


def test_pictures_are_no_conversations_and_the_page_stays_self_contained(page: str) -> None:
    inspector = Inspector()
    inspector.feed(page)
    assert inspector.outside == [] and inspector.unnamed == 0 and inspector.scripts == 2
    groups = sum(group.count("<img") for group in groups_of(page))
    assert inspector.pictures == 3 * 5 - 2 + 2 + groups
    assert '<a href="#pictures">' in page and 'id="conversations"' not in page and 'id="rollouts"' not in page
    assert json.loads(data_of(page))["conversations"] == [] and "a field <b>" not in page


def test_scores_of_evaluations_share_a_chart_that_says_which_only_watch(run_dir: Path, page: str) -> None:
    (panel,) = [panel for panel in json.loads(data_of(page))["panels"] if panel["key"].startswith("held_out")]
    rows = [row for row in metrics.read(run_dir) if row["kind"] == "evaluation"]
    assert [(series["name"], series["watched"]) for series in panel["series"]] == [
        ("red (trained on)", False),
        ("cold (watched)", True),
    ]
    for series, name in zip(panel["series"], ("score_red", "score_cold"), strict=True):
        assert series["raw"] == pytest.approx([row["metrics"][name] for row in rows], rel=1e-4)
    assert panel["axes"]["step"] == [row["step"] for row in rows] and len(rows) == len(EVALUATIONS)
    assert panel["label"] == [row["label"] for row in rows] and panel["iteration"] == [row["iteration"] for row in rows]
    assert panel["stage"] == [0, 0, 0, 0, 1] and panel["group"] == "rewards"


def test_the_pictures_in_a_browser(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = """
;(() => {
  const seen = [], look = () => seen.push([enlarged.open, enlarged.querySelector("img")?.src, enlarged.innerText]);
  const row = [...document.querySelectorAll(".album tbody tr")][1], shots = [...row.querySelectorAll("td .enlarge")];
  shots[1].click(); look();
  const press = (key) => enlarged.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  press("ArrowRight"); look(); press("ArrowLeft"); press("ArrowLeft"); look(); press("ArrowLeft"); look();
  enlarged.click(); look();
  const shapes = shots.map((shot) => getComputedStyle(shot.querySelector("img")).imageRendering);
  const wide = shots.map((shot) => shot.querySelector("img").getBoundingClientRect().width);
  const answers = JSON.stringify({ seen, sources: shots.map((shot) => shot.querySelector("img").src), shapes, wide });
  document.body.append(Object.assign(document.createElement("pre"), { id: "answers", textContent: answers }));
})();
"""
    real = report._part
    monkeypatch.setattr(report, "_part", lambda name: real(name) + (driver if name == "pictures.js" else ""))
    (tmp_path / "run").symlink_to(run_dir)
    dom, console = open_in_chromium(report.build(tmp_path / "run"), tmp_path / "profile")
    assert console == []
    found = re.search(r'<pre id="answers">(.*?)</pre>', dom, flags=re.S)
    assert found is not None
    told = json.loads(html.unescape(found[1]))
    sources = told["sources"]
    assert [(shown, source) for shown, source, _ in told["seen"]] == [
        (True, sources[1]),
        (True, sources[2]),
        (True, sources[0]),
        (True, sources[-1]),  # round the end
        (False, sources[-1]),
    ]
    red = record(run_dir, f"paint-during-000001-{TASKS[1]}")["scores"]["red"]
    first = " ".join(told["seen"][0][2].split())
    assert (
        first.startswith(f"a field <b>{TASKS[1]}</b> during paint, iteration 1")
        and f"red {red:.3g}" in first
        and "6 × 6" in first
    )
    assert set(told["shapes"]) == {"pixelated"} and min(told["wide"]) > 80
    chart = re.search(r'data-panel="held_out".*?</figure>', dom, flags=re.S)
    assert chart is not None
    assert len(re.findall(r'<path class="smooth(?: watched)?"', chart[0])) == 2 and chart[0].count('class="value"') == 10
    assert len(re.findall(r'<path class="smooth watched"', chart[0])) == 1 and "cold (watched)" in chart[0]
    assert "NaN" not in chart[0]


# ---------------------------------------------------------------- records made by hand


def drawn(folder: Path, name: str, task: int = 0, *, size: int = 8, colour: int = 0, success: bool = True, **about: Any) -> None:
    """A kept picture."""
    noise = torch.randint(0, 256, (size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(colour))
    prompt = Question("drawn", (f"prompt {task}",), (), unmarked)
    said = Turn(Message("assistant", (Picture(Image.fromarray(noise.numpy())),)))
    scores = about.pop("scores", {"good": colour / 10})
    told = Transcript(task, prompt, (Message("user", prompt.parts),), (said,), "", "answer", scores)
    facts = {"label": "before", "stage": "improve", "task_id": task, "family": "drawn", "success": success, "return": 0.5}
    write_conversation(folder / "trajectories", name, told, {**facts, "instruction": f"prompt {task}", **about})


def made(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def test_many_evaluations_are_thinned_out_and_keep_both_ends(tmp_path: Path) -> None:
    run = made(tmp_path)
    drawn(run, "before", colour=0)
    for n in range(1, 50):
        drawn(run, f"during-{n}", label="during", iteration=n, colour=n)
    drawn(run, "after", label="after", colour=50)
    pictures = load(run).recorded.pictures
    titles = [(column.title, column.iteration) for column in pictures.columns]
    assert len(titles) == MAX_COLUMNS and titles[0] == ("before improve", None) and titles[-1] == ("after improve", None)
    within = [iteration for _, iteration in titles[1:-1]]
    assert within == sorted(within) and (within[0], within[-1]) == (1, 49)  # type: ignore[type-var]
    assert pictures.left_out == f"{51 - MAX_COLUMNS} evaluations"
    assert f"{51 - MAX_COLUMNS} evaluations more in the run's folder trajectories" in text_of(report.build(run).read_text())


def test_an_evaluation_that_only_repeats_the_one_before_it_is_left_out(tmp_path: Path) -> None:
    run = made(tmp_path)
    moments = [("warm_start", "before", 1), ("warm_start", "after", 1), ("improve", "before", 1), ("improve", "after", 2)]
    moments += [("improve", "evaluate", 2)]
    with (run / "metrics.jsonl").open("w") as file:  # says which stage comes first
        for stage, label, _ in moments:
            row = {"kind": "evaluation", "stage": stage, "iteration": 0, "label": label, "step": 0, "seconds": 1.0}
            file.write(json.dumps(row | {"success": 0.5, "episodes": 2}) + "\n")
    for stage, label, colour in moments:
        drawn(run, f"{stage}-{label}", stage=stage, label=label, colour=colour)
    columns = [column.title for column in load(run).recorded.pictures.columns]
    assert columns == ["before warm_start", "after warm_start", "after improve"]
    drawn(run, "improve-before", stage="improve", colour=1, scores={"good": 0.7})  # the same, judged otherwise
    columns = [column.title for column in load(run).recorded.pictures.columns]
    assert columns == ["before warm_start", "after warm_start", "before improve", "after improve"]


def test_a_prompt_that_an_evaluation_did_not_ask_leaves_a_gap(tmp_path: Path) -> None:
    run = made(tmp_path)
    for task in (9, 10):
        drawn(run, f"before-{task}", task, colour=task)
    drawn(run, "after-9", 9, label="after", colour=3)
    pictures = load(run).recorded.pictures
    assert [(row.first.task_id, [shot is not None for shot in row.shots]) for row in pictures.rows] == [
        ("9", [True, True]),
        ("10", [True, False]),
    ]


def test_large_pictures_are_made_smaller_and_those_beyond_the_room_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(tmp_path)
    for n in range(3):
        drawn(run, f"before-{n}", n, size=500, colour=n)
    whole = [row.shots[0].picture for row in load(run).recorded.pictures.rows]  # type: ignore[union-attr]
    for shown in whole:
        assert (shown.width, shown.height, shown.tiny) == (500, 500, False) and shown.image is not None
        assert Image.open(io.BytesIO(base64.b64decode(shown.image.partition(",")[2]))).size == (384, 384)
    size = max(len(base64.b64decode(shown.image.partition(",")[2])) for shown in whole if shown.image)
    monkeypatch.setattr("mmrl.report.pictures.MAX_BYTES", 2 * size)
    assert [row.shots[0].picture.image is None for row in load(run).recorded.pictures.rows] == [False, False, True]  # type: ignore[union-attr]
    assert "not embedded, to keep this page small" in text_of(report.build(run).read_text())


def test_damaged_pictures_are_counted_and_the_others_shown(tmp_path: Path) -> None:
    run = made(tmp_path)
    for n in range(4):
        drawn(run, f"before-{n}", n, colour=n)
    (run / "secret.webp").write_bytes(b"secret")
    paths = sorted((run / "trajectories").glob("*.json"))
    for path, change in zip(
        paths, ({"pictures": [{"file": "../secret.webp", "width": 1, "height": 1}]}, {"pictures": []}), strict=False
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    last = json.loads(paths[3].read_text())
    (run / "trajectories" / last["pictures"][0]["file"]).write_bytes(b"no picture")
    loaded = load(run)
    assert [row.first.task_id for row in loaded.recorded.pictures.rows] == ["2", "3"]
    assert "2 recorded pictures could not be read." in loaded.notices
    assert loaded.recorded.pictures.rows[1].first.picture.image is None
    page = report.build(run).read_text()
    assert 'class="album gallery"' in page  # one evaluation needs no table


def test_a_picture_is_what_a_policy_answers_with_one_message(tmp_path: Path) -> None:
    run = made(tmp_path)
    drawn(run, "one")
    told = record(run, "one")
    assert is_picture(told)
    user, said = told["messages"]
    assert not is_picture(told | {"messages": [user, said | {"parts": ["red"]}]})
    assert not is_picture(told | {"messages": [user, said, said]})
    assert not is_picture(told | {"messages": [user, said | {"calls": [{"name": "crop"}]}]})
    assert not is_picture({"instruction": "push", "success": True}) and not is_picture({"messages": 3})


def test_scores_that_lie_apart_also_have_charts_of_their_own() -> None:
    header = {"kind": "evaluation", "stage": "a", "success": 0.5, "episodes": 4, "seconds": 60.0}
    rows = [
        header | {"step": n, "iteration": n, "label": label, "metrics": {"score_a": 0.1 * n, "score_pick": 21.0 - n, "far": 9.0}}
        for n, label in enumerate(("before", "during", "after", "evaluate"))
    ]
    panels = [panel for panel in chart_data(rows, frozenset({"pick"}))["panels"] if panel["group"] == "rewards"]
    assert [(panel["key"], [series["name"] for series in panel["series"]]) for panel in panels] == [
        ("held_out", ["pick (trained on)", "a (watched)"]),
        ("held_out:pick", ["pick (trained on)"]),
        ("held_out:a", ["a (watched)"]),
    ]
    assert panels[0]["axes"]["step"] == [0, 1, 2] and panels[0]["series"][0]["raw"] == [21.0, 20.0, 19.0]
    assert [series["name"] for series in chart_data(rows)["panels"][0]["series"]] == [
        "a",
        "pick",
    ]  # no word where it is not known
    assert not [
        panel for panel in chart_data([row | {"metrics": {"far": 1.0}} for row in rows])["panels"] if "held_out" in panel["key"]
    ]


RED: dict[str, Any] = {"target": "rewards:RedShade"}
BLUE: dict[str, Any] = {"target": "rewards:Blue", "name": "cold", "weight": 0.0}
COLLECT: dict[str, Any] = {"collect": {"num_envs": 2}}


@pytest.mark.parametrize(
    ("stages", "names"),
    [
        ([COLLECT], {"red_shade"}),
        ([{"data": {}}], None),  # imitation is paid for nothing
        ([COLLECT, COLLECT | {"environment": {"rewards": [BLUE | {"weight": -1.0}]}}], {"red_shade", "cold"}),
        ([COLLECT | {"environment": {"pass_mark": 2}}], {"red_shade"}),
        ([COLLECT | {"environment": {"rewards": {"cold": {"weight": 0.5}}}}], {"red_shade", "cold"}),
        ([COLLECT | {"environment": {"rewards": {"red_shade": {"weight": 0}, "cold": {"weight": 1}}}}], {"cold"}),
        ([COLLECT | {"environment": {"rewards": {"nothing": {"weight": 0.5}}}}], {"red_shade"}),
        ([COLLECT | {"rewards": [{"target": "mmrl.rewards.scored:Scored", "score": "cold"}]}], {"cold"}),
        (
            [COLLECT | {"rewards": [{"target": "a:Scored", "score": "cold"}], "scoring": {"environment": 0.5}}],
            {"cold", "red_shade"},
        ),
        ([COLLECT | {"rewards": [{"target": "a:Scored", "score": "cold", "weight": 0}, {"target": "a:Form"}]}], {"form"}),
        (None, {"red_shade"}),
    ],
)
def test_which_scores_something_is_trained_on(stages: Any, names: set[str] | None) -> None:
    config = {"environment": {"rewards": [RED, BLUE]}, "stages": stages}
    assert trained_scores(config) == (None if names is None else frozenset(names))


def test_a_configuration_that_says_nothing_of_rewards() -> None:
    assert trained_scores({}) is None and trained_scores({"environment": 3, "stages": [None, {"collect": {}}]}) is None
