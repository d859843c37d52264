"""The whole way, once: the browser, gunicorn, the extension, llama.cpp."""

import re

from playwright.sync_api import expect

pytest_plugins = ["model_fixture"]


def test_the_small_model_answers(smollm2_path, chat):
    chat.the("model").select_option("small")
    chat.send("Why should one rinse rice?")
    expect(chat.reply).to_have_attribute("data-state", "writing")
    chat.the("stop").click()
    chat.expect_reply("stopped", re.compile(r"\w+"))
    chat.send("Say hello.")
    expect(chat.reply).to_have_attribute("data-state", "done", timeout=30_000)
    expect(chat.part("text")).to_have_text(re.compile(r"\w+"))
    expect(chat.part("tps")).to_have_text(re.compile("tokens/s"))
