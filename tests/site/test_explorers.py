"""The figures that answer to the reader compute what the package does, and anyone can use them.

They are tried on a page of their own, made of what a chapter holds of them and nothing else.
"""

import math
import re
import shutil

import pytest
import torch
from conftest import ROOT, look, serve

from compresskit import losses, theory

STATIC = ROOT / "book" / "_static"
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Explorers</title><link rel="icon" href="data:,">
<link rel="stylesheet" href="css/book.css"><link rel="stylesheet" href="css/explorers.css">
<style>html[data-theme="dark"] body {background: #121212; color: #ced6dd}</style>
<script>
const night = matchMedia("(prefers-color-scheme: dark)");
const choose = () => { document.documentElement.dataset.theme = night.matches ? "dark" : "light"; };
night.addEventListener("change", choose);
choose();
</script>
<script src="js/explorers.js"></script></head>
<body><main class="bd-main bd-article"><h1>Explorers</h1>
<temperature-explorer>
<p>Here a slider stands.</p>
</temperature-explorer>
<loss-explorer>
<p>Here sliders stand.</p>
</loss-explorer>
<p>The next paragraph.</p></main></body></html>
"""
TEMPERATURES = [float(f"{10 ** (i / 20 - 1):.2g}") for i in range(61)]
EXACT = 1e-12  # both sides work in float64


def write(folder, script=None):
    shutil.copytree(STATIC / "css", folder / "css")
    (folder / "js").mkdir()
    source = (STATIC / "js" / "explorers.js").read_text(encoding="utf-8")
    (folder / "js" / "explorers.js").write_text(script(source) if script else source)
    (folder / "index.html").write_text(PAGE)
    return (folder / "index.html").as_uri()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    return write(tmp_path_factory.mktemp("explorers"))


@pytest.fixture
def page(browser, url):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(url)
    yield page
    page.close()


def put(page, tag, **settings):
    """Set controls by their names, each as one move of the reader's hand."""
    for name, value in settings.items():
        page.locator(f"{tag} [name='{name.replace('_', '-')}']").evaluate(
            """(control, value) => {
              control.value = value;
              const kind = control.tagName === "SELECT" ? "change" : "input";
              control.dispatchEvent(new Event(kind, {bubbles: true}));
            }""",
            str(value),
        )


def read(page, tag):
    """Every number of a figure, by its name."""
    return dict(
        page.locator(f"{tag} data").evaluate_all(
            "all => all.map(d => [d.dataset.name, Number(d.value)])"
        )
    )


def differences(shown, expected, rel=1e-9):
    return [
        f"{name}: {shown[name]}, not {value}"
        for name, value in expected.items()
        if not math.isclose(shown[name], value, rel_tol=rel, abs_tol=EXACT)
    ]


# --- their arithmetic is the package's ---------------------------------------------------------

LOGITS = {
    "near": [8.0, 6.0, 3.0, 1.0, -4.0],
    "tied": [5.0, 5.0, 2.0, 0.0, -3.0],
    "equal": [1.0, 1.0, 1.0, 1.0, 1.0],
    "huge": [10000.0, 9998.0, 5000.0, 0.0, -10000.0],
    "negative": [-700.0, -720.5, -701.25, -1000.0, -699.0],
}


def softened(page, logits, index):
    """What the figure shows of these logits, against the package."""
    put(page, "temperature-explorer", temperature=index)
    put(page, "temperature-explorer", **{f"logit_{i}": z for i, z in enumerate(logits)})
    temperature = TEMPERATURES[index]
    z = torch.tensor(logits, dtype=torch.float64)
    p = losses.softmax_temperature(z, temperature)
    t = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    log_p = torch.log_softmax(z / t, -1)
    nats = -(log_p.exp() * log_p.where(log_p > -700, 0.0)).sum()
    expected = {f"p-{i}": x.item() for i, x in enumerate(p)}
    expected["entropy"] = theory.entropy(p)
    expected["share"] = theory.entropy(p) / math.log2(len(logits))
    slope = {"slope": torch.autograd.grad(nats, t)[0].item()}
    shown = read(page, "temperature-explorer")
    # differentiating cancels digits where one class has nearly all
    return differences(shown, expected) + differences(shown, slope, rel=1e-5)


@pytest.mark.parametrize("name", LOGITS)
def test_the_softened_distribution_is_the_package_s(page, name):
    for index in (0, 10, 20, 33, 60):
        assert softened(page, LOGITS[name], index) == []


def pulled(page, teacher, student, label, alpha, index):
    """What the figure shows of the loss and its gradient, against the package and its autograd."""
    tag = "loss-explorer"
    put(page, tag, temperature=index, alpha=alpha)
    put(page, tag, **{f"teacher_{i}": z for i, z in enumerate(teacher)})
    put(page, tag, **{f"student_{i}": z for i, z in enumerate(student)})
    page.locator(f"{tag} input[type=radio]").nth(label).check()
    t = TEMPERATURES[index]
    z_t = torch.tensor([teacher], dtype=torch.float64)
    z_s = torch.tensor([student], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([label])
    hard = losses.distillation_loss(z_s, z_t, y, temperature=t, alpha=0.0)
    soft = losses.forward_kl(z_s, z_t, temperature=t)
    total = losses.distillation_loss(z_s, z_t, y, temperature=t, alpha=alpha)
    matching = losses.logit_matching(z_s, z_t)
    expected = {
        "hard": hard.item(),
        "raw": soft.item(),
        "scaled": t**2 * soft.item(),
        "total": total.item(),
        "unscaled": ((1 - alpha) * hard + alpha * soft).item(),
    }
    gradients = {
        "hard": (1 - alpha) * hard,
        "raw": alpha * soft,
        "scaled": alpha * t**2 * soft,
        "matching": alpha * matching,
        "total": total,
    }
    for name, loss in gradients.items():
        gradient = torch.autograd.grad(loss, z_s, retain_graph=True)[0][0]
        expected |= {f"{name}-{i}": g.item() for i, g in enumerate(gradient)}
    return differences(read(page, tag), expected)


SETTINGS = {
    "start": ([6, 4, -4], [1, -2, 3], 0, 0.9, 32),
    "cold": ([6, 4, -4], [1, -2, 3], 2, 0.5, 0),
    "hot": ([6, 4, -4], [-10, 9.5, 0], 1, 0.35, 60),
    "hard only": ([0.25, 4, -4], [1, -2, 3], 1, 0.0, 20),
    "soft only": ([1e4, 0, -1e4], [10, 10, -10], 2, 1.0, 12),
    "agreed": ([1, -2, 3], [1, -2, 3], 0, 0.9, 40),
}


def test_the_loss_and_its_gradient_are_the_package_s(page):
    found = {name: pulled(page, *setting) for name, setting in SETTINGS.items()}
    assert found == {name: [] for name in SETTINGS}


WRONG = {  # a slip of the pen -> the setting that betrays it
    ("temperature ** 3", "temperature ** 2"): lambda page: softened(page, LOGITS["near"], 33),
    ("Math.LN2", "Math.LN10"): lambda page: softened(page, LOGITS["near"], 33),
    ("(z - top) / temp", "z / temp"): lambda page: softened(page, LOGITS["huge"], 0),
    ("t ** 2 * soft);", "t * soft);"): lambda page: pulled(page, *SETTINGS["start"]),
    ("(q - p[i]) / temp", "(q - p[i]) * temp"): lambda page: pulled(page, *SETTINGS["start"]),
    ("d - mean(gap)", "d"): lambda page: pulled(page, *SETTINGS["start"]),
}


@pytest.mark.parametrize("slip", WRONG, ids=lambda slip: slip[1])
def test_a_slip_in_the_script_is_noticed(browser, tmp_path, slip):
    def miswrite(script):
        assert slip[0] in script
        return script.replace(*slip)

    page = browser.new_page()
    page.goto(write(tmp_path, miswrite))
    assert WRONG[slip](page) != []
    page.close()


def test_the_raw_gradient_dies_and_the_scaled_one_settles(page):
    """T from 50 to 100: one falls by four, the other is that of logit matching."""

    def at(index):
        put(page, "loss-explorer", temperature=index, alpha=1)
        return read(page, "loss-explorer")

    warm, hot = at(54), at(60)
    for i in range(3):
        # the next term of the expansion is of order (largest logit gap) / T
        assert warm[f"raw-{i}"] / hot[f"raw-{i}"] == pytest.approx(4, rel=0.05)
        assert hot[f"scaled-{i}"] == pytest.approx(hot[f"matching-{i}"], rel=0.05)


def test_what_is_read_is_the_value_rounded(page):
    put(page, "temperature-explorer", temperature=26)
    put(page, "loss-explorer", temperature=57)
    shown = page.locator(".explorer data").evaluate_all(
        "all => all.map(d => [d.textContent, Number(d.value)])"
    )
    assert len(shown) == 28
    for text, value in shown:
        digits = text.replace("−", "-")
        seen = float(digits.removesuffix(" %")) / (100 if digits.endswith("%") else 1)
        # three decimals below one, two digits with an exponent, three digits otherwise
        assert seen == pytest.approx(value, rel=0.05 if "e" in digits else 0.005, abs=5.1e-4)


# --- anyone can use them -----------------------------------------------------------------------


def test_no_barrier_no_error_no_request_and_no_sideways_scrolling(browser, tmp_path):
    write(tmp_path)
    for address in serve(tmp_path):
        visit = look(browser, f"{address}/index.html")
    assert visit.errors == []
    assert visit.foreign == []
    assert visit.sideways == []
    assert visit.violations == {"light": [], "dark": []}


def test_the_temperature_follows_the_keys_and_is_spoken(page):
    for tag in ("temperature-explorer", "loss-explorer"):
        temperature = page.locator(tag).get_by_role("slider", name="temperature T")
        temperature.focus()
        spoken = {}
        for key in ("Home", "ArrowRight", "End", "ArrowLeft"):
            page.keyboard.press(key)
            spoken[key] = temperature.get_attribute("aria-valuetext")
            shown = page.locator(f"{tag} > .explorer > .explorer-slider .explorer-value").first
            assert shown.inner_text() == spoken[key]
        assert spoken == {"Home": "0.1", "ArrowRight": "0.11", "End": "100", "ArrowLeft": "89"}


def test_every_control_is_reached_with_the_tab_key(page):
    logits = [f"logit-{i}" for i in range(5)]
    rows = [f"{who}-{i}" for i in range(3) for who in ("teacher", "student")]
    every = ["example", "temperature", *logits, "temperature", "alpha", "label-1", *rows]
    seen = []
    for _ in every:
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.name"))
    assert seen == every
    page.get_by_role("radio", name="the label is dog").focus()
    page.keyboard.press("ArrowDown")
    assert page.get_by_role("radio", name="the label is wolf").is_checked()


def test_an_example_fills_the_fields_and_what_they_hold_is_shown(page):
    choice = page.get_by_role("combobox")
    fields = page.locator("temperature-explorer input[type=number]")
    for name in choice.locator("option").all_inner_texts()[:-1]:
        choice.select_option(name)
        logits = [float(fields.nth(i).input_value()) for i in range(5)]
        assert softened(page, logits, 20) == []
        choice.select_option(name)
        assert [float(fields.nth(i).input_value()) for i in range(5)] == logits


@pytest.mark.parametrize("text", ["", "1e9", "-1e300"])
def test_what_is_no_number_or_too_large_changes_nothing_and_is_marked(page, text):
    before = read(page, "temperature-explorer")
    field = page.get_by_role("spinbutton", name="logit of dog", exact=True)
    field.fill(text)
    assert read(page, "temperature-explorer") == before
    assert field.get_attribute("aria-invalid") == "true"
    field.fill("8")
    assert field.get_attribute("aria-invalid") == "false"
    assert read(page, "temperature-explorer") == before


def test_a_number_can_be_typed_digit_by_digit(page):
    field = page.get_by_role("spinbutton", name="logit of truck", exact=True)
    field.press("ControlOrMeta+A")
    field.press("Delete")
    field.press_sequentially("-0.05")
    assert field.input_value() == "-0.05"
    assert page.get_by_role("combobox").input_value() == "your own"
    typed = read(page, "temperature-explorer")["p-4"]
    p = losses.softmax_temperature(torch.tensor([8, 6, 3, 1, -0.05], dtype=torch.float64), 1.0)
    assert typed == pytest.approx(p[4].item(), rel=1e-9)


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_else_on_the_page_moves(browser, url, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(url)
    shift = page.evaluate(
        """() => new Promise((done) => {
          new PerformanceObserver((list) => done(list.getEntries().map((e) => e.value)))
            .observe({type: "layout-shift", buffered: true});
          setTimeout(() => done([]), 300);
        })"""
    )
    assert sum(shift) < 0.01
    last = page.locator("main > p")
    places = set()
    for index in range(0, 61, 6):
        put(page, "temperature-explorer", temperature=index)
        put(page, "loss-explorer", temperature=index, student_0=index / 3 - 10)
        places.add(last.evaluate("p => p.getBoundingClientRect().top + scrollY"))
    assert len(places) == 1
    page.close()


def test_a_sentence_stands_in_their_place_where_no_script_runs(browser, url):
    for script in (True, False):
        context = browser.new_context(java_script_enabled=script)
        page = context.new_page()
        page.goto(url)
        for tag in ("temperature-explorer", "loss-explorer"):
            assert page.locator(f"{tag} > p").is_visible() != script
            assert (page.locator(f"{tag} .explorer").count() == 1) == script
        context.close()


def test_chapter_3_holds_both(browser, address):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{address}/notebooks/03_temperature_dark_knowledge.html")
    assert softened(page, LOGITS["tied"], 20) == []
    assert pulled(page, *SETTINGS["start"]) == []
    for tag in ("temperature-explorer", "loss-explorer"):
        assert page.locator(f"{tag} > .explorer").is_visible()
        assert not page.locator(f"{tag} > p").is_visible()
    page.close()


def test_the_script_needs_nothing_but_itself():
    source = (STATIC / "js" / "explorers.js").read_text(encoding="utf-8")
    assert len(source) < 25_000
    assert re.findall(r"https?://\S+", source) == ['http://www.w3.org/2000/svg",']
    assert not re.search(r"\b(import|require|fetch|eval|innerHTML)\b", source)
