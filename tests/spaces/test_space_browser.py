"""The Space as visitors see it, in a headless Chromium that clicks through each tab.

SCREENSHOTS=docs pytest tests/spaces/test_space_browser.py keeps the pictures that the README shows.
"""

import base64
import io
import os
import re
import shutil
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

selenium = pytest.importorskip("selenium")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio"),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]

OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
OPTIONS += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
SECONDS = 60
TABS = {"guided": "Guidance", "langevin": "Langevin", "sweep": "Scales"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Where downloads go."""
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory, saved):
    options = webdriver.ChromeOptions()
    options.add_experimental_option("prefs", {"download.default_directory": str(saved)})
    options.binary_location = CHROMIUM
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1280,1500"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    home = str(tmp_path_factory.mktemp("home"))  # where crash reports would go, whatever the profile
    service = webdriver.ChromeService(DRIVER, env={**os.environ, "HOME": home, "XDG_CONFIG_HOME": f"{home}/.config"})
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


class Page:
    """What a visitor sees of one tab."""

    def __init__(self, driver, address, tab, query=""):
        self.driver, self.tab = driver, tab
        driver.get(address + query)
        self.until(lambda: driver.find_elements(By.ID, "draw-guided"))
        driver.execute_script(  # at phone width some tabs are behind a menu
            "const tabs = [...document.querySelectorAll('button[role=tab]')];"
            "tabs.find((tab) => tab.textContent.trim() === arguments[0]).click()",
            TABS[tab],
        )
        self.until(lambda: self.draw_button.is_displayed())

    def until(self, condition):
        return WebDriverWait(self.driver, SECONDS, poll_frequency=0.05).until(lambda _: condition())

    @property
    def draw_button(self):
        return self.driver.find_element(By.ID, f"draw-{self.tab}")

    def script(self, code):
        return self.driver.execute_script(f"const tab = document.getElementById('tab-{self.tab}'); {code}")

    @property
    def caption(self):
        return self.script("return tab.querySelector('[data-part=caption]').textContent")

    def frames(self):
        """The strips on the screen, by panel, as arrays: x_t and x̂_0."""
        sources = self.script(
            "return [...tab.querySelectorAll('.panel')].map((p) => [...p.querySelectorAll('img')].map((i) => i.src))"
        )
        return [[_pixels(source) for source in panel] for panel in sources]

    def set_steps(self, count):
        steps = self.driver.find_element(
            By.CSS_SELECTOR, f"#tab-{self.tab} input[aria-label^='number input for Steps']"
        )
        steps.clear()
        steps.send_keys(f"{count}\t")

    def choose(self, value):
        self.driver.find_element(By.CSS_SELECTOR, f"#tab-{self.tab} input[type=radio][value='{value}']").click()

    def draw(self):
        self.draw_button.click()
        self.until(lambda: self.caption.startswith("step "))  # it streams
        self.until(lambda: self.caption == "the image")

    def download(self, kind, folder):
        """The file that a button saves."""
        for old in folder.iterdir():
            old.unlink()
        self.driver.find_element(By.ID, f"{kind}-{self.tab}").click()
        return self.until(lambda: [path for path in folder.iterdir() if path.suffix in (".png", ".npz")])[0]

    def code(self):
        return self.script("return [...tab.querySelectorAll('.cm-line')].map((line) => line.textContent).join('\\n')")

    def curves(self):
        return self.script("return tab.querySelectorAll('path[aria-roledescription=\"line mark\"]').length")

    def scrub(self, index):
        """Drags the slider to a frame."""
        self.script(
            f"const slider = tab.querySelector('[data-part=scrub]'); slider.value = {index};"
            "slider.dispatchEvent(new Event('input', { bubbles: true }))"
        )

    def save(self, name):
        if folder := os.environ.get("SCREENSHOTS"):
            Path(folder).mkdir(exist_ok=True)
            self.driver.save_screenshot(str(Path(folder, f"space-{name}.png")))


def _pixels(source):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


@pytest.mark.parametrize(("tab", "rows"), [("guided", 2), ("langevin", 1), ("sweep", 1)])
def test_each_tab_draws_a_film_that_ends_in_the_images_it_offers(chromium, address, saved, tab, rows):
    page = Page(chromium, address, tab)
    page.draw()
    assert page.until(page.curves) >= 1
    assert "image_generator" in page.code()
    page.save(tab)
    images = np.load(page.download("npz", saved))["arr_0"]
    picture = np.asarray(Image.open(page.download("PNG", saved)))
    shown = page.frames()
    assert len(shown) == rows
    for panel, drawn in zip(shown, np.split(images[..., 0], rows)):
        for strip in panel:
            np.testing.assert_array_equal(strip, np.concatenate(list(drawn), axis=1))
    assert picture.shape[1] >= 3 * shown[0][0].shape[1]  # enlarged
    assert len(page.script("return tab.querySelectorAll('.panel')")) == rows
    page.scrub(0)
    assert page.caption.startswith("step 1 of ")
    noise, guess = page.frames()[0]
    assert noise.std() > 50  # as noise is
    assert not np.array_equal(noise, guess)
    page.driver.find_element(By.CSS_SELECTOR, f"#tab-{tab} [data-part=play]").click()
    page.until(lambda: page.caption == "the image")
    assert not [entry["message"] for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"]


def test_guided_digits_look_unlike_unguided_ones_and_tell_their_probability(chromium, address):
    page = Page(chromium, address, "guided")
    page.draw()
    guided, unguided = page.frames()
    assert not np.array_equal(guided[0], unguided[0])
    notes = page.script("return [...tab.querySelectorAll('.panel')].map((p) => p.querySelector('.notes').innerText)")
    percents = [[int(note) for note in text.replace("%", " ").split()] for text in notes]
    assert min(percents[0]) > 90 > min(percents[1])


def test_the_switch_shows_the_classes_of_another_model_and_its_second_classifier(chromium, address):
    page = Page(chromium, address, "guided")
    assert not page.driver.find_elements(By.CSS_SELECTOR, "#tab-guided input[value=google]")
    page.choose("Emoji")
    page.until(lambda: page.driver.find_elements(By.CSS_SELECTOR, "#tab-guided input[value=google]"))
    page.choose("google")
    page.set_steps(4)
    page.draw()
    assert page.until(page.curves) >= 4
    page.save("emoji")
    for strip in (strip for panel in page.frames() for strip in panel):
        assert strip.shape == (32, 3 * 32, 3)
    notes = page.script("return [...tab.querySelectorAll('.notes span')].map((n) => n.textContent.split('\\n').length)")
    assert notes == [2] * 6  # of kind and style
    assert "'style': ['google'] * 6" in page.code()


def test_a_drawing_can_be_stopped(chromium, address):
    page = Page(chromium, address, "langevin")
    page.set_steps(250)
    page.draw_button.click()
    page.until(lambda: page.caption.startswith("step "))
    page.driver.find_element(By.ID, "stop-langevin").click()
    time.sleep(2)
    stopped = page.caption
    time.sleep(3)
    assert page.caption == stopped != "the image"


def test_a_wrong_choice_is_told(chromium, address):
    page = Page(chromium, address, "guided")
    for box in page.driver.find_elements(By.CSS_SELECTOR, "#tab-guided input[type=checkbox]:checked"):
        box.click()
    page.draw_button.click()
    told = "Classes must be 1 to 10 of them"
    page.until(lambda: told in "".join(toast.text for toast in page.driver.find_elements(By.CLASS_NAME, "toast-body")))


@pytest.mark.parametrize("tab", TABS)
def test_it_fits_a_phone_in_the_dark(chromium, address, tab):
    metrics = {"width": 390, "height": 2300, "deviceScaleFactor": 1, "mobile": True}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page = Page(chromium, address, tab, "?__theme=dark")
        if tab != "guided":  # of which there is a picture
            page.set_steps(12)
        page.draw()
        page.until(page.curves)
        if tab == "guided":
            page.save("phone")
        width, background = page.script(
            "return [document.documentElement.scrollWidth,"
            " getComputedStyle(document.querySelector('.gradio-container')).backgroundColor]"
        )
        assert width <= 390
        assert max(int(part) for part in re.findall(r"\d+", background)[:3]) < 60
    finally:
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
