import shutil
from contextlib import contextmanager

import pytest
from pages import write_results

from kvbind.experiments.report.command import make_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("plotly", reason="plotly is not installed")

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")

WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 375, "height": 812}

CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (one) => {
    const back = rgb(getComputedStyle(one).backgroundColor);
    return back.length < 4 || back[3] === 1 ? back : behind(one.parentElement);
  };
  const names = ["h1", ".lead", ".claim", ".rule", ".badge", "td", "thead th", "a", ".note", "summary", "label", "button"];
  return Object.fromEntries(names.map((name) => [name, Math.min(...[...document.querySelectorAll(name)].map((one) => {
    const [a, b] = [light(rgb(getComputedStyle(one).color)), light(behind(one))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }))]));
}"""
"""The least contrast of a text with what is behind it, by the WCAG's formula, by selector."""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_report([write_results(tmp_path_factory.mktemp("runs"))])


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as own:
        opened = own.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@contextmanager
def opened(browser, path, size=WIDE, **options):
    """The page, without a network; any complaint of the browser is an error."""
    context = browser.new_context(viewport=size, offline=True, **options)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")
    yield page
    assert said == []
    context.close()


@pytest.fixture
def page(browser, path):
    with opened(browser, path) as page:
        yield page


def explore(page):
    """Scroll to the explorer and wait until it is drawn."""
    page.locator("#explorer").scroll_into_view_if_needed()
    page.wait_for_selector("#loss .main-svg")
    return page


def drawn(page, *names):
    """What an element shows, as its pixels are."""
    page.wait_for_timeout(60)
    return {name: page.locator(f"#{name}").screenshot() for name in names}


def changed(page, act, *names):
    """Which elements show something else after an action."""
    before = drawn(page, *names)
    act()
    return {name for name, picture in drawn(page, *names).items() if picture != before[name]}


def test_every_chart_is_drawn(page):
    places = page.locator(".plot[data-chart]")
    assert places.count() == 2 + 2 + 2 + 2 + 3
    for i in range(places.count()):
        places.nth(i).scroll_into_view_if_needed()
        places.nth(i).locator(".main-svg").first.wait_for()
        marks = places.nth(i).locator(".scatterlayer path, .barlayer path")
        assert marks.count() > 0


def test_every_control_of_the_explorer_changes_the_picture(page):
    explore(page)
    everything = ("matrix", "reading", "points", "loss")
    assert page.locator("#model option").count() == 2 + 11
    assert page.locator("#model optgroup").count() == 2
    assert changed(page, lambda: page.select_option("#row", "1"), *everything) == set(everything)
    assert changed(page, lambda: page.select_option("#head", "1"), *everything) == set(everything)
    assert changed(page, lambda: page.locator("#query").fill("20"), *everything) == {"matrix", "reading", "points"}
    assert changed(page, lambda: page.check('[name="direction"][value="column"]'), *everything) == {"matrix", "reading"}
    assert changed(page, lambda: page.select_option("#model", "4"), *everything) == set(everything)
    # the layers of the tests' model are the same
    page.select_option("#model", "0")
    page.select_option("#layer", "1")
    assert page.locator("#layer").input_value() == "1"


def test_what_is_chosen_is_said_in_words(page):
    explore(page)
    page.locator("#query").fill("1")
    assert page.locator("#chosen").text_content() == "1 “</script><b>two”"
    page.locator(".tokens span").nth(40).click()
    assert page.locator("#chosen").text_content() == "40 “one”"
    assert page.locator("#query").input_value() == "40"
    assert "parallel form: no, update='all'" in page.locator("#spec").text_content()
    page.select_option("#row", "1")
    assert "parallel form: yes" in page.locator("#spec").text_content()
    page.select_option("#model", "1")
    assert page.locator("#row").input_value() == "1", "a choice that the other model has too is kept"
    page.locator("#reading canvas").first.click(position={"x": 5, "y": 5})
    assert page.locator("#chosen").text_content() == "0, a grey one, row 0, column 0"


def test_hovering_tells_a_weight_with_its_tokens_as_they_are(page):
    explore(page)
    page.locator("#matrix").scroll_into_view_if_needed()
    box = page.locator("#matrix .nsewdrag").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 1.5 / 64, box["y"] + box["height"] * 40.5 / 64)
    page.wait_for_selector("#matrix .hovertext")
    words = page.locator("#matrix .hovertext").text_content()
    assert "value of 1 “</script><b>two”" in words
    assert "output at 40" in words


def test_a_click_on_the_matrix_chooses_its_row(page):
    explore(page)
    page.locator("#matrix").scroll_into_view_if_needed()
    box = page.locator("#matrix .nsewdrag").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 3.5 / 64, box["y"] + box["height"] * 12.5 / 64)
    assert page.locator("#query").input_value() == "12"


def test_all_of_it_works_by_keyboard(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = set()
    explore(page)
    page.evaluate("document.activeElement.blur(); getSelection().removeAllRanges()")
    page.locator(".skip").focus()
    for _ in range(400):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.id || document.activeElement.name || document.activeElement.tagName")
        reached.add(name)
        if name == "direction":
            break
    # the layers and heads of the first model are several, so that no control is idle
    assert reached >= {"theme", "filter", "model", "row", "layer", "head", "query", "direction", "BUTTON", "SUMMARY", "A"}

    page.locator("#row").focus()
    assert changed(page, lambda: page.keyboard.press("ArrowDown"), "matrix") == {"matrix"}
    page.locator("#query").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert page.locator("#query").input_value() == "1"
    page.locator('[name="direction"][value="row"]').focus()
    assert changed(page, lambda: page.keyboard.press("ArrowRight"), "reading") == {"reading"}
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_a_legends_button_hides_a_line_in_all_charts_of_its_group(page):
    group = page.locator(".group", has_text="Training").first
    group.scroll_into_view_if_needed()
    group.locator(".main-svg").nth(1).wait_for()
    page.wait_for_timeout(100)
    lines = group.locator(".scatterlayer .trace")
    before = lines.count()
    button = group.locator(".legend button").nth(3)
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    assert lines.count() == before - 2
    page.keyboard.press("Enter")
    assert lines.count() == before


def test_a_charts_numbers_are_there_as_a_table(page):
    group = page.locator(".group", has_text="By steps").first
    group.locator("summary").click()
    group.locator("details table").first.wait_for()
    rows = group.locator("details table").first.locator("tbody tr")
    assert [row.inner_text().split() for row in rows.all()] == [["1", "-1"], ["2", "-2"], ["3", "-3"], ["4", "-4"]]


def test_claims_are_filtered_by_verdict(page):
    shown = page.locator("#claims li:visible")
    assert shown.count() == 3
    page.check('[name="filter"][value="no"]')
    assert [one.inner_text().split("\n")[0] for one in shown.all()] == ["does not hold"]
    assert page.locator("#claims .part:visible").count() == 1
    page.check('[name="filter"][value="all"]')
    assert shown.count() == 3


def test_texts_can_be_read_in_both_themes(page):
    for size in (WIDE, PHONE):
        page.set_viewport_size(size)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            back = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (back == "rgb(255, 255, 255)") == (scheme == "light")
            contrasts = page.evaluate(CONTRAST)
            assert {name: x for name, x in contrasts.items() if not 4.5 <= x <= 21} == {}, (size, scheme)


def test_the_theme_is_chosen_by_hand_and_kept(page):
    explore(page)
    ink = 'document.querySelector("#loss .xtick text").style.fill'
    light = page.evaluate(ink)
    assert changed(page, lambda: page.check('[name="theme"][value="dark"]'), "matrix", "points", "loss") == {
        "matrix",
        "points",
        "loss",
    }
    assert page.evaluate(ink) != light
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 27)"
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 27)"
    assert page.is_checked('[name="theme"][value="dark"]')


def test_a_phone_shows_everything_without_scrolling_sideways(browser, path):
    with opened(browser, path, PHONE, has_touch=True, is_mobile=True) as page:
        explore(page)
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        table = page.locator(".wide").first
        assert table.evaluate("(one) => one.scrollWidth > one.clientWidth"), "a wide table scrolls inside itself"
        assert min(page.locator("#controls select").nth(i).bounding_box()["height"] for i in range(4)) >= 44
        sizes = page.evaluate(
            "[...document.querySelectorAll('p, td, li, label')].map((x) => parseFloat(getComputedStyle(x).fontSize))"
        )
        assert min(sizes) >= 12
        for name in ("matrix", "reading", "points", "loss"):
            box = page.locator(f"#{name}").bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= PHONE["width"]


def test_motion_is_left_out_where_it_is_not_wanted(page):
    for wanted, behaviour in (("no-preference", "smooth"), ("reduce", "auto")):
        page.emulate_media(reduced_motion=wanted)
        assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == behaviour


def test_claims_and_tables_need_no_script(browser, path):
    context = browser.new_context(java_script_enabled=False, viewport=WIDE)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator("#claims li:visible").count() == 3
    assert page.locator("#tables tbody tr:visible").count() == 9
    context.close()
