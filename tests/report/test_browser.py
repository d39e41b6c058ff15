"""The page in a real browser: Debian's chromium, headless, through Playwright; skipped where it is not installed."""

import http.server
import json
import shutil
import threading

import pytest

from prime_lightning.report import credit_view, write_report
from prime_lightning.report.runs import read_run
from report.lines import HOSTILE, row, write_rollouts

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens files; at the end of the test nothing may have gone wrong, and nothing may have left the page."""
    pages, wrong = [], []

    def open_page(path, **options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append("dialog"), dialog.dismiss()))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else wrong.append(r.url))
        page.goto(path.as_uri())
        pages.append(context)
        return page

    yield open_page
    for context in pages:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def report(run_folder, tmp_path_factory):
    return write_report([run_folder], tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def lines(run_folder):
    return [json.loads(line) for line in (run_folder / "rollouts.jsonl").open()]


def rows_of_tip(page):
    terms, values = (page.locator(f"#tip {tag}").all_text_contents() for tag in ("dt", "dd"))
    return dict(zip(terms, values, strict=True))


def number(text):
    return float(text.replace("\N{MINUS SIGN}", "-").replace("+", ""))


def test_it_draws_and_switches_axis_and_theme(opened, report, tmp_path):
    page = opened(report, color_scheme="light")
    headings = page.locator("section:visible h2").all_text_contents()
    assert headings[:3] == ["Runs", "Learning", "Credit, token by token"]
    assert {"Process reward model", "Policy", "Rollouts", "Time per phase"} <= set(headings)
    figures = page.locator("figure:visible").count()
    assert figures > 10
    assert page.locator("figure:visible .main-svg").count() >= figures
    assert page.locator(".xtitle").first.text_content() == "iteration"
    page.get_by_label("tokens", exact=True).check(force=True)
    assert page.locator(".xtitle").first.text_content() == "tokens sampled"
    colours = [page.evaluate("getComputedStyle(document.body).backgroundColor")]
    page.screenshot(path=tmp_path / "light.png")
    page.get_by_role("button", name="Dark").click()
    colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    page.emulate_media(media="print")
    assert not page.locator("#controls").is_visible()
    dark = opened(report, color_scheme="dark")
    assert colours == ["rgb(251, 251, 250)", dark.evaluate("getComputedStyle(document.body).backgroundColor")]


def test_the_slider_the_filters_and_the_colours(opened, report, lines):
    page = opened(report)
    slider = page.locator("#iteration")
    assert page.locator("#iteration-value").text_content() == "3 of 3"
    slider.focus()
    for _ in range(3):
        slider.press("ArrowLeft")
    assert page.locator("#iteration-value").text_content() == "0 of 3"
    first = [line for line in lines if line["iteration"] == 0]
    assert page.locator("#shown").text_content() == f"{len(first)} answers to 4 prompts"
    assert page.locator(".prompt").all_text_contents() == list(dict.fromkeys(line["prompt"] for line in first))
    slider.press("End")
    last = [line for line in lines if line["iteration"] == 3]
    for outcome in ("correct", "wrong"):
        page.locator("#outcome").select_option(outcome)
        count = sum(line["verdict"] == outcome for line in last)
        assert page.locator("#shown").text_content().startswith(f"{count} answers") or not count
    page.locator("#outcome").select_option("all")
    page.locator("#search").fill(last[0]["prompt"])
    assert set(page.locator(".prompt").all_text_contents()) == {last[0]["prompt"]}
    page.locator("#search").fill("no such prompt")
    assert page.locator("#shown").text_content() == "No answer of this iteration passes the filters."
    page.locator("#search").fill("")
    page.locator("#shortest").fill("9999")
    assert page.locator(".token").count() == 0
    page.locator("#shortest").fill("")
    bad = sum(not right for line in last for _, _, right in line["steps"])
    assert (page.locator(".token.bad.first").count() > 0) == (bad > 0)


def test_values_on_hover_and_by_keyboard(opened, report, lines):
    page = opened(report)
    last = [line for line in lines if line["iteration"] == 3]
    answer = page.locator(".tokens").first
    tokens = [t.text_content() for t in answer.locator(".token").all()]
    line = next(
        x for x in last if x["tokens"] == tokens and x["prompt"] == page.locator(".prompt").first.text_content()
    )
    token = answer.locator(".token").nth(2)
    token.hover()
    values = rows_of_tip(page)
    assert number(values["process reward"]) == pytest.approx(line["process_reward"][2], rel=0.01)
    assert number(values["suffix return"]) == pytest.approx(sum(line["process_reward"][2:]), rel=0.05, abs=1e-4)
    assert number(values["advantage"]) == pytest.approx(line["advantage"][2], rel=0.01)
    ratio = line["process_reward"][2] * line["scale"] / line["beta"]
    assert number(values["PRM log-ratio (nats)"]) == pytest.approx(ratio, rel=0.02)
    answer.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert f"token 2 of {len(tokens)}" in focused
    assert "process reward" in focused
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()
    for name in ("suffix return", "advantage"):
        page.get_by_label(name, exact=True).check(force=True)
        assert page.locator("#scale-name").text_content().startswith(name)


def test_a_phone_scrolls_in_one_direction(opened, report):
    page = opened(report, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = [side.bounding_box() for side in page.locator(".sides").first.locator("> div").all()]
    assert boxes[0]["y"] < boxes[1]["y"]


OVERHANG = """() => Math.max(...[...document.querySelectorAll("figure .main-svg")].map((svg) =>
    svg.getBoundingClientRect().right - svg.closest("figure").getBoundingClientRect().right))"""


def test_plots_fit_a_narrower_window_and_paper(opened, report):
    page = opened(report)
    assert page.evaluate(OVERHANG) < 0
    page.set_viewport_size({"width": 700, "height": 900})
    page.wait_for_timeout(600)
    assert page.evaluate(OVERHANG) < 0
    page.set_viewport_size({"width": 1280, "height": 900})
    folded = page.locator("details[open]").count()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert page.evaluate(OVERHANG) < 0
    assert (
        page.evaluate("Math.max(...[...document.querySelectorAll('main section *')].map((e) => e.offsetWidth ?? 0))")
        <= 700
    )
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == folded


def test_curves_are_read_by_keyboard(opened, report, run_folder):
    page = opened(report)
    values = [row["rollout/accuracy"] for row in read_run(run_folder).rows.values()]
    figure = page.locator("figure", has=page.get_by_text("rollout/accuracy", exact=True)).first
    plot = figure.locator(".plot")
    plot.focus()
    for key, i in (("ArrowRight", 0), ("ArrowRight", 1), ("End", 3), ("ArrowLeft", 2), ("Home", 0)):
        plot.press(key)
        said = page.locator("#spoken").text_content()
        assert said.startswith(f"iteration {i}: ")
        assert float(said.split()[-1]) == pytest.approx(values[i], rel=0.01)
    assert figure.locator(".hovertext").count() == 1
    plot.press("Escape")
    assert figure.locator(".hovertext").count() == 0
    label = plot.get_attribute("aria-label")
    assert label.startswith("Right answers, training rollouts. tiny-seed0: ")


def test_a_reload_keeps_what_the_reader_chose(opened, report):
    """`--watch` loads the page again and again."""
    page = opened(report)
    page.locator("#iteration").focus()
    page.locator("#iteration").press("Home")
    page.locator("#outcome").select_option("wrong")
    page.locator("#longest").fill("99")
    page.get_by_label("advantage", exact=True).check(force=True)
    page.get_by_label("wall time", exact=True).check(force=True)
    page.get_by_role("button", name="Dark").click()
    page.locator("#rollouts summary").click()
    page.locator("#rollouts").scroll_into_view_if_needed()
    before = page.evaluate("scrollY")
    assert before > 500
    page.reload()
    assert page.locator("#iteration-value").text_content() == "0 of 3"
    assert [page.locator(f"#{name}").input_value() for name in ("outcome", "longest", "search")] == ["wrong", "99", ""]
    assert page.locator("#scale-name").text_content().startswith("advantage")
    assert page.locator(".xtitle").first.text_content() == "seconds"
    assert page.locator("html").get_attribute("data-theme") == "dark"
    assert page.locator("#rollouts details").get_attribute("open") is not None
    assert page.evaluate("scrollY") == pytest.approx(before, abs=30)


def test_a_page_that_loads_itself_again_stays_where_it_is(opened, run_folder, tmp_path):
    page = opened(write_report([run_folder], tmp_path / "live.html", reload=2))
    with page.expect_event("load"):
        page.evaluate("scrollTo(0, 800)")
    assert page.evaluate("scrollY") == 800
    assert page.locator("#iteration-value").text_content() == "3 of 3"


def test_hostile_text_is_text(opened, hostile_folder, tmp_path):
    page = opened(write_report([hostile_folder], tmp_path / "hostile.html"))
    assert page.evaluate("window.pwned") is None
    page.locator("#more").click()
    assert page.locator(".group").count() == len(HOSTILE)
    shown = page.locator(".prompt").all_text_contents()
    assert shown[:2] == HOSTILE[:2]
    assert shown[3] == "␛[31mred␛[0m ␛]0;title␇"
    assert shown[4] == "⟨U+D800⟩ lone ⟨U+DFFF⟩"
    assert shown[5].startswith("⟨U+202E⟩right to left⟨U+202C⟩")
    page.locator(".token").nth(0).hover()
    assert "</script>" in page.locator("#tip").text_content()
    assert page.locator("main img, main a[href^=javascript], main script").count() == 0
    for script in page.locator("details").all():
        script.locator("summary").click()
    assert page.evaluate("window.pwned") is None


ATTACK = """async (url) => {
    const script = document.createElement("script");
    script.textContent = "window.pwned = 1";
    document.body.append(script);
    document.body.insertAdjacentHTML("beforeend", `<img src="${url}image"><b onclick="window.pwned = 1">x</b>`);
    document.body.lastChild.click();
    return fetch(url + "fetch").then(() => "fetched", () => "refused");
}"""


def test_the_policy_forbids_network_and_foreign_scripts(browser, report):
    """Even to a script that got in: the server next door is not asked, inserted code does not run."""
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)

    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = browser.new_page()
    page.goto(report.as_uri())
    assert page.evaluate(ATTACK, f"http://127.0.0.1:{server.server_port}/") == "refused"
    assert page.evaluate("window.pwned") is None
    page.close()
    server.shutdown()
    assert asked == []


def test_the_frame_of_a_notebook_works(opened, run_folder, tmp_path):
    (tmp_path / "notebook.html").write_text(f"<!doctype html>{credit_view(run_folder)._repr_html_()}")
    frame = opened(tmp_path / "notebook.html").frame_locator("iframe")
    assert frame.locator(".token").count() > 0
    frame.locator("#iteration").press("Home")
    assert frame.locator("#iteration-value").text_content() == "0 of 3"


@pytest.mark.parametrize("metrics", ["", "loss,step\n1,0\n2,1\n"])
def test_a_run_without_rollouts_is_no_blank_page(opened, tmp_path, metrics):
    folder = write_rollouts(tmp_path / "run", [])
    if metrics:
        (folder / "metrics.csv").write_text(metrics)
    page = opened(write_report([folder], tmp_path / "report.html"))
    assert "rollouts.jsonl has no rollouts (yet)" in page.locator("#notes").text_content()
    assert page.locator("#runs-table tbody tr").count() == 1
    assert not page.locator("#credit").is_visible()
    assert page.locator("figure:visible").count() == bool(metrics)


def test_several_runs_benchmarks_and_outcome_only(opened, tmp_path):
    folders = []
    for name, seed, beta in (("prime-seed0", 0, 1), ("prime-seed1", 1, 1), ("rloo", 0, 0)):
        folder = write_rollouts(tmp_path / name, [{k: v for k, v in row().items() if k != "process_reward"}])
        (folder / "metrics.csv").write_text("loss,step\n1,0\n2,1\n4,2\n")
        (folder / "config.yaml").write_text(f"seed_everything: {seed}\nmodel: {{beta: {beta}}}\n")
        benchmark = {"benchmark": "gsm8k", "problems": 8, "samples": 1, "seconds": 1.0}
        results = [
            {"iteration": i, "metrics": {"pass1": i / 8}, "interval": {"pass1": [i / 16, i / 4]}} for i in (0, 3)
        ]
        (folder / "benchmarks.jsonl").write_text("".join(json.dumps(benchmark | r) + "\n" for r in results))
        folders.append(folder)
    page = opened(write_report(folders, tmp_path / "report.html"))
    cells = page.locator("#benchmarks-table tbody tr").first.locator("td").all_text_contents()
    assert cells == [
        "prime-seed0",
        "gsm8k",
        "pass1",
        "8",
        "1",
        "0 [0, 0] (iteration 0)",
        "0.375 [0.188, 0.75] (iteration 3)",
    ]
    assert page.locator("#runs-table th").last.text_content() == "model.beta"
    assert page.locator("#other .scatterlayer path.js-fill").count() == 1  # the band of the two seeds
    assert page.locator("#measure label").all_text_contents() == ["advantage"]
    assert page.locator("#benchmarks .errorbar").count() == 6
