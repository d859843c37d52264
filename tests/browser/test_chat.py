"""Talking: sending, watching, stopping, and what the page remembers."""

import re

from playwright.sync_api import expect

from .pages import ChatPage


def test_each_token_is_shown_before_the_next_is_let_out(chat):
    answer = chat.ask("Why rinse rice?")
    chat.expect_reply("waiting", "")
    shown = ""
    for token in ["Rinse", " it", " twice", ".\n", "Then boil it."]:
        answer.write(token)
        shown += token
        chat.expect_reply("writing", shown)
    answer.finish(completion_tokens=5)
    chat.expect_reply("done", shown)
    expect(chat.part("error")).to_be_hidden()
    expect(chat.part("note")).to_be_hidden()


def test_stop_takes_the_place_of_send(chat):
    expect(chat.the("send")).to_be_visible()
    expect(chat.the("stop")).to_be_hidden()
    answer = chat.ask()
    for _ in range(2):
        expect(chat.the("send")).to_be_hidden()
        expect(chat.the("stop")).to_be_visible()
        answer.write("Because ")
        chat.expect_reply("writing")
    answer.finish()
    expect(chat.the("send")).to_be_visible()
    expect(chat.the("stop")).to_be_hidden()


def test_the_first_tokens_time_and_the_pace_are_shown(chat):
    answer = chat.ask()
    expect(chat.part("ttft")).to_be_hidden()
    answer.write("Because ")
    expect(chat.part("ttft")).to_have_text(re.compile(r"^\d+\.\d+ s$"))
    expect(chat.part("tps")).to_be_hidden()
    answer.write("it is so.")
    answer.finish()
    expect(chat.part("tps")).to_have_text(re.compile(r"^[\d,.]+ tokens/s$"))


def test_stop_cancels_and_keeps_what_was_written(chat):
    answer = chat.ask("Why?")
    answer.write("Because it")
    chat.expect_reply("writing", "Because it")
    chat.the("stop").click()
    answer.wait_for_cancel()
    chat.expect_reply("stopped", "Because it")
    expect(chat.part("note")).to_have_text("You stopped this answer.")
    expect(chat.the("prompt")).to_be_focused()
    assert chat.ask("And then?").messages == [
        ("user", "Why?"),
        ("assistant", "Because it"),
        ("user", "And then?"),
    ]


def test_stop_cancels_before_the_first_token(chat):
    answer = chat.ask()
    chat.expect_reply("waiting")
    chat.the("stop").click()
    answer.wait_for_cancel()
    chat.expect_reply("stopped")
    expect(chat.part("text")).to_be_hidden()


def test_escape_stops(chat):
    answer = chat.ask()
    answer.write("Because")
    chat.expect_reply("writing", "Because")
    chat.page.keyboard.press("Escape")
    answer.wait_for_cancel()
    chat.expect_reply("stopped", "Because")


def test_leaving_the_page_cancels(chat):
    answer = chat.ask()
    answer.write("Because")
    chat.expect_reply("writing", "Because")
    chat.page.goto("/")
    answer.wait_for_cancel()


def test_enter_sends_and_shift_enter_starts_a_line(chat, server):
    prompt = chat.the("prompt")
    low = prompt.bounding_box()["height"]
    prompt.press_sequentially("one")
    prompt.press("Shift+Enter")
    prompt.press_sequentially("two")
    expect(prompt).to_have_value("one\ntwo")
    assert prompt.bounding_box()["height"] > low
    prompt.press("Enter")
    assert server.next_answer().question == "one\ntwo"
    expect(prompt).to_have_value("")
    assert prompt.bounding_box()["height"] == low


def test_the_button_sends_too(chat, server):
    chat.the("prompt").fill("Why?")
    chat.the("send").click()
    assert server.next_answer().question == "Why?"


def test_nothing_is_sent_without_a_question(chat, server):
    chat.send(" \n ")
    expect(chat.replies).to_have_count(0)
    assert not server.has_other_requests()


def test_enter_that_picks_a_word_of_an_input_method_does_not_send(chat, server):
    chat.the("prompt").fill("こめ")
    chat.the("prompt").dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    expect(chat.the("prompt")).to_have_value("こめ")
    expect(chat.replies).to_have_count(0)
    assert not server.has_other_requests()


def test_one_answer_at_a_time(chat, server):
    answer = chat.ask("First?")
    chat.send("Second?")
    expect(chat.replies).to_have_count(1)
    expect(chat.the("prompt")).to_have_value("Second?")
    answer.write("First.")
    answer.finish()
    chat.expect_reply("done", "First.")
    assert not server.has_other_requests()
    expect(chat.the("prompt")).to_have_value("Second?")


def test_an_example_is_put_into_the_prompt(chat):
    example = chat.page.locator(".example").first
    question = example.inner_text()
    example.click()
    expect(chat.the("prompt")).to_have_value(question)
    expect(chat.the("prompt")).to_be_focused()


def test_an_unusual_end_is_told(chat):
    for reason, text, note in (
        ("length", "Because", "The answer reached its length limit."),
        ("content_filter", "Because", "The answer was cut by a content filter."),
        ("stop", "", "The model had nothing to say."),
    ):
        answer = chat.ask()
        if text:
            answer.write(text)
        answer.finish(reason)
        chat.expect_reply("done")
        expect(chat.part("note")).to_have_text(note)


# What goes along, and what stays.


def test_the_conversation_goes_along(chat):
    chat.ask_and_answer("One?", "One.")
    answer = chat.ask("Two?")
    assert answer.messages == [("user", "One?"), ("assistant", "One."), ("user", "Two?")]


def test_a_question_without_an_answer_is_left_out(chat, watch):
    watch.allow("status of 503")
    chat.ask("One?").fail("EngineClosedError", "Closed.")
    chat.expect_reply("failed")
    assert chat.ask("Two?").messages == [("user", "Two?")]


def test_only_as_much_goes_along_as_the_model_can_hold(chat):
    long = "long " * 300
    for number in range(4):
        chat.ask_and_answer(f"Question {number}?", long.strip())
    questions = [text for role, text in chat.ask("Last?").messages if role == "user"]
    assert questions == ["Question 2?", "Question 3?", "Last?"]


def test_a_reload_keeps_the_conversation(chat):
    chat.ask_and_answer("One?", "One.")
    chat.ask("Two?").write("Half of")
    chat.expect_reply("writing", "Half of")
    chat.page.reload()
    expect(chat.page.locator("[data-role=user]")).to_have_text(
        [re.compile("One"), re.compile("Two")]
    )
    expect(chat.replies.first.get_by_test_id("text")).to_have_text("One.")
    expect(chat.replies.first).to_have_attribute("data-state", "done")
    chat.expect_reply("failed", "Half of")
    expect(chat.reply).to_have_attribute("data-error-code", "interrupted")


def test_an_interrupted_answer_is_asked_for_again(chat, server):
    chat.ask("One?").write("Half of")
    chat.expect_reply("writing", "Half of")
    chat.page.reload()
    chat.part("retry").click()
    answer = server.next_answer()
    assert answer.messages == [("user", "One?")]
    answer.write("The whole.")
    answer.finish()
    chat.expect_reply("done", "The whole.")
    expect(chat.replies).to_have_count(1)


def test_another_tab_has_a_conversation_of_its_own(chat, server):
    chat.ask_and_answer("One?", "One.")
    with chat.page.context.new_page() as page:
        other = ChatPage(page, server).open()
        expect(other.replies).to_have_count(0)


def test_clear_forgets(chat):
    expect(chat.the("clear")).to_be_hidden()
    chat.ask_and_answer("One?", "One.")
    chat.the("clear").click()
    expect(chat.replies).to_have_count(0)
    chat.page.reload()
    expect(chat.page.locator("#welcome")).to_be_visible()
    expect(chat.replies).to_have_count(0)


# The models.


def test_the_model_that_is_selected_answers(chat, server):
    expect(chat.the("model").locator("option")).to_have_text(["small", "cookbook", "remote"])
    chat.the("model").select_option("cookbook")
    chat.send("What can I cook with leeks?")
    chat.expect_reply("done")
    expect(chat.part("text")).to_contain_text("Leek and potato soup, 40 minutes.")
    expect(chat.reply).to_contain_text("cookbook")
    assert not server.has_other_requests()


def test_the_choice_of_a_model_survives_a_reload(chat):
    chat.the("model").select_option("cookbook")
    chat.page.reload()
    expect(chat.the("model")).to_have_value("cookbook")


def test_without_a_list_of_models_the_server_chooses(page, server, watch):
    watch.allow("status of 500")
    chat = ChatPage(page, server)
    chat.page.route("**/v1/models", lambda route: route.fulfill(status=500, body="{}"))
    chat.page.goto("/chat")
    expect(chat.the("model").locator("option")).to_have_text("default")
    chat.ask_and_answer("Why?", "Because.")


# Following the text.

LINES = "A line of its own.\n" * 60


def scroll_gap(chat):
    """How far, in pixels, the end of the text is below what is shown."""
    return chat.the("transcript").evaluate("e => e.scrollHeight - e.clientHeight - e.scrollTop")


def wait_for_scroll(chat, condition):
    chat.page.wait_for_function(
        "condition => { const e = document.getElementById('transcript');"
        " const gap = e.scrollHeight - e.clientHeight - e.scrollTop;"
        " return condition === 'end' ? gap < 2 : gap > 300; }",
        arg=condition,
    )


def test_the_end_is_followed_until_the_reader_scrolls_up(chat):
    answer = chat.ask()
    answer.write(LINES)
    wait_for_scroll(chat, "end")
    expect(chat.the("latest")).to_be_hidden()
    chat.the("transcript").hover()
    chat.page.mouse.wheel(0, -400)
    wait_for_scroll(chat, "up")
    expect(chat.the("latest")).to_be_visible()
    before = chat.the("transcript").evaluate("e => e.scrollTop")
    answer.write("The end.")
    expect(chat.part("text")).to_contain_text("The end.")
    assert chat.the("transcript").evaluate("e => e.scrollTop") == before
    chat.the("latest").click()
    wait_for_scroll(chat, "end")
    expect(chat.the("latest")).to_be_hidden()
    answer.write("\n" + LINES)
    expect(chat.part("text")).to_contain_text("The end.\nA line")
    wait_for_scroll(chat, "end")


# What a model writes is text, whatever it looks like.

HOSTILE = (
    "<img src=x onerror=alert(1)> <script>document.title = 'owned'</script>"
    " <a href=javascript:alert(2)>here</a> <style>body{display:none}</style> &amp; **bold**"
)


def test_text_of_the_model_is_inert(chat):
    answer = chat.ask(HOSTILE)
    for start in range(0, len(HOSTILE), 5):  # Also where it is put together from pieces.
        answer.write(HOSTILE[start : start + 5])
    answer.finish()
    chat.expect_reply("done", HOSTILE)
    expect(chat.page.locator("[data-role=user] .text")).to_have_text(HOSTILE)
    assert chat.page.locator("#exchanges").locator("img, script, a, style").count() == 0
    expect(chat.page).to_have_title("Ask · Bayleaf")


def test_an_error_message_is_inert(chat, watch):
    watch.allow("status of 500")
    chat.ask().fail("EngineError", HOSTILE)
    expect(chat.part("error")).to_contain_text(HOSTILE)
    assert chat.part("error").locator("img, script, a, style").count() == 0


def test_what_is_not_the_pages_own_would_not_run(chat, watch):
    watch.allow("Content Security Policy.*script-src")
    chat.page.evaluate(
        "() => { const script = document.createElement('script');"
        " script.textContent = \"document.title = 'owned'\"; document.body.append(script); }"
    )
    expect(chat.page).to_have_title("Ask · Bayleaf")


# The parser that the page reads streams with.


def test_an_event_stream_may_be_cut_anywhere(chat):
    events, failures = chat.page.evaluate("""async () => {
      const { EventStreamParser } = await import("/static/sse.js");
      const source = ": hi\\r\\n\\r\\ndata: a\\r\\ndata:b\\r\\n\\r\\nevent: x\\ndata\\n\\n"
        + "data:  two\\n\\nid: 1\\rdata: ü🍋\\r\\rdata: unfinished\\n";
      const whole = new EventStreamParser().feed(source);
      let failures = 0;
      for (let i = 0; i <= source.length; i++)
        for (let j = i; j <= source.length; j++) {
          const parser = new EventStreamParser();
          const pieces = [source.slice(0, i), source.slice(i, j), source.slice(j)];
          const events = pieces.flatMap((piece) => parser.feed(piece));
          if (JSON.stringify(events) !== JSON.stringify(whole)) failures++;
        }
      return [whole, failures];
    }""")
    assert failures == 0
    assert [(event["event"], event["data"]) for event in events] == [
        ("message", "a\nb"),
        ("x", ""),
        ("message", " two"),
        ("message", "ü🍋"),
    ]
