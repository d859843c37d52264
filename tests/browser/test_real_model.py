"""The whole way, once: the browser, gunicorn, the extension, llama.cpp."""

import re

from playwright.sync_api import expect

pytest_plugins = ["model_fixture"]

COUNT_GROWTH = """() => {
  window.growth = 0;
  new MutationObserver((changes) => { growth += changes.length; })
    .observe(document.getElementById("exchanges"), { characterData: true, subtree: true });
}"""


def test_the_small_model_answers(smollm2_path, chat):
    chat.page.evaluate(COUNT_GROWTH)
    chat.the("model").select_option("small")
    chat.send("Why should one rinse rice?")
    expect(chat.reply).to_have_attribute("data-state", "done", timeout=30_000)
    expect(chat.part("text")).to_have_text(re.compile(r"\w+ \w+"))
    expect(chat.part("ttft")).to_have_text(re.compile(r"^\d+\.\d+ s$"))
    expect(chat.part("tps")).to_have_text(re.compile(r"^[\d,.]+ tokens/s$"))
    assert chat.page.evaluate("growth") > 1
