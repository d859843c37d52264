"""Chromium, the server and the pages of these tests."""

import os
import re
import shutil

import pytest

from .pages import ChatPage
from .server import Server

ARGUMENTS = [
    "--no-sandbox",  # Containers run as root, which Chromium's sandbox refuses.
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def chromium():
    """The browser's file."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path is None:
        pytest.skip("needs Debian's package chromium, or CHROMIUM=/path/to/it")
    return path


@pytest.fixture(scope="module")
def server(chromium, tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


# Of the module, not of the session: as long as Playwright's synchronous API is in use,
# its event loop counts as running, and no other test could have one of its own.
@pytest.fixture(scope="module")
def browser(chromium, server):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tab(browser, server):
    """One for the whole module: a new one takes as long as most of the tests."""
    context = new_context(browser, server)
    yield context.new_page()
    context.close()


def new_context(browser, server, **options):
    options = {"viewport": {"width": 1000, "height": 700}, **options}
    # An animation costs a core, where there is nothing but cores to draw it.
    context = browser.new_context(base_url=server.url, reduced_motion="reduce", **options)
    context.set_default_timeout(10_000)
    return context


class Watch:
    """What a page complains of: errors, warnings, violations of its policy, dialogs."""

    def __init__(self):
        self._complaints = []
        self._allowed = []

    def start(self, page):
        for event, listener in self._listeners():
            page.on(event, listener)

    def stop(self, page):
        for event, listener in self._listeners():
            page.remove_listener(event, listener)

    def _listeners(self):
        return (
            ("console", self._on_console),
            ("pageerror", self._on_page_error),
            ("dialog", self._on_dialog),
        )

    def _on_page_error(self, error):
        self._complaints.append(f"uncaught: {error}")

    def _on_console(self, message):
        if message.type in {"error", "warning"}:
            self._complaints.append(f"{message.type}: {message.text}")

    def _on_dialog(self, dialog):
        self._complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def allow(self, pattern):
        """Expect a complaint that *pattern* is found in."""
        self._allowed.append(pattern)

    def check(self):
        patterns = self._allowed
        seen = {p for p in patterns for each in self._complaints if re.search(p, each)}
        assert seen == set(patterns)
        left = [c for c in self._complaints if not any(re.search(p, c) for p in patterns)]
        assert left == []


@pytest.fixture
def watch():
    """Every page of the test is watched; what is not allowed fails it."""
    watch = Watch()
    yield watch
    watch.check()


@pytest.fixture
def page(tab, server, watch):
    """A tab on a desktop that remembers nothing."""
    server.start_over()
    watch.start(tab)
    yield tab
    tab.unroute_all()
    tab.context.set_offline(False)
    tab.goto("/")  # Has no script that would store anything.
    tab.evaluate("sessionStorage.clear()")
    watch.stop(tab)


@pytest.fixture
def new_page(browser, server, watch):
    """Makes a page in a context of its own, with the options that it is given."""
    server.start_over()
    contexts = []

    def new_page(**options):
        contexts.append(new_context(browser, server, **options))
        page = contexts[-1].new_page()
        watch.start(page)
        return page

    yield new_page
    for context in contexts:
        context.close()


@pytest.fixture
def chat(page, server):
    """The chat page on a desktop, with its models."""
    return ChatPage(page, server).open()
