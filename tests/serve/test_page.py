"""The page at `/` in a real browser: a conversation, a reload, stop in the middle, widths of a phone and a desk."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from litgpt_kv import LLM, KVCacheArgs
from tests.serve.browser import BROWSER, Browser
from tests.serve.conftest import serving
from tests.serve.test_behaviour import slow_down, until

CACHES = {"h2o": KVCacheArgs("h2o", budget=24), "dense": KVCacheArgs()}


def test_the_page_is_one_file_that_loads_nothing_else(llm: LLM) -> None:
    with serving(llm, CACHES, rows=1) as server:
        answer = httpx.get(server.url)
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http://" not in answer.text and "https://" not in answer.text and "src=" not in answer.text


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_conversation_in_a_browser(llm: LLM, tmp_path: Path) -> None:
    with serving(llm, CACHES, rows=1, drain=2) as server, Browser() as browser:
        browser.open(server.url)
        assert browser.run("document.title") == "litgpt_kv" and browser.run("$('name').textContent") == "demo"
        assert browser.run("[...$('kv_cache').options].map(o => o.value)") == ["h2o", "dense"]
        browser.run(
            "$('temperature').value = 0; $('max_tokens').value = 30; $('max_tokens').dispatchEvent(new Event('change'))"
        )
        said = []
        for turn, text in enumerate(("def fib(n):", "class A(object):")):
            browser.run(f"$('text').value = {text!r}; send(); 0")
            browser.until(f"!stopping && talk.messages.length === {2 * turn + 2} && row && row.texts")
            said.append(browser.run("document.querySelector('.assistant:last-child').textContent"))
        chat = llm.chat(kv_cache=CACHES["h2o"], max_tokens=1024, max_new_tokens=30, temperature=0.0)
        assert said == [chat.ask("def fib(n):"), chat.ask("class A(object):")]
        assert browser.run("$('kept').textContent") == f"h2o: keeps 24 of {chat.cache.seen[0]} tokens"
        assert browser.run("row.shares.length") == browser.run("row.texts.length") == chat.cache.seen[0]
        inked = "[...$('strip').getContext('2d').getImageData(0, 0, $('strip').width, 1).data].some(x => x > 0)"
        assert browser.run(inked)
        for name, size in (("phone", (390, 844)), ("desk", (1280, 800))):
            browser.picture(tmp_path / f"{name}.png", *size)
            assert browser.run("document.documentElement.scrollWidth <= innerWidth")
            assert browser.run("$('send').getBoundingClientRect().bottom <= innerHeight")

        browser.open(server.url)  # a reload: the talk and the settings are still there
        assert browser.run("[...document.querySelectorAll('.turn')].map(t => t.textContent)")[1::2] == said
        assert browser.run("$('max_tokens').value") == "30"
        browser.until("row && row.texts")

        slow_down(server, 0.05)
        browser.run("$('max_tokens').value = 900; $('text').value = 'import os'; send(); 0")
        browser.until("document.querySelector('.assistant:last-child').textContent.length > 5")
        assert browser.run("$('send').textContent") == "Stop"
        browser.run("$('send').click(); 0")
        browser.until("!stopping && $('send').textContent === 'Send' && talk.messages.length === 6")
        until(lambda: server.service.loop.unfinished == 0)
        stopped = browser.run("talk.messages[5].content")
        assert 5 < len(stopped) < 400
        browser.run("$('new').click(); 0")
        assert browser.run("document.querySelectorAll('.turn').length") == 0
        assert browser.complaints == []
