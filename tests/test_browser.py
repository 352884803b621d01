"""The viewers in a real browser: JupyterLab, Chromium, a mouse and a keyboard.

Needs the Python package `playwright` and a Chromium that the system brings; without them the tests are skipped.
Pictures of what was seen are left in the folder MEDVOL_SHOTS, if it is set.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

SETUP = """
import numpy as np
from pathlib import Path
from medvol_nb import phantoms
from medvol_nb.core import rng_for
from medvol_nb.review import run_browser
from medvol_nb.slices import Planes
from medvol_nb.viewer import label_browser, match_browser, niivue, patch_browser, viewer
from medvol_nb.volume import Volume, affine_from, reorient, write_volume
from medvol_nb.widgets import browse
body = phantoms.abdomen()
ct = Volume(body.img, affine_from(body.spacing))
lbl = reorient(Volume(body.lbl, ct.affine), "LAS")
write_volume(ct, "ct.zarr", "overwrite", chunks=16)
"""
CELLS = {
    "walk": "walk = browse('ct.zarr', {'organs': lbl}, limits=(-160, 300), names=body.names)\nwalk",
    "three": "three = viewer(ct, {'organs': lbl}, limits=(-160, 300), names=body.names)\nthree",
    "list": "organs = label_browser(ct, lbl, body.names, limits=(-160, 300), size=400)\norgans",
    "gpu": "turning = niivue(ct, lbl, limits=(-160, 300))\nturning",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder with a notebook of all viewers"
    import nbformat

    home = tmp_path_factory.mktemp("lab")
    cells = [nbformat.v4.new_code_cell(s, metadata={"tags": [t]}) for t, s in [("setup", SETUP), *CELLS.items()]]
    note = nbformat.v4.new_notebook(
        cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    nbformat.write(note, home / "viewers.ipynb")
    return home


@pytest.fixture(scope="module")
def lab(folder):
    "A JupyterLab of its own: no token, private settings, a free port"
    private = {k: str(folder / f".{k}") for k in ("config", "data", "runtime")}
    env = {
        **os.environ,
        **{f"JUPYTER_{k.upper()}_DIR": v for k, v in private.items()},
        "IN_TEST": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    settings = [
        "--ServerApp.token=",
        "--ServerApp.password=",
        "--no-browser",
        "--allow-root",
        "--ServerApp.port=0",
        f"--ServerApp.root_dir={folder}",
    ]
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *settings],
            env=env,
            stdout=log,
            stderr=log,
            cwd=folder,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while not (found := list((folder / ".runtime").glob("jpserver-*.json"))):
            assert server.poll() is None and time.monotonic() < deadline, (folder / "lab.log").read_text()[-3000:]
            time.sleep(0.2)
        url = json.loads(found[0].read_text())["url"]
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(url + "api") as answer:
                if answer.status == 200:
                    break
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def page(lab):
    "The notebook, with all its cells run"
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as play:
        options = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
        browser = play.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page(viewport={"width": 1400, "height": 1200})
        page.set_default_timeout(60_000)
        # JupyterLab sometimes asks which kernel to take, while the one that the notebook names is starting
        ask = page.locator(".jp-Dialog")
        page.add_locator_handler(ask, lambda: ask.locator(".jp-mod-accept").click())
        page.goto(lab + "lab/tree/viewers.ipynb")
        try:
            run_all(page)
        except Exception:
            shot(page, "start_failed")
            raise
        yield page
        browser.close()


def run_all(page):
    "Run all cells; a kernel that has only just started may drop what was sent to it, so up to three times"
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", state="attached")
    numbered = """() => [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')]
        .filter(p => /[0-9]/.test(p.textContent)).length"""
    for _ in range(3):
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
        with contextlib.suppress(AssertionError):
            until(lambda: page.evaluate(numbered) == 1 + len(CELLS), 30)
            return
    raise AssertionError("the cells did not run")


def cell(page, tag):
    "The cell of a viewer, on the screen, with its pictures there"
    n = 1 + list(CELLS).index(tag)
    found = page.locator(".jp-Notebook .jp-CodeCell").nth(n)
    found.scroll_into_view_if_needed()
    try:
        found.locator(".widget-html, canvas").first.wait_for(timeout=60_000)
    except Exception:
        shot(page, f"{tag}_missing")
        raise
    return found


def shot(page, name):
    if where := os.environ.get("MEDVOL_SHOTS"):
        page.screenshot(path=str(Path(where) / f"{name}.png"))


def pixels(picture):
    "What a picture shows, as a string that changes with it"
    return picture.evaluate("""async (img) => { await img.decode(); const c = document.createElement('canvas');
        c.width = img.naturalWidth; c.height = img.naturalHeight; const g = c.getContext('2d'); g.drawImage(img, 0, 0);
        return c.toDataURL(); }""")


def until(check, seconds=30):
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "nothing changed"
        time.sleep(0.1)


def test_slices_turn_by_keyboard_and_wheel(page):
    walk = cell(page, "walk")
    picture = walk.locator("img.medvol-picture")
    assert picture.count() == 1 and picture.evaluate("i => [i.width, i.naturalWidth]") == [512, 64]
    before, number = pixels(picture), walk.locator(".widget-inline-hbox", has_text="slice").locator(".widget-readout")
    at = int(number.inner_text())
    walk.locator(".widget-inline-hbox", has_text="slice").locator(".noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    until(lambda: int(number.inner_text()) == at + 1 and pixels(picture) != before)
    picture.hover()
    page.mouse.wheel(0, 100)
    until(lambda: int(number.inner_text()) == at + 2)
    shot(page, "walk")


def test_a_click_tells_what_is_there(page):
    walk = cell(page, "walk")
    picture, told = walk.locator("img.medvol-picture"), walk.locator(".widget-html").last
    assert told.inner_text() == "left R, right L, top A, bottom P"
    picture.click(position={"x": 152, "y": 240})
    until(lambda: "mm" in told.inner_text())
    x = int(told.inner_text().split(",")[0].removeprefix("x "))
    assert x == 63 - 152 * 64 // 512  # the patient's right, where x is large, is on the left
    walk.get_by_role("button", name="sagittal").click()
    number = walk.locator(".widget-inline-hbox", has_text="slice").locator(".widget-readout")
    until(lambda: number.inner_text() == str(x))
    shot(page, "sagittal")


def test_three_planes_follow_a_click(page):
    three = cell(page, "three")
    pictures = three.locator("img.medvol-picture")
    assert pictures.count() == 3
    before = [pixels(pictures.nth(k)) for k in range(3)]
    pictures.nth(0).click(position={"x": 60, "y": 80})
    until(lambda: all(pixels(pictures.nth(k)) != before[k] for k in (1, 2)))
    shot(page, "three")


def test_a_label_is_found(page):
    organs = cell(page, "list")
    organs.locator("select").first.select_option(index=1)
    told = organs.locator(".widget-html").last
    until(lambda: "labels 2" in told.inner_text() or "mm" in told.inner_text())
    organs.get_by_text("only this one").click()
    time.sleep(1)
    shot(page, "list")


def test_niivue_draws(page):
    gpu = cell(page, "gpu")
    canvas = gpu.locator("canvas").first
    canvas.wait_for()
    time.sleep(3)
    canvas.scroll_into_view_if_needed()
    shot(page, "niivue")
    size = canvas.evaluate("c => [c.width, c.height]")
    assert min(size) > 100
    import io

    import numpy as np
    from PIL import Image

    seen = np.asarray(Image.open(io.BytesIO(canvas.screenshot())).convert("RGB"))
    assert (np.ptp(seen.astype(int), axis=-1) > 60).mean() > 0.005, "no coloured label is drawn"
