"""The page says what report.md says, needs nothing else, and keeps within the window of a browser."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from compactlm_nemo.report.page import page

TEXT = """# a run <b>

| model | a long heading of a column | another long heading | a third one that is long | a fourth one, longer |
| --- | ---: | ---: | ---: | ---: |
| teacher &amp; <script>alert(1)</script> | 134,515,008 | 2.9423 | 3.1837 | 0.1234567890 |

A_word_without_any_space_that_is_longer_than_a_telephone_is_wide_and_would_push_the_page_to_the_side_if_it_were_not_broken

![Loss over tokens, "pruned" & distilled](loss.png)
![Sizes](sizes.png)
"""


def figure(width: float) -> Figure:
    drawn = Figure(figsize=(width, 4))
    axes = drawn.subplots()
    axes.plot([0, 1], [1, 2], color="black", marker="o", markerfacecolor="white", label="a <line>")
    axes.set_title("Loss")
    axes.legend()
    return drawn


@pytest.fixture(scope="module")
def made() -> str:
    return page(TEXT, {"loss.png": figure(12), "sizes.png": figure(6)})


def test_pictures_are_in_the_page_with_the_text_that_stands_for_them(made: str) -> None:
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", made)
    assert captions == ["Loss over tokens, &quot;pruned&quot; &amp; distilled", "Sizes"]
    labels = re.findall(r'role="img" aria-label="(.*?)"', made)
    assert labels == captions and "<img" not in made
    drawings = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", made, re.DOTALL)]
    assert len(drawings) == 2
    names = {element.get("id") for svg in drawings for element in svg.iter() if element.get("id", "").startswith("p")}
    assert "a <line>" in [text.text for text in drawings[0].iter("{http://www.w3.org/2000/svg}text")]
    assert len([each for each in names if each and len(each) == 11]) == 2  # clip paths of one do not clip the other


def test_nothing_is_fetched_or_run_and_data_is_text(made: str) -> None:
    assert "<script" not in made and "&lt;script&gt;alert(1)" in made and "<title>a run &lt;b&gt;</title>" in made
    assert not re.search(r'(src|href)="(?!#)', made), "no address but places in the page"
    assert "default-src 'none'" in made
    colours = set(
        re.findall(r"#(?:000000|ffffff)\b", re.sub(r"<style>.*?</style>", "", made, count=1, flags=re.DOTALL))
    )
    assert colours == set() and "currentColor" in made


def test_a_page_is_the_same_each_time_and_needs_every_picture(made: str) -> None:
    assert page(TEXT, {"loss.png": figure(12), "sizes.png": figure(6)}) == made
    with pytest.raises(KeyError, match=r"sizes\.png"):
        page(TEXT, {"loss.png": figure(12)})


# --- in a browser ------------------------------------------------------------------------------------------------

BEYOND = """
const frame = document.documentElement.clientWidth;
return {
  width: frame,
  scrolls: document.documentElement.scrollWidth,
  beyond: [...document.body.querySelectorAll('*')].filter(e => !e.closest('.wide > *')
    && e.getBoundingClientRect().right > frame + 1).map(e => e.tagName),
  ink: getComputedStyle(document.body).color,
  text: getComputedStyle(document.querySelector('svg text')).fill,
  letters: Math.min(...[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height)),
};
"""
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


class Browser:
    """Chromium by its driver's protocol, which is JSON over HTTP."""

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"

    def ask(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def look(self, place: Path, width: int, dark: bool) -> dict[str, Any]:
        options = {"args": [*FLAGS, f"--user-data-dir={place.parent / f'{width}{dark}'}"]}
        capabilities = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        session = f"/session/{self.ask('/session', capabilities)['sessionId']}"
        try:
            screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            for command, params in (
                ("Emulation.setDeviceMetricsOverride", screen),
                ("Emulation.setEmulatedMedia", {"features": [scheme]}),
            ):
                self.ask(f"{session}/goog/cdp/execute", {"cmd": command, "params": params})
            self.ask(f"{session}/url", {"url": place.as_uri()})
            seen: dict[str, Any] = self.ask(f"{session}/execute/sync", {"script": BEYOND, "args": []})
            return seen
        finally:
            self.ask(session, method="DELETE")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    driver = shutil.which("chromedriver")
    if driver is None or shutil.which("chromium") is None:
        pytest.skip("chromium and chromium-driver of the distribution are not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        found = Browser(port)
        for _ in range(100):
            try:
                if found.ask("/status", method="GET")["ready"]:
                    break
            except OSError:
                time.sleep(0.2)
        yield found
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_nothing_lies_beyond_the_window(browser: Browser, made: str, tmp_path: Path, width: int, dark: bool) -> None:
    (tmp_path / "report.html").write_text(made)
    seen = browser.look(tmp_path / "report.html", width, dark)
    assert width - 20 <= seen["width"] <= width, "but for the bar at the side"
    assert seen["scrolls"] <= seen["width"] and seen["beyond"] == []
    assert seen["text"] == seen["ink"] == ("rgb(230, 233, 237)" if dark else "rgb(27, 31, 36)")
    assert seen["letters"] >= 7
