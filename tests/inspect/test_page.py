"""The page of `litgpt_kv inspect` in a real browser: the slider is dragged, layers and heads are chosen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from litgpt_kv.inspect import Record, write_page
from tests.inspect.conftest import CACHES, START, TOTAL
from tests.serve.browser import BROWSER, Browser

LAST = TOTAL - START
SHADED = "panels[{}].spans.map(span => +(/\\ba(\\d+)\\b/.exec(span.className)?.[1] ?? 0))"
HELD = "[...Array(states).keys()].map(s => [...heldBy(panels[{}].cache.left, s, chosenRows())])"


def drag(browser: Browser, selector: str, start: float, stop: float, down: float = 0.5) -> None:
    """Press the mouse on an element, at a share of its width, move to another and let go."""
    browser.run(f"{selector}.scrollIntoView({{block: 'center'}})")
    box = browser.run(f"(({{x, y, width, height}}) => ({{x, y, width, height}}))({selector}.getBoundingClientRect())")
    xs = [box["x"] + box["width"] * share for share in (start, (start + stop) / 2, stop)]
    y = box["y"] + box["height"] * down
    mouse = dict(button="left", buttons=1, clickCount=1, y=y)
    browser.call("Input.dispatchMouseEvent", type="mousePressed", x=xs[0], **mouse)
    for x in xs[1:]:
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, **mouse)
    browser.call("Input.dispatchMouseEvent", type="mouseReleased", x=xs[2], **{**mouse, "buttons": 0})
    browser.run("new Promise(requestAnimationFrame).then(() => new Promise(requestAnimationFrame)).then(() => 0)")


def pick(browser: Browser, id: str, value: object) -> None:
    browser.run(f"$('{id}').value = '{value}'; $('{id}').dispatchEvent(new Event('change')); draw(); 0")


def press(browser: Browser, key: str) -> None:
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])
    browser.run("draw(); 0")


KEYS = {"ArrowLeft": 37, "ArrowRight": 39}


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_the_slider_is_dragged_and_the_shades_follow(found: Record, tmp_path: Path) -> None:
    write_page(found, tmp_path / "page.html")
    with Browser() as browser:
        browser.call("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
        browser.open((tmp_path / "page.html").as_uri(), "document.body.dataset.ready === 'yes'")
        assert browser.run("[...document.querySelectorAll('h2')].map(h => h.textContent)") == [*CACHES]
        assert browser.run("$('at').textContent") == f"{LAST} of {LAST} · {TOTAL} tokens read"

        for number, name in enumerate(CACHES):  # the page holds what the caches held, at every step
            kept = np.stack([found.kept(name, state) for state in range(LAST + 1)])
            assert browser.run(HELD.format(number)) == kept.sum((1, 2)).tolist()
        shaded = [browser.run(SHADED.format(number)) for number in range(len(CACHES))]
        for name, shades in zip(CACHES, shaded):
            assert shades == np.ceil(found.kept(name, LAST).sum((0, 1)) / 18 * 10).tolist()

        drag(browser, "$('step')", 0.99, 0.3)
        state = browser.run("state()")
        assert 0 < state < LAST / 2
        assert browser.run("$('at').textContent") == f"{state} of {LAST} · {START + state} tokens read"
        kept = found.kept("h2o", state)
        assert browser.run(SHADED.format(0)) == np.ceil(kept.sum((0, 1)) / 18 * 10).tolist() != shaded[0]
        assert browser.run("panels[0].spans.filter(s => s.classList.contains('unread')).length") == LAST - state
        assert browser.run("panels[0].dd.kept.textContent") == f"12 of {START + state}, mean"
        kl, lost = found.cache("h2o").kl, found.cache("h2o").lost
        assert browser.run("panels[0].dd.kl.textContent").split()[0] == browser.run(f"plain({kl[state]})")
        assert browser.run("panels[0].dd.lost.textContent").split()[0] == browser.run(f"percent({lost[state].mean()})")
        words = [found.words[id] for id in (found.cache("h2o").best[state, 0], found.best[state, 0])]
        assert browser.run("panels[0].next.title").startswith(browser.run(f"'Most probable: ' + quoted({words[0]!r})"))

        pick(browser, "layer", 2), pick(browser, "head", 1)  # one head: all or nothing
        for number, name in enumerate(CACHES):
            assert browser.run(SHADED.format(number)) == (10 * found.kept(name, state)[2, 1]).tolist()
        assert browser.run("panels[0].dd.lost.textContent").split()[0] == browser.run(f"percent({lost[state, 2]})")

        browser.run("$('step').focus(); 0")
        press(browser, "ArrowRight")
        assert browser.run("state()") == state + 1
        browser.run("panels[0].text.focus(); 0")  # the arrow keys of a text choose a token, at first the newest one
        press(browser, "ArrowLeft")
        press(browser, "ArrowLeft")
        at = START + state - 1
        assert browser.run("chosen") == at
        said = browser.run("panels[0].about.textContent")
        is_held = "kept" if found.kept("h2o", state + 1)[2, 1, at] else "lost"
        assert said.startswith(f"Token {at} ") and f": {is_held} by the chosen head; " in said

        drag(browser, "panels[3].map", 0.2, 0.51, down=0.99)  # the map sets step and token
        assert browser.run("state()") == LAST and browser.run("chosen") == TOTAL // 2
        inked = "panels.every(p => ['kl', 'lost', 'map'].every(n => p[n].getContext('2d')" + (
            ".getImageData(0, 0, p[n].width, p[n].height).data.some(x => x > 0)))"
        )
        assert browser.run(inked)
        for theme, ink in (("dark", "rgb(230, 237, 243)"), ("light", "rgb(27, 31, 36)")):
            media = [{"name": "prefers-color-scheme", "value": theme}]
            browser.call("Emulation.setEmulatedMedia", features=media)
            for name, size in (("phone", (390, 844)), ("desk", (1280, 800))):
                browser.picture(tmp_path / f"{theme}-{name}.png", *size)
                assert browser.run("document.documentElement.scrollWidth <= innerWidth")
            assert browser.run("getComputedStyle(document.body).color") == ink
        assert browser.complaints == []
