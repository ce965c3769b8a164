"""The page, in headless Chromium where there is one."""

import shutil

import httpx
import pytest
from servers import Process

CHROMIUM = shutil.which("chromium")


def test_the_page_asks_no_other_host(process: Process) -> None:
    page = httpx.get(process.url)
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy
    assert page.text.replace("http://www.w3.org/2000/svg", "").count("://") == 0  # the name of SVG is asked of nobody


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_message_is_answered_on_the_page(process: Process) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking"])
        page = browser.new_page(color_scheme="dark", viewport={"width": 390, "height": 800})
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(process.url)
        page.wait_for_selector("#state:has-text('tiny-chat')")
        page.fill("[name=max_tokens]", "24")
        page.keyboard.press("Tab")
        page.focus("#text")
        page.keyboard.type("Hello")
        page.keyboard.press("Enter")
        page.wait_for_selector("article.assistant .note:has-text('tokens ·')")
        page.keyboard.press("Alt+n")
        page.fill("[name=max_tokens]", "4000")
        page.fill("#text", "Go on")
        page.keyboard.press("Enter")
        page.wait_for_selector("article.assistant:last-child span:nth-child(3):not(:empty)")
        page.keyboard.press("Escape")
        page.wait_for_selector("article.assistant .note:has-text('stopped')")
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert said == []
        browser.close()
