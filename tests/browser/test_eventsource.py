"""The browser's own EventSource on a view: it comes back by itself, and misses nothing."""

import pytest
from flask import Flask
from flask_apps import make_app, serving
from playwright.sync_api import expect

from flask_llmstream import InferenceRequest, LLMStream
from flask_llmstream.testing import Gate, ScriptedBackend

PAGE = """<!doctype html><title>Resume</title>
<p id="text"></p><p id="state">connecting</p>
<script>
  const show = (id, text) => { document.getElementById(id).textContent = text };
  const source = new EventSource("/ask?q=Hi");
  let text = "";
  source.onmessage = (event) => {
    if (event.data === "[DONE]") return;  // It is left open: the server ends it.
    text += JSON.parse(event.data).token;
    show("text", text);
  };
  source.onerror = () => show("state", ["connecting", "open", "closed"][source.readyState]);
</script>"""

WORDS = [f"word{number} " for number in range(40)]
AT_ONCE = b"retry: 10\n\n"


class CuttingMiddleware:
    """
    Breaks answers off, as a lost connection does.

    Attributes:
        cuts: After how many bytes, one answer after the other; then they hold.
        statuses: Of all answers to EventSource.
        last_ids: What it came back with; None for the first time.
    """

    def __init__(self, app: Flask, cuts):
        self._app = app.wsgi_app
        self.cuts = list(cuts)
        self.statuses = []
        self.last_ids = []

    def __call__(self, environ, start_response):
        if not environ["PATH_INFO"].startswith("/ask"):
            return self._app(environ, start_response)
        self.last_ids.append(environ.get("HTTP_LAST_EVENT_ID"))

        def start(status, *more):
            self.statuses.append(int(status.split()[0]))
            return start_response(status, *more)

        body = self._app(environ, start)
        if self.statuses[-1] != 200:
            return body
        return self._pass_on(body, self.cuts.pop(0) if self.cuts else None)

    def _pass_on(self, body, cut):
        yield AT_ONCE
        try:
            left = cut
            for data in body:
                if left is not None and len(data) >= left:
                    yield data[:left]
                    raise ConnectionResetError("cut")
                left = left and left - len(data)
                yield data
        finally:
            body.close()


@pytest.fixture
def open_page(browser):
    pages = []

    def open_page(url):
        pages.append(browser.new_page())
        pages[-1].goto(url)
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()


def make_service(*script, cuts):
    llm = LLMStream()
    backend = ScriptedBackend(*script)
    llm.add_backend("m", backend)
    app = make_app(llm, resume_seconds=30)

    @app.get("/")
    def show_page():
        return PAGE

    @app.get("/ask")
    def ask():
        return llm.stream(InferenceRequest(prompt="p"))

    app.wsgi_app = CuttingMiddleware(app, cuts)
    return app, backend


def test_a_page_shows_the_whole_text_once_however_often_its_stream_breaks(open_page):
    app, backend = make_service(*WORDS, cuts=[400, 555, 1, 910, 130])
    with serving(app) as url:
        page = open_page(url)
        expect(page.locator("#state")).to_have_text("closed")
        expect(page.locator("#text")).to_have_text("".join(WORDS).strip())

    service = app.wsgi_app
    assert service.cuts == []
    assert service.statuses == [200] * 6 + [204]
    assert service.last_ids[0] is None
    assert all(service.last_ids[1:])
    assert len(backend.requests) == 1


def test_a_page_that_comes_back_reads_on_live(open_page):
    gate = Gate()
    app, backend = make_service(*WORDS[:3], gate, *WORDS[3:], cuts=[300])
    with serving(app) as url:
        page = open_page(url)
        expect(page.locator("#text")).to_have_text("".join(WORDS[:3]).strip())
        assert app.wsgi_app.cuts == []
        gate.open()
        expect(page.locator("#state")).to_have_text("closed")
        expect(page.locator("#text")).to_have_text("".join(WORDS).strip())

    assert app.wsgi_app.statuses[-1] == 204
    assert len(backend.requests) == 1
