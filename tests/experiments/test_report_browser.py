import shutil
from contextlib import contextmanager

import pytest
from pages import write_results, write_run

from kvbind.experiments.report.command import make_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")

WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 812}

CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (one) => {
    const back = rgb(getComputedStyle(one).backgroundColor);
    return back.length < 4 || back[3] === 1 ? back : behind(one.parentElement);
  };
  const names = ["h1", ".lead", ".claim", ".badge", "td", "thead th", "a", ".note", "summary", "label", "dd", "pre"];
  return Object.fromEntries(names.map((name) => [name, Math.min(...[...document.querySelectorAll(name)].map((one) => {
    const [a, b] = [light(rgb(getComputedStyle(one).color)), light(behind(one))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }))]));
}"""
"""The least contrast of a text with what is behind it, by the WCAG's formula, by selector."""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = write_results(tmp_path_factory.mktemp("runs"))
    write_run(folder / "mine")
    return make_report([folder])


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
    """Scroll to the explorer."""
    page.locator("#explorer").scroll_into_view_if_needed()
    page.wait_for_selector("#loss .chart")
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


SEEN = """() => [...document.querySelectorAll(".chart")].map((chart) => {
  const box = chart.getBoundingClientRect();
  const marks = [...chart.querySelectorAll(".s path, .s circle, .s rect, .line, circle")];
  return box.width > 100 && box.height > 60 && marks.some((one) => one.getBoundingClientRect().width > 0);
})"""
"""Of every chart, whether it has a size and marks in it."""


def test_every_chart_is_drawn(page):
    for details in page.locator("details.more").all():
        details.locator("> summary").click()
    seen = page.evaluate(SEEN)
    # on top 2, in the table 2 + 2 + 2 + 2, in the figure 3, of the run 5, in the explorer 3
    assert len(seen) == 2 + 8 + 3 + 5 + 3
    assert all(seen)


def test_texts_of_charts_do_not_overlap_their_rows_names(page):
    over = page.evaluate("""() => [...document.querySelectorAll(".chart")].filter((chart) => {
      const names = [...chart.querySelectorAll(":scope > text[text-anchor=end]:not([class])")];
      return names.some((name) => name.getBoundingClientRect().left < chart.getBoundingClientRect().left - 1);
    }).length""")
    assert over == 0


def test_paper_shows_every_chart_and_no_control(browser, path, tmp_path):
    with opened(browser, path) as page:
        page.check('[name="theme"][value="dark"]')
        page.emulate_media(media="print")
        seen = page.evaluate(SEEN)
        assert len(seen) == 21
        assert all(seen)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.locator(":is(input, select):visible").count() == 0
        page.pdf(path=tmp_path / "page.pdf")
        assert (tmp_path / "page.pdf").stat().st_size > 50_000


def test_every_control_of_the_explorer_changes_the_picture(page):
    explore(page)
    everything = ("matrix", "reading", "points", "loss")
    assert page.locator("#model option").count() > 2 + 20
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


def cell(page, row, column):
    """The place of a cell of the matrix, of 64 rows."""
    page.locator("#matrix").scroll_into_view_if_needed()
    box = page.locator("#matrix canvas").bounding_box()
    return box["x"] + box["width"] * (column + 0.5) / 64, box["y"] + box["height"] * (row + 0.5) / 64


def test_pointing_tells_a_weight_with_its_tokens_as_they_are(page):
    explore(page)
    page.mouse.move(*cell(page, 40, 1))
    words = page.locator("#pointed").text_content()
    assert "value of 1 “</script><b>two”" in words
    assert "Output at 40" in words


def test_a_click_on_the_matrix_chooses_its_row(page):
    explore(page)
    page.mouse.click(*cell(page, 12, 3))
    assert page.locator("#query").input_value() == "12"


def test_the_choice_is_in_the_address_and_comes_back_from_it(page, browser, path):
    explore(page)
    page.select_option("#model", "1")
    page.select_option("#row", "1")
    page.select_option("#layer", "1")
    page.check('[name="direction"][value="column"]')
    page.locator("#query").fill("7")
    address = page.url
    assert "model=a+picture" in address
    assert "token=7" in address
    with opened(browser, path) as other:
        other.goto("about:blank")
        other.goto(address)
        other.wait_for_selector("html[data-ready]")
        chosen = [other.locator(f"#{name}").input_value() for name in ("model", "row", "layer", "head", "query")]
        assert chosen == ["1", "1", "1", "0", "7"]
        assert other.is_checked('[name="direction"][value="column"]')
        other.wait_for_function("document.querySelector('#explorer').getBoundingClientRect().top < innerHeight")
        other.evaluate("location.hash = 'model=a+text&row=rung0&layer=layer+0&head=head+1&token=3&show=row'")
        other.wait_for_function("document.querySelector('#query').value === '3'")
        assert other.locator("#model").input_value() == "0"


@pytest.mark.parametrize("words", ["model=none&token=x", "model=a+text&row=&layer=9&token=99999&show=sideways", "model="])
def test_an_address_that_names_nothing_there_is_shows_something(browser, path, words):
    with opened(browser, path) as page:
        page.goto("about:blank")
        page.goto(f"{path.as_uri()}#{words}")
        page.wait_for_selector("html[data-ready]")
        assert page.locator("#chosen").text_content()


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
    assert reached >= {"theme", "filter", "model", "row", "layer", "head", "query", "direction", "INPUT", "SUMMARY", "A"}

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


def test_a_legends_box_hides_a_line_in_all_charts_of_its_group(page):
    group = page.locator('#table2-language .group[aria-label="Training"]')
    page.locator("#table2-language details.more").nth(1).locator("> summary").click()
    drawn = "(group) => [...group.querySelectorAll('.s')].filter((one) => getComputedStyle(one).display !== 'none').length"
    before = group.evaluate(drawn)
    box = group.locator(".legend input").nth(3)
    box.focus()
    page.keyboard.press("Space")
    assert not box.is_checked()
    assert group.evaluate(drawn) == before - 2
    page.keyboard.press("Space")
    assert group.evaluate(drawn) == before


def test_a_charts_numbers_are_there_as_a_table(page):
    group = page.locator('.group[aria-label="By steps"]')
    group.locator("summary").click()
    rows = group.locator("details table").first.locator("tbody tr")
    assert [row.inner_text().split() for row in rows.all()] == [["1", "-1"], ["2", "-2"], ["3", "-3"], ["4", "-4"]]


def test_claims_are_filtered_by_verdict(page):
    shown = page.locator(".claims > li:visible")
    assert shown.count() == 3
    page.check('[name="filter"][value="no"]')
    assert [one.inner_text().split("\n")[0] for one in shown.all()] == ["does not hold"]
    assert page.locator(".section:visible").count() == 1
    assert page.locator(":is(.evidence, .chart):visible").count() == 0
    page.check('[name="filter"][value="claims"]')
    assert shown.count() == 3
    page.check('[name="filter"][value="all"]')
    assert page.locator("#explorer").is_visible()


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
    ink = 'getComputedStyle(document.querySelector("#loss text")).fill'
    light = page.evaluate(ink)
    parts = ("matrix", "points", "loss", "reading")
    assert changed(page, lambda: page.check('[name="theme"][value="dark"]'), *parts) == set(parts)
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
        table = page.locator("#tables .wide").first
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


def test_all_but_the_explorer_needs_no_script(browser, path):
    context = browser.new_context(java_script_enabled=False, viewport=WIDE)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator(".claims > li:visible").count() == 3
    assert page.locator("#tables .wide").first.locator("tbody tr:visible").count() == 9
    # folded groups aside
    assert page.locator(".chart:visible").count() == 2 + 2 + 3 + 2
    assert page.locator("#explorer noscript").is_visible()
    page.check('[name="filter"][value="yes"]')
    assert page.locator(".claims > li:visible").count() == 1
    context.close()
