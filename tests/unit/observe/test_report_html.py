"""report.html: its content, that no sample can break out of its place, and that a real browser shows it."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.core.errors import ConfigError, DataError, MissingInput
from orchestrator.core.reports import EvaluationReport, Sample, StepReport
from orchestrator.observe.jsonl import JsonlSink
from orchestrator.observe.report.html import write_report

HOSTILE = (
    '</pre></article><script>document.title="owned"</script><img src=x '
    "onerror=\"document.title='owned'\">&amp;\u2028\ud800"
)
URL = re.compile(
    r"""(?:src|href|action|poster)\s*=\s*["']?(?!data:)[^"'\s>]+|url\(|@import|https?://|//[a-z]+\."""
)


def metrics(step: int) -> dict[str, float]:
    fall = 0.7 / step
    rewards = {
        "rewards/chosen": 0.1 * step,
        "rewards/rejected": -0.2 * step,
        "rewards/accuracies": 0.5,
        "rewards/margins": 0.3 * step,
    }
    times = {"time/data": 0.01, "time/forward_backward": 1.5}
    other = {
        "logps/chosen": -10.0,
        "logps/rejected": -12.0,
        "grad_norm": 1.0,
        "learning_rate": 5e-6,
        "perf/tokens_per_s": 9000.0,
    }
    other["perf/goodput"] = 0.9
    return {
        "loss": fall,
        **rewards,
        **other,
        **times,
        "num_tokens": 1000 * step,
        "examples": 8 * step,
        "skipped": 0,
    }


def evaluation(step: int) -> EvaluationReport:
    pair = Sample(
        step,
        "pair",
        f"prompt of step {step} {HOSTILE}",
        chosen=HOSTILE,
        rejected="no",
        scores={"margin": -1.5},
    )
    answer = Sample(step, "generation", "2+2?", completion=HOSTILE, answer="4", scores={"correct": 0.0})
    return EvaluationReport(
        step, {"eval/loss": 1.0 / (step + 1), "eval/preference_accuracy": 0.5 + step / 100}, (pair, answer)
    )


def make_run(folder: Path, steps: int = 12) -> Path:
    sink = JsonlSink(folder, 0)
    sink.open(lambda message: None)
    sink.evaluation(evaluation(0))
    for step in range(1, steps + 1):
        sink.step(StepReport(step, metrics(step)))
    sink.evaluation(evaluation(steps))
    sink.close()
    recipe = "run: {name: my-run}\nmodel: {tiny: {architecture: llama}}\nalgorithm: {name: dpo}\n"
    (folder / "recipe.yaml").write_text(recipe)
    plan = {"arithmetic": "8 pairs = 2 workers × 1 micro-batch × 4 pairs", "total_steps": steps}
    plan |= {
        "choices": [{"name": "sync", "value": "no_sync", "reason": "one reduction per step"}],
        "memory": {"weights": 10, "total": 2e9},
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder


def chart_titles(page: str) -> list[str]:
    return re.findall(r"<h3>([^<]*)</h3>", page)


def test_the_page_has_its_parts_and_only_charts_with_data(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path)).read_text()
    titles = chart_titles(page)
    assert titles[:5] == ["Loss", "Reward accuracy", "Reward margin", "Rewards", "Log-probs"]
    assert titles[5:-2] == [
        "Gradient norm",
        "Learning rate",
        "Tokens per second",
        "Seconds per phase",
        "Goodput",
    ]
    assert titles[-2:] == ["Loss", "Preference accuracy, by reward"]
    questions = [
        "Before and after",
        "Is it learning?",
        "Is it stable?",
        "Is it fast?",
        "Is it healthy?",
        "Held-out evaluation",
    ]
    assert re.findall(r"<h2>([^<]*)</h2>", page)[:6] == questions
    assert "0 throughout: skipped steps." in page
    assert "<h1>my-run</h1>" in page
    assert "8 pairs = 2 workers &#215; 1 micro-batch" in page
    assert "12 of 12" in page
    assert "dpo &#183; random-weight llama" in page
    assert (
        "<td>preference_accuracy (by reward)</td><td>0.5</td><td>0.62</td><td class=soft>+0.12</td>" in page
    )
    assert "one reduction per step" in page


def test_only_samples_of_the_last_evaluation_are_shown(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path)).read_text()
    assert "prompt of step 12" in page
    assert "prompt of step 0" not in page
    assert "0 of 1 correct" in page


def test_alerts_are_shown_as_text(tmp_path: Path) -> None:
    assert "<h2>Alerts</h2>" not in write_report(make_run(tmp_path)).read_text()
    alert = {
        "title": "reward collapse",
        "text": "<b>it fell</b>",
        "level": "ERROR",
        "step": 7,
        "time": "2026-01-01T00:00:00+00:00",
    }
    (tmp_path / "alerts.jsonl").write_text(json.dumps(alert) + "\n")
    page = write_report(tmp_path).read_text()
    assert "<td>step 7</td><td>ERROR</td><td>reward collapse</td><td>&lt;b&gt;it fell&lt;/b&gt;</td>" in page


def test_no_sample_breaks_out_of_its_place(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path)).read_text()
    assert page.count("<script") == 1
    assert "<img" not in page
    assert "&lt;img src=x" in page
    assert page.isascii()


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path)).read_text()
    # what remains of the samples' own text is escaped and inert
    assert not URL.findall(re.sub(r"<pre.*?</pre>", "", page, flags=re.S))


def test_a_running_run_has_a_page(tmp_path: Path) -> None:
    make_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "los')
    page = write_report(tmp_path).read_text()
    assert "12 of 12" in page


def test_metrics_alone_are_enough(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": null, "skipped": 1}\n{"step": 2, "loss": 0.5, "skipped": 1}\n'
    )
    page = write_report(tmp_path).read_text()
    assert chart_titles(page) == ["Loss", "Skipped steps"]
    assert f"<h1>{tmp_path.name}</h1>" in page
    assert "skipped steps" in page


def test_a_run_without_steps_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert "none yet" in write_report(tmp_path).read_text()


def test_without_metrics_the_error_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"metrics\.jsonl is missing"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_damaged_plan_is_named(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(DataError, match=r"plan\.json cannot be read"):
        write_report(tmp_path)


def test_the_recipe_is_read_as_recipes_are(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "recipe.yaml").write_text("run: {name: off}\n")
    assert "<h1>off</h1>" in write_report(tmp_path).read_text(), "`off` is text, not a boolean"
    (tmp_path / "recipe.yaml").write_text("run: {name: a}\nrun: {name: b}\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml:2"):
        write_report(tmp_path)


def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if (path := shutil.which(name)) is not None:
            return path
    pytest.skip("no Chromium on this machine")


def dump_dom(page: Path, profile: Path) -> str:
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=2000",
    ]
    # every host name fails to resolve, so a page that needs one could not look right
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", page.as_uri()]
    return subprocess.run(
        [chromium(), *flags], capture_output=True, text=True, timeout=120, check=True
    ).stdout


PROBE = """<script>
const svg = document.querySelector("figure svg"), box = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width, clientY: box.top + 20}));
const seen = {
  charts: document.querySelectorAll("figure svg path.line").length,
  drawn: [...document.querySelectorAll("figure svg path.line")].every(p => p.getTotalLength() > 50),
  at: document.querySelector("figure .at").textContent,
  value: document.querySelector("figure .key b").textContent,
  wide: document.documentElement.scrollWidth <= window.innerWidth,
  loaded: performance.getEntriesByType("resource").map(e => e.name),
  inside: [...document.querySelectorAll("figure svg text")].every(t => {
    const b = t.getBBox(), v = t.ownerSVGElement.viewBox.baseVal;
    return b.x >= 0 && b.y >= 0 && b.x + b.width <= v.width && b.y + b.height <= v.height;
  }),
  images: document.images.length, scripts: document.scripts.length, title: document.title,
};
const out = document.createElement("output");
out.id = "probe"; out.textContent = JSON.stringify(seen);
document.body.append(out);
</script>"""


def test_a_browser_draws_the_charts_and_the_readout_follows_the_pointer(tmp_path: Path) -> None:
    report = write_report(make_run(tmp_path / "run"))
    probed = tmp_path / "probed.html"
    probed.write_text(report.read_text().replace("</body>", PROBE + "</body>"))
    dom = dump_dom(probed, tmp_path / "profile")
    output = re.search(r'<output id="probe">(.*?)</output>', dom)
    assert output is not None, dom[:2000]
    seen = json.loads(output.group(1))
    assert seen["charts"] == 15, "12 charts; rewards, log-probs and phases have two lines"
    assert seen["drawn"]
    assert (seen["at"], seen["value"]) == ("step 12", "0.05833")
    assert seen["wide"], "the page scrolls sideways"
    assert seen["inside"], "a label is cut off"
    assert (seen["loaded"], seen["images"], seen["scripts"], seen["title"]) == ([], 0, 2, "my-run")


def page_of(
    tmp_path: Path, steps: Sequence[dict], evaluations: Sequence[dict] = (), samples: Sequence[dict] = ()
) -> str:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in (*evaluations, *steps))
    )
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    return write_report(tmp_path).read_text()


def test_reward_components_and_sources_stand_beside_the_reward(tmp_path: Path) -> None:
    figures = {"reward/std": 0.1, "reward/no_signal_ratio": 0.5}
    parts = {"reward/brief": 0.5, "reward/right": 0.2, "reward/mean/easy": 0.7, "reward/mean/hard": 0.1}
    steps = [{"step": i, "reward/mean": 0.1 * i, **figures, **parts, "kl": 0.1} for i in (1, 2)]
    evaluations = [
        {"step": i, "eval/reward/mean": 0.5, "eval/reward/brief": 0.4, "eval/reward/right": 0.1}
        for i in (0, 2)
    ]
    titles = chart_titles(page_of(tmp_path, steps, evaluations))
    assert titles[:3] == ["Reward", "Reward components", "Reward per source"]
    assert titles[3:] == [
        "KL from the reference",
        "Spread of rewards",
        "Groups without a signal",
        "Reward",
        "Reward components",
    ]


def test_figures_of_each_source_stand_beside_those_of_all(tmp_path: Path) -> None:
    line = {
        f"{name}{source}": 0.5
        for name in ("loss", "rewards/accuracies", "rewards/margins")
        for source in ("", "/a", "/b")
    }
    titles = chart_titles(page_of(tmp_path, [{"step": i, **line} for i in (1, 2)]))
    pairs = [(name, f"{name} per source") for name in ("Loss", "Reward accuracy", "Reward margin")]
    assert titles == [title for pair in pairs for title in pair]


def test_the_page_says_what_pairs_are_ranked_by_and_what_is_not_known(tmp_path: Path) -> None:
    lines = [
        {"step": i, "eval/preference_accuracy": value, "eval/logp_accuracy": 0.5}
        for i, value in ((0, None), (2, 0.75))
    ]
    pair = {
        "step": 2,
        "kind": "pair",
        "prompt": "p",
        "chosen": "a",
        "rejected": "b",
        "scores": {"implicit_reward_margin": -0.5},
    }
    page = page_of(tmp_path, [], lines, [pair])
    assert "Most-wrong pairs by implicit reward" in page and "margin <b>-0.5</b>" in page
    cells = (
        "<td>preference_accuracy (by implicit reward)</td><td>&#8211;</td><td>0.75</td><td "
        "class=soft>&#8211;</td>"
    )
    assert cells in page


def test_a_run_of_an_earlier_version_claims_no_ranking(tmp_path: Path) -> None:
    pair = {
        "step": 2,
        "kind": "pair",
        "prompt": "p",
        "chosen": "a",
        "rejected": "b",
        "scores": {"margin": -0.5},
    }
    page = page_of(
        tmp_path,
        [],
        [{"step": 2, "eval/preference_accuracy": 0.5, "eval/logp_margin": 0.1, "eval/logps/chosen": -9.0}],
        [pair],
    )
    assert "<h2>Most-wrong pairs</h2>" in page and "<td>preference_accuracy</td>" in page
