"""The page of a report in a real browser: what is clicked, dragged and pressed does what it says, and nothing else.

Wants Debian's chromium and chromium-driver. Where they are missing these tests are skipped, but fail in continuous
integration (CI or SCALING_BROWSER is set), which must not pass for want of a browser.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_runs import bare_run, full_run, out_of_memory_run
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from scaling.report.__main__ import main

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
PAGES = ("full", "comparison", "oom", "bare", "hostile")
HOSTILE = "</script><img src=x onerror=alert(1)>{{data}}&amp;"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        wanted = "a browser is needed: apt-get install chromium chromium-driver"
        if os.environ.get("CI") or os.environ.get("SCALING_BROWSER"):
            pytest.fail(wanted)
        pytest.skip(wanted)
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        full_run(folder / "full"),
        full_run(folder / "zero2", seed=1, speed=0.9, spec={"backend": {"kind": "deepspeed", "zero_stage": 2}}),
        full_run(folder / "ddp", seed=2, speed=1.1, spec={"backend": {"kind": "ddp"}}),
    ]
    singles = {
        "full": runs[0],
        "oom": out_of_memory_run(folder / "oom"),
        "bare": bare_run(folder / "bare"),
        "hostile": full_run(folder / "hostile", spec={"name": HOSTILE}),
    }
    together = folder / "comparison.html"
    for run in singles.values():
        assert main([str(run)]) == 0
    assert main([*map(str, runs), "--html", str(together)]) == 0
    return {name: run / "report.html" for name, run in singles.items()} | {"comparison": together}


def show(browser: webdriver.Chrome, page: Path, width: int = 1280, scheme: str = "light") -> None:
    """Open a page that wide, in that colour scheme; what was logged before is gone."""
    media = {"media": "", "features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(page.as_uri())


def complaints(browser: webdriver.Chrome) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def requests(browser: webdriver.Chrome) -> list[str]:
    """Addresses that the browser asked for."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def plot(browser: webdriver.Chrome, chart: str = "loss"):
    found = browser.find_element(By.CSS_SELECTOR, f"#chart-{chart} .plot")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
    return found


def labels(browser: webdriver.Chrome, chart: str = "loss") -> list[str]:
    """Of both axes."""
    return [one.text for one in browser.find_elements(By.CSS_SELECTOR, f"#chart-{chart} .grid text")]


def drag(browser: webdriver.Chrome, chart: str, begin: int, end: int) -> None:
    """Pixels from the middle of the plot."""
    where = plot(browser, chart)
    actions = ActionChains(browser, duration=20).move_to_element_with_offset(where, begin, 0).click_and_hold()
    actions.move_to_element_with_offset(where, (begin + end) // 2, 5).move_to_element_with_offset(where, end, 0)
    actions.release().perform()


def domain(browser: webdriver.Chrome) -> list[float] | None:
    return browser.execute_script("return view.domain")


def test_an_axis_that_begins_just_below_nothing_says_nothing(browser, pages):
    show(browser, pages["full"])
    assert browser.execute_script("return steps(-0.6, 200, 4).map((tick) => Object.is(tick, -0))") == [False] * 3


@pytest.mark.parametrize("page", PAGES)
def test_a_page_loads_nothing_and_complains_of_nothing(browser, pages, page):
    show(browser, pages[page])
    assert requests(browser) == [pages[page].as_uri()]
    assert browser.find_elements(By.CSS_SELECTOR, "#chart-loss .line")
    assert complaints(browser) == []


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("width", [360, 390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(browser, pages, page, width, scheme):
    show(browser, pages[page], width, scheme)
    for script in ("", "for (const one of document.querySelectorAll('details')) one.open = true"):
        browser.execute_script(script)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    back = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(17, 18, 20)") == (scheme == "dark")
    assert complaints(browser) == []


def test_the_y_axis_turns_logarithmic_and_back(browser, pages):
    show(browser, pages["full"])
    before = labels(browser)
    button = browser.find_element(By.CSS_SELECTOR, "#chart-loss button.small")
    button.click()
    assert button.get_attribute("aria-pressed") == "true" and {"3", "5", "7"} <= set(labels(browser))
    assert not {"3", "5", "7"} & set(before)
    button.click()
    assert button.get_attribute("aria-pressed") == "false" and labels(browser) == before
    assert complaints(browser) == []


def test_the_x_axis_is_steps_time_or_tokens(browser, pages):
    show(browser, pages["full"])
    assert "100" in labels(browser)
    for axis, expected in (("time", "5 min"), ("tokens", "100M")):
        browser.find_element(By.CSS_SELECTOR, f"input[value={axis}] + span").click()
        assert expected in labels(browser) and "100" not in labels(browser)
    assert complaints(browser) == []


def test_without_times_of_day_the_axis_is_training_time_and_without_tokens_there_is_no_such_axis(browser, pages):
    show(browser, pages["bare"])
    assert [one.text for one in browser.find_elements(By.CSS_SELECTOR, ".segments label")] == ["steps", "training time"]


def test_dragging_zooms_all_charts_and_a_double_click_shows_all_again(browser, pages):
    show(browser, pages["full"])
    whole = labels(browser, "tokens")
    drag(browser, "loss", -100, 100)
    low, high = domain(browser)
    assert 100 < low < 200 < high < 300
    assert labels(browser, "tokens") != whole
    again = browser.find_element(By.ID, "reset")
    assert again.is_displayed()
    ActionChains(browser).double_click(plot(browser)).perform()
    assert domain(browser) is None and labels(browser, "tokens") == whole and not again.is_displayed()
    assert complaints(browser) == []


def test_a_click_is_no_zoom(browser, pages):
    show(browser, pages["full"])
    drag(browser, "loss", 0, 3)
    assert domain(browser) is None


def test_hovering_reads_values_and_marks(browser, pages):
    show(browser, pages["full"])
    where = plot(browser)
    at = browser.execute_script("return charts[0].at.x(250)")
    ActionChains(browser).move_to_element_with_offset(where, int(at - where.size["width"] / 2), 0).perform()
    told = browser.find_element(By.CSS_SELECTOR, "#chart-loss .tip").text
    assert "step 2" in told and "training" in told and "validation" in told and "smooth" in told
    assert "checkpoint" in told and "rollback" in told
    crosshairs = browser.find_elements(By.CSS_SELECTOR, ".cursor path")
    assert len(crosshairs) == len(browser.find_elements(By.CSS_SELECTOR, ".plot"))
    shown = [one for one in browser.find_elements(By.CSS_SELECTOR, ".tip") if one.is_displayed()]
    assert len(shown) == 1
    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
    assert not browser.find_elements(By.CSS_SELECTOR, ".cursor path")


def test_layers_of_time_are_read_with_their_shares(browser, pages):
    show(browser, pages["full"])
    ActionChains(browser).move_to_element(plot(browser, "time-parts")).perform()
    told = browser.find_element(By.CSS_SELECTOR, "#chart-time-parts .tip").text
    assert "backward" in told and " %" in told and "in all" in told


def test_the_keyboard_moves_the_cursor_and_zooms(browser, pages):
    show(browser, pages["full"])
    where = plot(browser)
    browser.execute_script("arguments[0].focus()", where)
    where.send_keys(Keys.ARROW_RIGHT)
    first = browser.execute_script("return view.x")
    where.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert browser.execute_script("return view.x") < first
    where.send_keys("+")
    low, high = domain(browser)
    assert high - low == pytest.approx(400 / 2)
    where.send_keys("0")
    assert domain(browser) is None and complaints(browser) == []


def test_two_fingers_zoom_and_one_reads(browser, pages):
    show(browser, pages["full"], 390)
    box = plot(browser).rect
    top = box["y"] - browser.execute_script("return scrollY") + box["height"] / 2

    def touch(kind: str, *places: float) -> None:
        points = [{"x": place, "y": top, "id": number} for number, place in enumerate(places)]
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", 200)
    touch("touchMove", 210)
    assert browser.find_element(By.CSS_SELECTOR, "#chart-loss .tip").is_displayed() and domain(browser) is None
    touch("touchEnd")
    assert browser.find_element(By.CSS_SELECTOR, "#chart-loss .tip").is_displayed()  # to be read without the finger
    touch("touchStart", 180, 220)
    touch("touchMove", 120, 280)
    touch("touchEnd")
    low, high = domain(browser)
    assert 1 < low < high < 400 and high - low < 200
    assert complaints(browser) == []


def test_a_curve_can_be_left_out(browser, pages):
    show(browser, pages["full"])
    button = browser.find_element(By.CSS_SELECTOR, "#chart-memory .toggle")
    drawn = len(browser.find_elements(By.CSS_SELECTOR, "#chart-memory .line"))
    button.send_keys(Keys.ENTER)
    assert button.get_attribute("aria-pressed") == "false"
    assert len(browser.find_elements(By.CSS_SELECTOR, "#chart-memory .line")) == drawn - 1


def test_marks_can_be_left_out(browser, pages):
    show(browser, pages["full"])
    kinds = ("restart", "checkpoint", "failed", "rollback", "refused")
    shown = {kind: len(browser.find_elements(By.CSS_SELECTOR, f"#chart-loss .marks .{kind}")) for kind in kinds}
    assert shown == {"restart": 1, "checkpoint": 7, "failed": 1, "rollback": 1, "refused": 1}
    browser.find_elements(By.CSS_SELECTOR, "#tools .marks button")[1].click()
    assert not browser.find_elements(By.CSS_SELECTOR, "#chart-loss .marks .checkpoint")


def test_smoothing_draws_a_mean_over_the_raw_curve(browser, pages):
    show(browser, pages["full"])
    slider = browser.find_element(By.ID, "smoothing")
    slider.send_keys(Keys.HOME)
    assert "off" in browser.find_element(By.CSS_SELECTOR, ".smoothing").text
    assert not browser.find_elements(By.CSS_SELECTOR, "#chart-loss .raw")
    slider.send_keys(Keys.END)
    assert "half-life" in browser.find_element(By.CSS_SELECTOR, ".smoothing").text
    assert len(browser.find_elements(By.CSS_SELECTOR, "#chart-loss .raw")) == 1
    assert browser.execute_script("return view.halfLife") == pytest.approx(100, rel=0.01)
    assert complaints(browser) == []


def test_a_comparison_toggles_runs_in_all_charts(browser, pages):
    show(browser, pages["comparison"])
    assert browser.execute_script("return charts.map((chart) => chart.shown().length)")[0] == 6
    browser.find_element(By.CSS_SELECTOR, "#tools .legend button").click()
    for chart in ("loss", "grad-norm", "memory"):
        assert len(browser.find_elements(By.CSS_SELECTOR, f"#chart-{chart} .line")) == 2
    assert complaints(browser) == []


def test_what_a_run_says_is_text_and_nothing_else(browser, pages):
    show(browser, pages["hostile"])
    assert browser.title == HOSTILE and browser.find_element(By.TAG_NAME, "h1").text == HOSTILE
    assert not browser.find_elements(By.TAG_NAME, "img")
    show(browser, pages["oom"])
    assert "</script><img src=x> <!--" in browser.find_element(By.CSS_SELECTOR, "#oom .quote").text
    assert not browser.find_elements(By.TAG_NAME, "img") and complaints(browser) == []


def test_defaults_are_dimmed_in_the_spec(browser, pages):
    show(browser, pages["full"])
    browser.find_element(By.CSS_SELECTOR, "#configuration summary").click()
    dim = [one.text for one in browser.find_elements(By.CSS_SELECTOR, "#configuration .key.dim")]
    assert '"memory_snapshot"' in dim and '"warmup_steps"' not in dim


def test_every_chart_is_drawn_for_paper(browser, pages):
    show(browser, pages["full"])
    assert browser.execute_script("""
        dispatchEvent(new Event("beforeprint"));
        const widths = charts.map((chart) => chart.host.querySelector("svg").viewBox.baseVal.width);
        dispatchEvent(new Event("afterprint"));
        return [...new Set(widths)]""") == [680]
    assert len(browser.print_page()) > 10_000
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": []})
    hidden = [*browser.find_elements(By.CSS_SELECTOR, "details"), browser.find_element(By.ID, "tools")]
    assert hidden and not any(one.is_displayed() for one in hidden)
    assert complaints(browser) == []


def test_charts_follow_the_width_of_the_window(browser, pages):
    show(browser, pages["full"])
    size = {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    widths = "return charts.map((chart) => chart.host.querySelector('svg').clientWidth - chart.host.clientWidth)"
    assert browser.execute_async_script(f"setTimeout((done) => done((() => {{ {widths} }})()), 200, arguments[0])") == [
        0
    ] * len(browser.find_elements(By.CSS_SELECTOR, ".plot"))
