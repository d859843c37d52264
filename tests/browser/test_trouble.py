"""Whatever goes wrong is said where the answer would be, and can be tried again."""

import pytest
from playwright.sync_api import expect

from .pages import ChatPage


def expect_error(chat, code, message, text=""):
    chat.expect_reply("failed", text)
    expect(chat.reply).to_have_attribute("data-error-code", code)
    expect(chat.part("error").locator("p")).to_have_text(message)


def retry(chat, server):
    """Press the button; the new answer replaces what there was."""
    chat.part("retry").click()
    answer = server.next_answer()
    chat.expect_reply("waiting", "")
    expect(chat.part("error")).to_be_hidden()
    answer.write("At last.")
    answer.finish()
    chat.expect_reply("done", "At last.")
    expect(chat.replies).to_have_count(1)


def test_an_error_before_the_first_token_has_its_message_and_a_retry(chat, server, watch):
    watch.allow("status of 429")
    chat.ask().fail("QueueFullError", "Too many are asking.", retry_after=3)
    expect_error(chat, "queue_full", "Too many are asking. Best wait 3 s.")
    expect(chat.part("text")).to_be_hidden()
    retry(chat, server)


def test_an_error_in_the_stream_keeps_what_was_written(chat, server):
    answer = chat.ask()
    answer.write("Because it")
    chat.expect_reply("writing", "Because it")
    answer.fail("UpstreamError", "The model is gone.")
    expect_error(
        chat, "upstream_error", "The answer broke off. The model is gone.", text="Because it"
    )
    retry(chat, server)


def test_a_lost_connection_is_noticed(chat, server, watch):
    watch.allow("net::ERR_")
    chat.ask().write("Because it")
    chat.expect_reply("writing", "Because it")
    server.kill_worker()
    expect_error(
        chat, "network", "The answer broke off. The connection was lost.", text="Because it"
    )
    retry(chat, server)


def test_a_server_that_is_not_there_is_told(chat, server, watch):
    watch.allow("net::ERR_CONNECTION_REFUSED")
    address = "**/v1/chat/completions"
    chat.page.route(address, lambda route: route.abort("connectionrefused"))
    chat.send("Why?")
    expect_error(chat, "network", "The server cannot be reached.")
    chat.page.unroute(address)
    retry(chat, server)


def test_being_offline_is_told(chat, server, watch):
    watch.allow("net::ERR_INTERNET_DISCONNECTED")
    chat.page.context.set_offline(True)
    chat.send("Why?")
    expect_error(chat, "network", "You are offline.")
    chat.page.context.set_offline(False)
    retry(chat, server)


CHUNK = 'data: {"choices": [{"index": 0, "delta": {"content": "Because it"}}]}\n\n'
INCOMPLETE = "The server closed the connection before the end."


@pytest.mark.parametrize(
    ("answer", "complaint", "code", "message", "text"),
    [
        pytest.param(
            {"status": 502, "body": "<h1>Bad gateway</h1>", "content_type": "text/html"},
            "status of 502",
            "http_502",
            "The server answered 502.",
            "",
            id="a proxy's page",
        ),
        pytest.param(
            {"body": "<h1>Sign in</h1>", "content_type": "text/html"},
            None,
            "not_a_stream",
            "The server answered with something else than a stream.",
            "",
            id="no stream",
        ),
        pytest.param(
            {"body": CHUNK, "content_type": "text/event-stream"},
            None,
            "stream_incomplete",
            f"The answer broke off. {INCOMPLETE}",
            "Because it",
            id="no end",
        ),
        pytest.param(
            {"body": ": ping\n\n", "content_type": "text/event-stream"},
            None,
            "stream_incomplete",
            INCOMPLETE,
            "",
            id="nothing",
        ),
        pytest.param(
            {"body": CHUNK + "data: {\n\n", "content_type": "text/event-stream"},
            None,
            "bad_event",
            "The answer broke off. The server sent something that cannot be read.",
            "Because it",
            id="no JSON",
        ),
    ],
)
def test_an_answer_of_something_else_is_told(
    chat, server, watch, answer, complaint, code, message, text
):
    if complaint:
        watch.allow(complaint)
    address = "**/v1/chat/completions"
    chat.page.route(address, lambda route: route.fulfill(**answer))
    chat.send("Why?")
    expect_error(chat, code, message, text)
    chat.page.unroute(address)
    retry(chat, server)


def test_a_retry_asks_the_model_that_is_selected_now(chat, watch):
    watch.allow("status of 503")
    chat.ask("Leeks?").fail("EngineClosedError", "Closed.")
    expect_error(chat, "engine_closed", "Closed. Best wait 1 s.")
    chat.the("model").select_option("cookbook")
    chat.part("retry").click()
    chat.expect_reply("done")
    expect(chat.part("text")).to_contain_text("From the cookbook:")


def test_an_error_survives_a_reload(chat, server, watch):
    watch.allow("status of 429")
    chat.ask().fail("QueueFullError", "Too many are asking.")
    expect_error(chat, "queue_full", "Too many are asking. Best wait 1 s.")
    chat.page.reload()
    expect_error(chat, "queue_full", "Too many are asking. Best wait 1 s.")
    retry(chat, server)


def test_storage_that_is_full_does_not_stop_the_talk(new_page, server):
    page = new_page()
    page.add_init_script("Storage.prototype.setItem = () => { throw new Error('full'); };")
    ChatPage(page, server).open().ask_and_answer("Why?", "Because.")
