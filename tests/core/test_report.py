import base64
import html
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from mmrl import report
from mmrl.errors import MMRLError
from mmrl.metrics import MetricsWriter
from mmrl.numerics.statistics import wilson_interval
from mmrl.report.charts import chart_data, smooth
from mmrl.report.run import load
from mmrl.report.summary import summarize, time_split
from mmrl.report.system import describe_system
from mmrl.report.video import write_animation

FAMILIES = ("reach", "push to a zone", "pick and place", "sort")
CONFIG = """\
name: synthetic
seed: 0
policy: {target: "policies.pi0:Pi0", checkpoint: assets/tiny_pi0}
environment: {target: "simulators.tabletop:Tabletop"}
stages:
- {name: warm_start, iterations: 40, algorithm: {target: "mmrl.algorithms.sft:SFT"}}
- {name: improve, iterations: 60, algorithm: {target: "mmrl.algorithms.ppo:PPO"}}
"""
INJECTION = "<script>alert('x')</script> & </script><b>push</b>"


def make_run(run_dir: Path, *, improve: int = 60, evaluate: bool = True, rollouts: bool = True) -> Path:
    """A run as the trainer leaves it: two stages, evaluations, recorded rollouts, numbers that look like real ones."""
    noise = torch.Generator().manual_seed(0)
    ticking = Ticking(run_dir)
    if evaluate:
        ticking.evaluate("warm_start", -1, "before", 0.04)
    for i in range(40):
        loss = 1.1 * math.exp(-i / 15) + 0.25 + 0.05 * _normal(noise)
        ticking.train(
            "warm_start",
            i,
            {"loss/flow_matching": loss, "loss/loss": loss, "optimizer/lr_actor": 1e-3 * (1 - i / 40), "grad_norm": loss * 2},
            update=2.0,
        )
    if evaluate:
        ticking.evaluate("warm_start", 39, "after", 0.42)
    for i in range(improve):
        rate = 0.42 + 0.5 * (1 - math.exp(-i / 25)) + 0.03 * _normal(noise)
        ticking.train("improve", i, _improve_metrics(i, min(rate, 1.0), noise), collect=3.1, score=0.4, update=2.2)
        if evaluate and i % 20 == 19 and i < 59:
            ticking.evaluate("improve", i, "during", rate)
    if evaluate and improve == 60:
        ticking.evaluate("improve", 59, "after", 0.92)
    ticking.writer.close()
    (run_dir / "config.yaml").write_text(CONFIG)
    started = {"started": "2026-03-01 10:20:00 UTC"}
    (run_dir / "environment.json").write_text(json.dumps(describe_system() | started))
    if rollouts:
        make_rollouts(run_dir / "trajectories")
    return run_dir


class Ticking:
    """A MetricsWriter whose clock moves by the seconds that the rows say they took."""

    def __init__(self, run_dir: Path) -> None:
        self.writer = MetricsWriter(run_dir, tensorboard=False)
        self.now = 1.0
        self.writer.seconds = lambda: self.now  # type: ignore[method-assign]

    def train(self, stage, iteration, metrics, **seconds):
        self.now += sum(seconds.values()) + 0.1
        self.writer.train(stage, iteration, metrics | {f"seconds/{name}": value for name, value in seconds.items()})

    def evaluate(self, stage, iteration, label, rate):
        self.now += 9.0
        shares = [min(1.0, max(0.0, rate + offset)) for offset in (0.06, 0.01, -0.03, -0.04)]
        families = {
            name: {"success": round(128 * share) / 128, "episodes": 128} for name, share in zip(FAMILIES, shares, strict=True)
        }
        overall = sum(result["success"] for result in families.values()) / 4
        self.writer.evaluation(
            stage, iteration, label, {"success": overall, "episodes": 512, "families": families, "seconds": 9.0}
        )


def _improve_metrics(i: int, rate: float, noise: torch.Generator) -> dict[str, float]:
    return {
        "rollout/success": rate,
        "rollout/return": 1.4 * rate + 0.05 * _normal(noise),
        "loss/policy_loss": -0.01 + 0.004 * _normal(noise),
        "loss/value_loss": 0.2 * math.exp(-i / 20) + 0.02 + 0.01 * abs(_normal(noise)),
        "loss/approx_kl": 0.004 + 0.002 * abs(_normal(noise)),
        "loss/clip_fraction": 0.08 + 0.02 * abs(_normal(noise)),
        "loss/ratio_min": 0.6 - 0.05 * abs(_normal(noise)),
        "loss/ratio_max": 1.5 + 0.2 * abs(_normal(noise)),
        "loss/entropy": 1.2 - 0.005 * i + 0.02 * _normal(noise),
        "explained_variance": 0.8 * (1 - math.exp(-i / 10)) + 0.03 * _normal(noise),
        "grad_norm": 0.6 + 0.2 * abs(_normal(noise)),
        "mismatch_mean": 1e-7 * abs(_normal(noise)),
        "optimizer/lr_actor": 5e-5,
        "optimizer/lr_critic": 2e-4,
        "speed/env_steps_per_s": 800 + 30 * _normal(noise),
        "speed/decisions_per_s": 160 + 6 * _normal(noise),
        "advantage_std": 0.5 + 0.03 * _normal(noise),
    }


def make_rollouts(folder: Path) -> None:
    folder.mkdir()
    for number, (label, stage) in enumerate((("before", "improve"), ("after", "improve"))):
        for task, family in enumerate(FAMILIES):
            success = number == 1 or task == 0
            name = f"{label}_{task}"
            write_animation(folder / f"{name}.webp", _frames(task, success), 10, success)
            record = {"label": label, "stage": stage, "task_id": 1_000_000 + task, "family": family, "success": success}
            record |= {"instruction": f"{family}: the red cube", "steps": 12 + task, "return": 0.8, "video": f"{name}.webp"}
            (folder / f"{name}.json").write_text(json.dumps(record))


def _frames(task: int, success: bool) -> torch.Tensor:
    frames = torch.full((12, 96, 96, 3), 205, dtype=torch.uint8)
    frames[:, 62:82, 62:82] = torch.tensor([90, 140, 220], dtype=torch.uint8)
    for t in range(12):
        at = 8 + (5 if success else 2) * t
        frames[t, at : at + 16, at + task : at + task + 16] = torch.tensor([200, 60, 50], dtype=torch.uint8)
    return frames


def _normal(generator: torch.Generator) -> float:
    return float(torch.randn((), generator=generator))


def text_of(page: str) -> str:
    """What a reader sees: no tags, no scripts, entities resolved, spaces collapsed."""
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def data_of(page: str) -> str:
    """The JSON that the curves are drawn from."""
    found = re.search(r'id="data">(.*?)</script>', page, flags=re.S)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "synthetic")


@pytest.fixture(scope="module")
def page(run_dir):
    path = report.build(run_dir)
    assert path == run_dir / "report.html"
    return path.read_text(encoding="utf-8")


# ---------------------------------------------------------------- numbers


def test_the_headline_compares_the_last_stage_with_what_it_started_from(run_dir, page):
    summary = summarize(load(run_dir))
    assert summary.before is not None and summary.after is not None
    assert [m.title for m in summary.milestones] == ["before warm_start", "after warm_start", "after improve"]
    assert (summary.milestones[summary.before].title, summary.milestones[summary.after].title) == (
        "after warm_start",
        "after improve",
    )
    text = text_of(page)
    first, rate = (milestone.overall for milestone in summary.milestones[1:])
    assert first is not None and rate is not None
    low, high = wilson_interval(round(rate.success * 512), 512)
    assert f"{100 * rate.success:.1f} % success after improve 95 % interval {100 * low:.1f}–{100 * high:.1f} %" in text
    assert f"+{100 * (rate.success - first.success):.1f} percentage points" in text
    assert "policies.pi0:Pi0 · simulators.tabletop:Tabletop · mmrl.algorithms.sft:SFT · mmrl.algorithms.ppo:PPO · seed 0" in text
    assert "Not finished" not in text and "Not finite" not in text


def test_a_rate_says_what_its_episodes_earned_where_that_was_logged(tmp_path):
    run = make_run(tmp_path / "run", improve=1, evaluate=False, rollouts=False)
    writer = MetricsWriter(run, tensorboard=False, elapsed=1000.0)
    family = {"success": 0.25, "episodes": 8, "low": 0.1, "high": 0.5, "return": -171.5, "timeouts": 6, "failures": 0}
    writer.evaluation("improve", 1, "after", family | {"families": {"Pendulum-v1": family | {"return": -123.25, "timeouts": 0}}})
    writer.close()
    text = text_of(report.build(run).read_text())
    assert "n = 8 return -171.5 · 6 out of time" in text and "n = 8 return -123.2" in text
    assert text.count("out of time") == 1


def test_the_table_holds_each_family_with_its_wilson_interval(page):
    rows = re.findall(r"<tr>(.*?)</tr>", page, flags=re.S)
    sort_row = text_of(next(row for row in rows if "sort" in row))
    successes = round(128 * (0.92 - 0.04))
    low, high = wilson_interval(successes, 128)
    assert f"{100 * successes / 128:.1f} % {100 * low:.1f}–{100 * high:.1f} · n = 128" in sort_row
    assert "return" not in sort_row  # these rows, as old runs have them, know none
    before = round(128 * (0.42 - 0.04))
    assert sort_row.endswith(f"+{100 * (successes - before) / 128:.1f} points")
    assert all(any(family in row for row in rows) for family in (*FAMILIES, "all families"))


def test_an_evaluation_that_repeats_the_one_before_it_is_shown_once(tmp_path):
    ticking = Ticking(tmp_path)
    for stage, label, rate in (("a", "before", 0.1), ("a", "after", 0.4), ("b", "before", 0.4), ("b", "after", 0.4)):
        ticking.evaluate(stage, 0, label, rate)
    assert [m.title for m in summarize(load(tmp_path)).milestones] == ["before a", "after a", "after b"]


def test_an_evaluation_of_another_task_is_no_point_of_the_curve(tmp_path):
    ticking = Ticking(tmp_path)
    ticking.evaluate("a", 0, "after", 0.25)
    result = {"success": 0.75, "episodes": 8, "changed": ["evaluation.environment.domain=real"]}
    ticking.writer.evaluation("a", 0, "evaluate", result)
    (panel,) = chart_data(load(tmp_path).rows)["panels"]
    assert [point["kind"] for point in panel["points"]] == ["after"]


def test_rates_over_different_families_are_not_compared(tmp_path):
    ticking = Ticking(tmp_path)
    for stage, families in (("a", "xy"), ("b", "x"), ("c", "xy")):
        result = {name: {"success": len(families) / 4, "episodes": 8} for name in families}
        ticking.writer.evaluation(stage, 0, "after", {"success": 0.5, "episodes": 8, "families": result})
        summary = summarize(load(tmp_path))
        assert (summary.before, summary.after) == {"a": (None, 0), "b": (None, 1), "c": (0, 2)}[stage]
        if stage == "b":
            text = text_of(report.build(tmp_path).read_text())
            assert "No earlier evaluation covers the same families" in text and "percentage points" not in text


def test_time_goes_to_the_stage_and_phase_that_took_it():
    rows = [
        {"kind": "evaluation", "stage": "a", "seconds": 5.0, "seconds/evaluate": 4.0},
        {"kind": "train", "stage": "a", "seconds": 9.0, "seconds/update": 3.0},
        {"kind": "train", "stage": "b", "seconds": 19.0, "seconds/collect": 6.0, "seconds/update": math.nan},
        {"kind": "train", "stage": "b", "seconds": 25.0, "seconds/collect": 5.0, "seconds/save": 0.5},
    ]
    first, second = time_split(rows)
    assert (first.stage, first.total, first.phases) == ("a", 9.0, {"update": 3.0, "evaluate": 4.0, "other": 2.0})
    assert (second.stage, second.total, second.phases) == ("b", 16.0, {"collect": 11.0, "save": 0.5, "other": 4.5})


def test_smoothing_equals_a_naive_weighted_mean_and_starts_anew_with_a_stage():
    values: list[float | None] = [float(v) for v in torch.randn(100, generator=torch.Generator().manual_seed(1))]
    values[7] = None
    stages = ["a"] * 60 + ["b"] * 40
    smoothed = smooth(values, stages)
    keep = 1 - 1 / (0.4 * math.sqrt(99))
    for i in (0, 5, 7, 8, 59, 60, 99):
        known = [value for value in values[0 if i < 60 else 60 : i + 1] if value is not None]
        weights = [keep ** (len(known) - 1 - n) for n in range(len(known))]
        mean = sum(w * value for w, value in zip(weights, known, strict=True)) / sum(weights)
        assert smoothed[i] == (None if i == 7 else pytest.approx(mean))


def test_every_metric_lands_on_a_chart_and_known_ones_on_theirs(run_dir):
    panels = {panel["key"]: [s["name"] for s in panel["series"]] for panel in chart_data(load(run_dir).rows)["panels"]}
    assert panels == {
        "success": ["rollout/success"],
        "reward": ["rollout/return"],
        "policy_loss": ["loss/policy_loss"],
        "value_loss": ["loss/value_loss"],
        "loss": ["loss/flow_matching = loss/loss"],
        "kl": ["loss/approx_kl"],
        "clip": ["loss/clip_fraction"],
        "ratio": ["loss/ratio_max", "loss/ratio_min"],
        "entropy": ["loss/entropy"],
        "explained": ["explained_variance"],
        "grad": ["grad_norm"],
        "mismatch": ["mismatch_mean"],
        "lr": ["optimizer/lr_actor", "optimizer/lr_critic"],
        "speed": ["speed/env_steps_per_s"],
        "decisions": ["speed/decisions_per_s"],
        "other:advantage_std": ["advantage_std"],
    }


def test_long_runs_are_thinned_out_to_means(tmp_path):
    rows = [{"kind": "train", "stage": "a", "iteration": i, "step": i, "seconds": i, "x": float(i)} for i in range(2000)]
    data = chart_data(rows)
    (series,) = data["panels"][0]["series"]
    assert series["raw"][:3] == [1.5, 5.5, 9.5]
    assert len(series["raw"]) == len(data["axes"]["step"]) == len(data["stage"]) == 500
    assert data["axes"]["step"][:2] == [3, 7]


# ---------------------------------------------------------------- the page


class Inspector(HTMLParser):
    """Collects what could reach outside the page, images without a description, and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.unnamed = 0
        self.pictures = 0
        self.scripts = 0

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        links = [value for name, value in attrs if name in ("src", "href", "action", "srcset") and value]
        self.outside += [link for link in links if not link.startswith(("data:", "#"))]
        self.unnamed += tag == "img" and not values.get("alt")
        self.pictures += tag == "img"
        self.scripts += tag == "script"


def test_the_page_is_self_contained_and_every_picture_is_described(page):
    inspector = Inspector()
    inspector.feed(page)
    assert inspector.outside == []
    assert (inspector.pictures, inspector.unnamed, inspector.scripts) == (8, 0, 2)
    assert "default-src 'none'" in page
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)


def test_recordings_are_embedded_byte_for_byte(run_dir, page):
    embedded = {base64.b64decode(data) for data in re.findall(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", page)}
    assert embedded == {path.read_bytes() for path in (run_dir / "trajectories").glob("*.webp")}


def test_recordings_of_one_task_stand_side_by_side_in_the_order_of_the_run(run_dir):
    order = [(clip.family, clip.when) for clip in load(run_dir).recorded.clips]
    assert order == [(family, f"{label} improve") for family in sorted(FAMILIES) for label in ("before", "after")]


def test_texts_are_escaped_wherever_they_come_from(tmp_path):
    run = make_run(tmp_path / INJECTION.replace("/", "_"), improve=2)
    (record_path, *_) = sorted((run / "trajectories").glob("*.json"))
    hostile = {"instruction": INJECTION, "family": INJECTION, "label": INJECTION, "stage": INJECTION, "task_id": INJECTION}
    record_path.write_text(json.dumps(json.loads(record_path.read_text()) | hostile))
    (run / "config.yaml").write_text(f"stages:\n- {{name: {json.dumps(INJECTION)}, iterations: 3}}\n")
    (run / "environment.json").write_text(json.dumps({"hardware": {INJECTION: INJECTION}, "versions": {}, "started": INJECTION}))
    writer = MetricsWriter(run, tensorboard=False)
    writer.train(INJECTION, 0, {INJECTION: 1.0})
    family = {INJECTION: {"success": 1.0, "episodes": 2}}
    writer.evaluation(INJECTION, 0, "after", {"success": 1.0, "episodes": 2, "families": family})
    writer.close()
    page = report.build(run).read_text()
    inspector = Inspector()
    inspector.feed(page)
    assert inspector.scripts == 2 and "<b>push" not in page
    assert text_of(page).count(INJECTION) >= 10
    data = json.loads(data_of(page))
    assert INJECTION in data["stages"]


def test_an_unfinished_run_says_so_and_shows_what_there_is(tmp_path):
    text = text_of(report.build(make_run(tmp_path / "run", improve=7)).read_text())
    assert "Not finished. Stage improve has logged 7 of 60 iterations." in text
    assert "success after warm_start" in text and "success after improve" not in text


def test_a_run_without_evaluation_or_rollouts_shows_training_success(tmp_path):
    text = text_of(report.build(make_run(tmp_path / "run", evaluate=False, rollouts=False)).read_text())
    assert "success while training" in text and "the run has no evaluation" in text
    assert "Success by task family" not in text and "Rollouts" not in text


def test_a_run_that_has_only_just_begun(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    text = text_of(report.build(tmp_path).read_text())
    assert "Nothing has been logged yet." in text
    assert "Stage warm_start has logged 0 of 40 iterations." in text
    assert "environment.json is missing." in text


def test_an_evaluation_before_training_alone(tmp_path):
    ticking = Ticking(tmp_path)
    ticking.evaluate("improve", 0, "before", 0.5)
    text = text_of(report.build(tmp_path).read_text())
    assert "success before improve" in text and "there is no evaluation after training yet" in text


def test_numbers_that_are_not_finite_are_left_out_and_reported(tmp_path):
    run = make_run(tmp_path / "run", improve=3)
    writer = MetricsWriter(run, tensorboard=False)
    writer.train("improve", 3, {"loss/policy_loss": math.nan, "grad_norm": math.inf, "update/skipped": 2.0})
    nothing = {"success": math.nan, "episodes": 0}
    writer.evaluation("improve", 3, "after", nothing | {"families": {"reach": nothing}})
    writer.close()
    page = report.build(run).read_text()
    assert "Not finite: 4 logged numbers in 2 rows were NaN or infinite" in text_of(page)
    assert "Skipped: 2 updates had a loss or gradient that was not finite" in text_of(page)
    data = data_of(page)
    assert "NaN" not in data and "Infinity" not in data
    panel = next(panel for panel in json.loads(data)["panels"] if panel["key"] == "policy_loss")
    assert panel["series"][0]["raw"][-1] is None


def test_damaged_and_missing_files_become_sentences(tmp_path):
    run = make_run(tmp_path / "run", improve=3)
    (run / "environment.json").write_text('{"hardware": ')
    (run / "config.yaml").write_text("a: [")
    folder = run / "trajectories"
    (folder / "after_0.json").write_text("{")
    (folder / "after_1.webp").unlink()
    secret = json.loads((folder / "after_2.json").read_text()) | {"video": "../../outside.webp"}
    (folder / "after_2.json").write_text(json.dumps(secret))
    (tmp_path / "outside.webp").write_bytes(b"secret")
    page = report.build(run).read_text()
    text = text_of(page)
    for sentence in ("environment.json is damaged.", "config.yaml is damaged.", "1 recorded rollout could not be read."):
        assert sentence in text
    assert text.count("no recording") == 2
    assert base64.b64encode(b"secret").decode() not in page


def test_many_rollouts_are_thinned_out_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr("mmrl.report.recordings.MAX_CLIPS", 4)
    run = make_run(tmp_path / "run", improve=1)
    loaded = load(run)
    assert loaded.recorded.clips_left_out == 4 and len(loaded.recorded.clips) == 4
    # each (label, family, outcome) occurs once here, so the first four in order of their file names are shown
    assert {(clip.label, clip.family) for clip in loaded.recorded.clips} == {("after", family) for family in FAMILIES}
    assert "4 more in the run's folder" in text_of(report.build(run).read_text())


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(MMRLError, match=r"neither metrics\.jsonl nor config\.yaml"):
        report.build(tmp_path)


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / ".report.html.part").mkdir()
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(MMRLError, match=r"cannot write .*report\.html"):
        report.build(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"


# ---------------------------------------------------------------- in a browser


CHROMIUM = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
CHROMIUM += ("--disable-sync", "--no-first-run", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=4000", "--dump-dom")


def open_in_chromium(path: Path, profile: Path) -> tuple[str, list[str]]:
    """The page's document after its scripts ran, and the lines it wrote to the console (errors and violations among them)."""
    chromium = shutil.which("chromium")
    if chromium is None:
        missing = (
            "Chromium is not installed, so the report is not opened in a browser; install it with `apt-get install chromium`"
        )
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    command = [chromium, *CHROMIUM, f"--user-data-dir={profile}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_the_report_renders_in_a_browser_without_a_console_error(page, run_dir, tmp_path):
    dom, console = open_in_chromium(run_dir / "report.html", tmp_path / "profile")
    assert console == []
    assert len(re.findall(r'<path class="smooth"', dom)) == 18  # one curve a series, drawn or the script did not run
    assert len(re.findall(r'<circle class="point (?:before|during|after)" cx="[\d.]+" cy="[\d.]+"', dom)) >= 5
    assert "8 of 8 rollouts shown" in dom
    assert "NaN" not in re.sub(r"<script\b.*?</script>", "", dom, flags=re.S)


def test_a_hostile_text_runs_nothing_in_a_browser(tmp_path):
    run = make_run(tmp_path / "run", improve=1)
    record = next((run / "trajectories").glob("*.json"))
    attack = "<img src=x onerror=\"console.log('attacked')\"><script>console.log('attacked')</script>"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"instruction": attack}))
    _, console = open_in_chromium(report.build(run), tmp_path / "profile")
    assert console == []


def test_the_browser_check_sees_errors(tmp_path):
    broken = tmp_path / "broken.html"
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; script-src 'unsafe-inline'\">"
    broken.write_text(
        f"<!doctype html>{policy}<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='><script>undefinedFunction()</script>"
    )
    _, console = open_in_chromium(broken, tmp_path / "profile")
    assert any("undefinedFunction is not defined" in line for line in console)
    assert any("Content Security Policy" in line for line in console)
