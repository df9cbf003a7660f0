"""The page of a report and its server: they show what they were made of, and nothing that a name in it may ask for."""

import base64
import gzip
import hashlib
import http.client
import json
import re
import threading
import tracemalloc
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from experiments.pages import figure1, table2, write_run
from kvbind.experiments.report import command
from kvbind.experiments.report.checks import read_model
from kvbind.experiments.report.command import make_report, open_server
from kvbind.experiments.report.page import find_parts

PNG = b"\x89PNG\r\n\x1a\n"

SECRET = "nobody may read this"


@contextmanager
def serving(path, **options):
    server, address = open_server(path, 0, **options)
    with server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield (
                lambda path, method="GET", **headers: ask(server.server_port, path, method, headers),
                urlsplit(address).path,
            )
        finally:
            server.shutdown()


def ask(port, path, method, headers):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.putrequest(method, path, skip_host=True)
    for name, value in {"Host": f"localhost:{port}", **headers}.items():
        for one in value if isinstance(value, list) else [value]:
            connection.putheader(name, one)
    connection.endheaders()
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content, answer.headers


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))


def write_few(folder):
    for name, results in {"table 2": table2(), "deeper/figure": figure1()}.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module", autouse=True)
def no_untrained_models():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "untrained_models", list)
        yield


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    (home / "secret.txt").write_text(SECRET)
    runs = home / "runs"
    write_few(runs)
    (runs / ".git").mkdir()
    (runs / ".git" / "config").write_text(SECRET)
    (runs / "notes.json").write_text(SECRET)
    (runs / "results.json").write_text(json.dumps({"overview": SECRET}))
    (runs / "link").symlink_to(home)
    return make_report([runs])


def links(page):
    hrefs = [attrs["href"] for tag, attrs in Elements(page.read_text()).elements if tag == "a" and "href" in attrs]
    return [href for href in hrefs if not href.startswith("#")]


def test_the_page_and_the_results_it_links_to_are_served(page):
    with serving(page) as (get, address):
        status, content, headers = get(address)
        assert (status, content) == (200, page.read_bytes())
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        assert len(links(page)) == 2
        for href in links(page):
            status, content, headers = get(f"/{href.removeprefix('./')}")
            assert (status, content) == (200, (page.parent / unquote(href)).read_bytes())
            assert headers["Content-Type"] == "application/json"
        assert get("/")[0] == 302
        assert get("/")[2]["Location"] == address
        status, content, headers = get(address, "HEAD")
        assert (status, content, int(headers["Content-Length"])) == (200, b"", page.stat().st_size)


@pytest.mark.parametrize(
    "path",
    [
        "/results.json", "/notes.json", "/.git/config", "/.git/", "/link/secret.txt", "/../secret.txt", "/%2e%2e/secret.txt",
        "/..%2fsecret.txt", "/%2e%2e%2fsecret.txt", "/x/..%5c..%5csecret.txt", "//etc/passwd", "/%2fetc/passwd",
        "/report.html/", "/report.html%00", "/deeper", "/deeper/", "http://localhost/report.html", "*",
        "/report%2ehtml%2f..%2fnotes.json",
    ],
)  # fmt: skip
def test_nothing_else_is(page, path):
    with serving(page) as (get, _):
        status, content, headers = get(path)
        assert status == 404
        assert SECRET.encode() not in content
        assert path.encode() not in content
        assert headers["Content-Type"].startswith("text/plain")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "PROPFIND"])
def test_nothing_but_reading_is_allowed(page, method):
    with serving(page) as (get, address):
        status, _, headers = get(address, method)
        assert status == 405
        assert headers["Allow"] == "GET, HEAD"


HOSTS = {
    "localhost": True, "localhost:99": True, "LOCALHOST": True, "127.0.0.1:8000": True, "[::1]:8000": True, "[::1]": True,
    "evil.example": False, "localhost.evil.example": False, "127.0.0.1.evil.example": False, "user@localhost": False,
    "localhost:8000:1": False, "": False, "0.0.0.0": False, "localhost/x": False, "::1": False, "proxy.example": False,
}  # fmt: skip


def test_a_name_that_was_bound_to_this_address_is_refused(page):
    with serving(page) as (get, address):
        for host, allowed in HOSTS.items():
            assert (get(address, Host=host)[0] == 200) is allowed, host
        assert get(address, Host=["localhost", "evil.example"])[0] == 403
        assert get(address, Host=[])[0] == 403
    with serving(page, hosts=["Proxy.example", "::2"]) as (get, address):
        assert get(address, Host="proxy.example")[0] == 200
        assert get(address, Host="[::2]:80")[0] == 200
        assert get(address, Host="other.example")[0] == 403


def test_headers_forbid_what_a_page_has_no_need_of(page):
    with serving(page) as (get, address):
        for path in (address, "/nothing", "/"):
            headers = get(path)[2]
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert "default-src 'none'" in headers["Content-Security-Policy"]
            assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
            assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert "Access-Control-Allow-Origin" not in headers
            assert "Python" not in headers["Server"]


def test_results_that_have_become_a_link_are_not_served(tmp_path):
    write_few(tmp_path / "runs")
    page = make_report([tmp_path / "runs"])
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "results.json").write_text(SECRET)
    href = links(page)[0]
    file = page.parent / unquote(href)
    with serving(page) as (get, _):
        file.unlink()
        file.symlink_to(tmp_path / "secret" / "results.json")
        assert get(f"/{href.removeprefix('./')}")[0] == 404
    with serving(page) as (get, _):
        assert get(f"/{href.removeprefix('./')}")[0] == 404


def test_results_of_several_folders_are_served_under_what_a_browser_asks_for(tmp_path):
    for name in ("a", "b"):
        write_few(tmp_path / name)
    page = make_report([tmp_path / "a", tmp_path / "b"])
    with serving(page) as (get, _):
        outside = [href for href in links(page) if href.startswith("./../b/")]
        assert len(outside) == 2
        for href in outside:
            assert get(f"/{href.removeprefix('./../')}")[0] == 200


NAMES = [
    "javascript:alert(1)",
    '"><script>alert(1)<',
    "<img src=x onerror=alert(1)>",
    "a b&c#d?e",
    "data:,x",
    "%2e%2e",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_text_in_the_page(name, tmp_path):
    place = tmp_path / name
    place.mkdir()
    hostile = f"</script><script>alert(1)</script>{name}"
    verdict = {"claim": hostile, "rule": hostile, "found": hostile, "holds": True}
    results = figure1() | {
        "title": hostile,
        "lead": hostile,
        "command": hostile,
        "verdicts": [verdict],
        "config": {hostile: hostile},
    }
    results["tables"] = [{"heading": hostile, "header": [hostile, hostile], "rows": [[hostile, hostile]]}]
    results["versions"] = results["machine"] = {hostile: hostile}
    (place / "results.json").write_text(json.dumps(results))
    trained = table2()
    trained["rows"][0]["label"] = hostile
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "results.json").write_text(json.dumps(trained))
    page = make_report([tmp_path])
    text = page.read_text()
    elements = Elements(text).elements
    assert [attrs for tag, attrs in elements if tag == "script"] == [
        {"type": "application/json", "id": "data"}, {}
    ]  # fmt: skip
    assert not any(tag == "img" or attribute.startswith("on") for tag, attrs in elements for attribute in attrs)
    href = next(href for href in links(page) if "table" not in href)
    assert not urlsplit(href).scheme
    assert not urlsplit(href).query + urlsplit(href).fragment
    assert (page.parent / unquote(urlsplit(href).path)).samefile(place / "results.json")
    with serving(page) as (get, _):
        assert get(f"/{href.removeprefix('./')}")[0] == 200


def test_the_policy_lets_the_pages_own_scripts_run_and_no_others(page):
    text = page.read_text()
    policy = next(attrs["content"] for tag, attrs in Elements(text).elements if attrs.get("http-equiv"))
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    assert allowed == [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()]
    assert "unsafe" not in policy.replace("style-src 'unsafe-inline'", "")


def damaged(**fields):
    return figure1() | fields


PICTURE = {"heading": "it", "text": "it"}

RESULTS = {
    "a picture that climbs": (
        damaged(pictures=[PICTURE | {"file": "../secret.png"}]),
        "must name files inside .*secret.png",
    ),
    "a picture from the root": (
        damaged(pictures=[PICTURE | {"file": "/etc/passwd"}]),
        "must name files inside .*/etc/passwd",
    ),
    "a picture that is a link": (damaged(pictures=[PICTURE | {"file": "link.png"}]), r"link\.png must be a file inside"),
    "a picture that is none": (damaged(pictures=[PICTURE | {"file": "text.png"}]), r"text\.png must be a PNG"),
    "a picture without a name": (damaged(pictures=[PICTURE | {"file": 3}]), "must have file"),
    "links among pictures": ({**figure1(), "experiment": "figure9", "pictures": 0}, "must have a list of pictures"),
    "verdicts that are none": (damaged(verdicts=[3]), "verdicts must have fields; got 3"),
    "a verdict of its own": (damaged(verdicts=[{"claim": "", "rule": "", "found": "", "holds": "yes"}]), "must have holds"),
    "a table of numbers": (damaged(tables=[{"heading": "", "header": ["a"], "rows": [[1]]}]), "must have rows"),
    "no scale": ({name: x for name, x in figure1().items() if name != "scale"}, "must have scale as kvbind"),
    "a name that is none": (damaged(experiment=["table2"]), "must have experiment"),
    "steps that are none": (damaged(steps=3), "must be what kvbind reproduce writes; it is not: TypeError"),
    "an unknown task": (damaged(task="cooking"), "must be what kvbind reproduce writes"),
    "another module": (table2() | {"experiment": "table_text.x"}, None),
    "a table without rows": (table2() | {"rows": 3}, "must be what kvbind reproduce writes"),
    "models that climb": ({**figure1(), "experiment": "explorer", "models": "../models.json"}, "must name files inside"),
    "models without a name": ({**figure1(), "experiment": "explorer"}, "must name files inside .* got None"),
    "models that are none": ({**figure1(), "experiment": "explorer", "models": "text.png"}, r"text\.png must be JSON"),
}


@pytest.mark.parametrize("damage", RESULTS)
def test_damaged_results_are_refused_by_name(damage, tmp_path):
    results, message = RESULTS[damage]
    place = tmp_path / "runs" / "it"
    place.mkdir(parents=True)
    (tmp_path / "runs" / "secret.png").write_bytes(PNG)
    (place / "text.png").write_text(SECRET)
    (place / "link.png").symlink_to(tmp_path / "runs" / "secret.png")
    (place / "results.json").write_text(json.dumps(results))
    if message is None:
        # shown for what it has, as an experiment that the page does not know; its name is not imported
        (place / "link.png").unlink()
        (place / "text.png").unlink()
        assert find_parts([tmp_path / "runs"])[0][0].charts == {}
        return
    with pytest.raises(ValueError, match=message) as refusal:
        make_report([tmp_path / "runs"])
    assert str(place) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not list(Path(tmp_path).rglob("report.html"))


def compressed_models(tmp_path, content):
    """The error that models in a file of this content end in."""
    (tmp_path / "models.json.gz").write_bytes(content)
    (tmp_path / "results.json").write_text(json.dumps(figure1() | {"experiment": "explorer", "models": "models.json.gz"}))
    with pytest.raises(ValueError, match=r"models\.json\.gz must ") as refusal:
        find_parts([tmp_path])
    return str(refusal.value)


def test_compressed_models_that_expand_without_bound_are_refused_before_they_are_held(tmp_path):
    bomb = gzip.compress(b'{"title": "' + bytes(50 * 2**20))
    assert len(bomb) < 2**16
    tracemalloc.start()
    try:
        assert "bytes (100 times its size, or what such files may have)" in compressed_models(tmp_path, bomb)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("change", [lambda x: x[:-9], lambda x: x + x, lambda x: b"", lambda x: x[10:], lambda x: x + b" "])
def test_compressed_models_that_are_not_one_whole_file_are_refused(change, tmp_path):
    assert "gzip file" in compressed_models(tmp_path, change(gzip.compress(b"{}")))


def test_pictures_of_a_model_come_from_its_file_alone(tmp_path):
    panels = [{"caption": "one", "source": "https://elsewhere.example/pixel.png"}]
    model = {"title": "a", "group": "b", "about": "c", "rows": [{}], "example": {"kind": "image", "panels": panels}}
    (tmp_path / "models.json").write_text(json.dumps(model))
    (tmp_path / "results.json").write_text(json.dumps(figure1() | {"experiment": "explorer", "models": "models.json"}))
    with pytest.raises(ValueError, match=r"models\.json's panels must have source"):
        find_parts([tmp_path])


def without(own, name):
    return {key: x for key, x in own.items() if key != name}


HEAD = {
    "name": "head 0", "size": 1, "codes": "fw==", "most": 1.0, "q": [[0.0], [0.0]], "k": [[], []], "k_at": [],
    "shares": [1.0, None], "before": [1.0], "after": [None], "steps": [[0, 1.0], [1, None]],
}  # fmt: skip
LAYER = {"name": "layer 0", "heads": [HEAD]}
ROW = {"name": "rung0", "label": "all", "spec": "InnerLoop()", "obstacle": None, "layers": [LAYER]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW, None),
        (2, "'s row 1 must have fields; got 2"),
        *((without(ROW, name), f"'s row 1 must have {name} as .* got none") for name in ROW),
        (ROW | {"layers": []}, r"'s row 1 must have layers as .* got \[\]"),
        (ROW | {"layers": [{"name": "layer 0"}]}, "'s row 1, in its layers, must have heads as .* got none"),
        *(
            (ROW | {"layers": [LAYER | {"heads": [HEAD, without(HEAD, name)]}]},
             f"'s row 1, in its heads, must have {name} as .* got none")
            for name in HEAD
        ),
        (ROW | {"layers": [LAYER | {"heads": [HEAD | {"q": [[1.0], []]}]}]}, "'s row 1, in its heads, must have q as"),
        (ROW | {"layers": [LAYER | {"heads": [HEAD | {"steps": [[0]]}]}]}, "'s row 1, in its heads, must have steps as"),
    ],
)  # fmt: skip
def test_rows_that_the_explorer_cannot_show_are_refused_by_file_and_number(row, message, tmp_path):
    example = {"kind": "text", "tokens": ["a"], "unit": "token"}
    (tmp_path / "models.json").write_text(
        json.dumps({"title": "a", "group": "b", "about": "c", "rows": [ROW, row], "example": example})
    )
    if message is None:
        assert read_model(tmp_path / "models.json")["rows"] == [ROW, ROW]
        return
    with pytest.raises(ValueError, match=rf"models\.json{message}"):
        read_model(tmp_path / "models.json")


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "result.json", "pictures/it.png"])
def test_a_file_of_a_run_that_is_a_link_is_not_shown(name, tmp_path):
    (tmp_path / "secret.txt").write_text(f"# kvbind train language\n{SECRET}")
    write_run(tmp_path / "runs" / "it")
    assert SECRET not in make_report([tmp_path / "runs"]).read_text()
    file = tmp_path / "runs" / "it" / name
    file.unlink()
    file.symlink_to(tmp_path / "secret.txt")
    if name == "config.yaml":
        with pytest.raises(ValueError, match="found none below"):
            make_report([tmp_path / "runs"])
        return
    with pytest.raises(ValueError, match=r"must be a file inside .* it is a link"):
        make_report([tmp_path / "runs"])


def test_a_link_in_place_of_results_is_refused(tmp_path):
    (tmp_path / "secret.json").write_text(json.dumps(figure1()))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "results.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ValueError, match=r"results\.json must be a file inside .* it is a link"):
        find_parts([tmp_path / "runs"])
