"""The report: what it says, that it asks nothing of the network, and that it works in a browser."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from shutil import which

import pytest
import torch
import zoo
from transformers import AutoModelForImageClassification

import testreg
from testreg import BadImages, BadPlan, RegisterPlan
from testreg.demo.planted import plant
from testreg.finding.observe import run
from testreg.judging import charts
from testreg.judging.reporting import report, save

PIXELS = zoo.images()(6)["pixel_values"]
PLAN = RegisterPlan({1: (3, 5)}, registers=2)
NASTY = "</script><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.words, self.within = [], "", {}
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words += data
        tag = self.tags[-1][0] if self.tags else ""
        self.within[tag] = self.within.get(tag, "") + data

    def text_of(self, tag):
        """All text from a tag to the next tag that opens, of a tag that holds nothing but text."""
        return self.within[tag].strip()

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def plan():
    told = {
        "candidates": [
            {"block": 1, "neuron": 3, "score": 2.5, "outliers": 7.5, "ordinary": 0.125, "spread": 0.1},
            {"block": 0, "neuron": 9, "score": 0.5, "outliers": 1.0, "ordinary": 0.5, "spread": 0.1},
        ],
        "trials": [
            {"neurons": 2, "registers": 2, "form": "dynamic", "entry": 0, "left": 0.0, "agreement": 1.0}
            | {"cosine": 0.99, "features": 0.98, "drift": 0.03, "why": "", "chosen": True}
        ],
        "guard": {"images": 5, "left": 0.0, "cosine": 0.9876, "agreement": 1.0, "features": 0.9},
        "note": NASTY,
    }
    return replace(PLAN, provenance=told)


@pytest.fixture(scope="module")
def page(plan):
    return report(zoo.build("ViTModel")[0], PIXELS, plan=plan, title=f"my {NASTY}")


def test_nothing_is_loaded_from_outside(page):
    parsed = Page(page)
    loaded = [value for _, attributes in parsed.tags for key, value in attributes.items() if key in ("src", "href")]
    assert loaded
    assert all(value.startswith("data:") for value in loaded)
    assert "url(" not in page
    assert "@import" not in page
    (policy,) = [tag["content"] for tag in parsed.named("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "connect-src" not in policy


def test_nothing_in_a_plan_or_name_becomes_markup(page):
    assert NASTY not in page
    parsed = Page(page)
    assert not [attributes for _, attributes in parsed.tags if "onerror" in attributes]
    assert len(parsed.named("script")) == 1
    assert NASTY in parsed.words  # but it can be read


def test_it_shows_every_photo_before_and_after(page):
    images = Page(page).named("img")
    assert len(images) == 6 * (1 + 3 * 2)
    for name in ("Norms", "Class-token attention", "Patch features"):
        for side in ("before", "after"):
            assert sum(image["alt"].startswith(name) and image["alt"].endswith(side) for image in images) == 6
    assert len({image["src"] for image in images}) > 6 * 5


def test_it_says_which_neurons_why_and_what_the_guard_saw(page, plan):
    rows = re.findall(r"<tr><td>(\d+)</td><td>(\d+)</td><td>([\d.]+)</td>.*?<td class=\"text\">(\w*)</td>", page)
    assert rows[:2] == [("1", "3", "2.5", "yes"), ("0", "9", "0.5", "")]
    assert "0.9876" in page
    assert "1 plans tried" in page
    kept = json.loads(Page(page).text_of("pre"))
    assert kept == plan.to_dict()


def test_it_says_what_the_registers_do_at_other_sizes(plan):
    sizes = [
        {"side": [16, 24], "patches": 6, "images": 4, "registers": 2, "before": 0.1, "left": 0.01, "agreement": 0.75,
         "cosine": 0.98765},
        {"side": [64, 64], "refused": "positions for 32 pixels alone"},
    ]  # fmt: skip
    told = replace(plan, provenance={**plan.provenance, "sizes": sizes})
    text = report(zoo.build("ViTModel")[0], PIXELS, plan=told)
    table = re.search(r'<table id="sizes">(.*?)</table>', text, re.DOTALL)[1]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    assert rows[0] == ["16 × 24", "6", "4", "2", "10.00 %", "1.00 %", "75 %", "0.9877"]
    assert rows[1] == ["64 × 64", "the model does not take this size: positions for 32 pixels alone"]
    assert 'id="sizes"' not in report(zoo.build("ViTModel")[0], PIXELS, plan=plan)


@pytest.mark.parametrize("told", [{"candidates": "x"}, {"guard": 3}, {"trials": [{}]}, {"candidates": [{"block": 1}]}])
def test_a_provenance_of_another_form_is_an_error(told):
    with pytest.raises(BadPlan, match="provenance"):
        report(zoo.build("ViTModel")[0], PIXELS, plan=replace(PLAN, provenance=told))


def test_without_registers_the_model_is_shown_as_it_is():
    model = zoo.build("ViTModel")[0]
    page = report(model, PIXELS)
    assert "nothing to patch" in page
    assert len(Page(page).named("img")) == 6 * 4
    assert not Page(page).named("button")
    assert "Register neurons" not in page


def test_an_outlier_is_what_it_was_when_the_plan_was_found():
    model = zoo.build("ViTModel")[0]
    plant(model, seed=3, neurons=1, upstream=0)
    with torch.no_grad():
        states = model(PIXELS, output_hidden_states=True).hidden_states[1:]
    norms = torch.stack([state[:, 1:].norm(dim=-1) for state in states], dim=1)  # (photos, blocks, patches)
    ratios = norms / norms.median(dim=-1, keepdim=True).values
    block = int(ratios.amax(dim=-1).mean(dim=0).argmax())
    outliers = norms[:, block][ratios[:, block] > 2]
    norm = float(outliers.median())
    found = replace(PLAN, provenance={"artefact": {"times": 2.0, "norm": norm}})
    page = report(model, PIXELS, plan=found)
    assert f"A patch is an outlier from norm {norm:g} on" in page
    share = int((outliers > norm).sum()) / norms[:, block].numel()
    assert 0 < share < len(outliers) / norms[:, block].numel()
    assert f'outlier patches</small>\n    <b><span class="is-before">{share:.2%}</span>' in page
    assert f"<td>{100 * share:.2f} %</td>" in page  # of the block, in the table
    assert f"from norm {norm:g} on" not in report(model, PIXELS, plan=PLAN)


def test_models_without_a_class_token_say_so():
    assert "Attention that each patch receives" in report(zoo.build("SiglipVisionModel")[0], PIXELS, plan=PLAN)


def test_the_model_is_as_it_was_and_an_acting_patch_is_the_default():
    model = zoo.build("ViTModel")[0]
    inputs = {"pixel_values": PIXELS}
    before = run(model, inputs).last_hidden_state
    with testreg.patch(model, PLAN) as current:
        acting = report(model, PIXELS)
        assert testreg.active(model) is current
    assert acting == report(model, PIXELS, plan=PLAN)
    assert torch.equal(run(model, inputs).last_hidden_state, before)


def test_only_so_many_images_are_used_and_no_image_is_an_error(tmp_path):
    assert "3 photos" in report(zoo.build("ViTModel")[0], PIXELS, plan=PLAN, most=3)
    with pytest.raises(BadImages):
        report(zoo.build("ViTModel")[0], tmp_path)


def verdict(page):
    return re.search(r'id="verdict">(.*?)</p>', page, re.DOTALL).group(1)


def test_the_verdict_tells_a_cure_from_none(assets):
    model = AutoModelForImageClassification.from_pretrained(assets / "checkpoints" / "vit-tiny-augreg").eval()
    photos = sorted((assets / "images" / "coco_cc" / "images").glob("*.jpg"))[:4]
    cure = RegisterPlan({7: (417,), 6: (59, 189)}, registers=3)
    cured = verdict(report(model, photos, plan=cure))
    assert "3 registers take the artefact away" in cured
    assert "to 0.00%" in cured
    assert "do not take the artefact away" in verdict(report(model, photos, plan=RegisterPlan({}, registers=1)))
    sound = AutoModelForImageClassification.from_pretrained(assets / "checkpoints" / "deit-tiny").eval()
    assert "nothing to patch" in verdict(report(sound, photos))


def test_charts_put_values_in_order():
    picture = charts.lines({"before largest": [1, 10, 100]}, across="block")
    points = [tuple(map(float, point.split(","))) for point in re.search(r'points="(.*?)"', picture).group(1).split()]
    assert points[0][0] < points[1][0] < points[2][0]
    assert points[0][1] - points[1][1] == pytest.approx(points[1][1] - points[2][1], abs=0.11)  # logarithmic
    bars = charts.histogram({"before": [9, 0, 99]}, [1, 2, 4, 8], across="norm")
    heights = [float(height) for height in re.findall(r'class="bar before".*?height="([\d.]+)"', bars)]
    assert len(heights) == 2  # nothing is drawn for an empty bin
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    assert charts.round_ticks(0.9, 60) == [1, 2, 5, 10, 20, 50]
    assert "nan" not in charts.lines({"before": [5, 5]}, across="block")


# In a browser


@pytest.fixture(scope="module")
def browser(page, tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    chrome, driver = which("chromium") or which("google-chrome"), which("chromedriver")
    if not chrome or not driver:
        pytest.skip("no Chromium and chromedriver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    path = tmp_path_factory.mktemp("report") / "report.html"
    save(page, path)
    browser.get(path.as_uri())
    yield browser
    browser.quit()


def emulate(browser, width=1100, scheme="light"):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def test_the_browser_has_nothing_to_complain_about_and_nothing_to_fetch(browser):
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [row["params"]["request"]["url"] for row in messages if row["method"] == "Network.requestWillBeSent"]
    assert asked
    assert all(url.startswith(("file:", "data:")) for url in asked)
    assert browser.execute_script("return [...document.images].every((image) => image.naturalWidth > 0)")


def test_the_buttons_show_before_after_or_both(browser):
    buttons = {button.text: button for button in browser.find_elements("css selector", ".switch button")}
    cut = 'return [...document.querySelectorAll(".map")].map((map) => map.style.getPropertyValue("--cut"))'
    shown = 'return getComputedStyle(document.querySelector(".over")).clipPath'
    for text, at in (("Before", "100%"), ("After", "0%"), ("Both", "50%")):
        buttons[text].click()
        assert set(browser.execute_script(cut)) == {at}
        assert browser.execute_script(shown).rstrip(")").endswith(at if at != "0%" else "0%")
        pressed = [name for name, button in buttons.items() if button.get_attribute("aria-pressed") == "true"]
        assert pressed == [text]


def test_a_slider_moves_its_own_map_alone(browser):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    browser.find_element("css selector", '.switch button[data-at="50"]').click()
    first = browser.find_elements("css selector", ".map input")[0]
    first.send_keys(keys.END)
    cuts = browser.execute_script(
        'return [...document.querySelectorAll(".map")].map((map) => map.style.getPropertyValue("--cut"))'
    )
    assert cuts[0] == "100%"
    assert set(cuts[1:]) == {"50%"}


def test_it_fits_a_phone_and_follows_light_and_dark(browser):
    colours = set()
    for width in (360, 1100):
        for scheme in ("light", "dark"):
            emulate(browser, width, scheme)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            colours.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2
    details = browser.find_element("css selector", "details")
    browser.execute_script("arguments[0].open = true", details)
    emulate(browser, 360)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360  # tables scroll inside
