"""The recipe page: one question, answered in plain text as it is written, and kept."""

import pytest
from playwright.sync_api import expect


@pytest.fixture
def recipe(page):
    page.goto("/recipes/omelette")
    return page


def suggest(page, server, question="What could go with this?"):
    page.get_by_test_id("suggest-prompt").fill(question)
    page.get_by_test_id("suggest").click()
    answer = server.next_answer()
    assert answer.question.startswith("Omelette. Ingredients: ")
    assert answer.question.endswith(question)
    return answer


def test_a_suggestion_is_shown_as_it_is_written_and_kept(recipe, server):
    suggestion = recipe.get_by_test_id("suggestion")
    answer = suggest(recipe, server)
    expect(recipe.get_by_test_id("suggest")).to_be_disabled()
    answer.write("Bread, ")
    expect(suggestion).to_have_text("Bread,")
    answer.write("<b>or</b> cheese.")
    expect(suggestion).to_have_text("Bread, <b>or</b> cheese.")
    answer.finish()
    expect(recipe.get_by_test_id("suggest")).to_be_enabled()
    recipe.reload()
    expect(recipe.get_by_test_id("kept").first).to_contain_text("What could go with this?")
    expect(recipe.get_by_test_id("kept").first).to_contain_text("Bread, <b>or</b> cheese.")


def test_an_error_is_told_and_another_try_is_possible(recipe, server, watch):
    watch.allow("status of 429")
    suggest(recipe, server).fail("QueueFullError", "Too many are asking.")
    expect(recipe.get_by_test_id("suggest-error")).to_have_text("Too many are asking.")
    expect(recipe.get_by_test_id("suggestion")).to_be_hidden()
    answer = suggest(recipe, server)
    expect(recipe.get_by_test_id("suggest-error")).to_be_hidden()
    answer.write("Bread.")
    expect(recipe.get_by_test_id("suggestion")).to_have_text("Bread.")


def test_an_answer_that_breaks_off_is_no_short_one(recipe, server, watch):
    watch.allow("net::ERR_")
    answer = suggest(recipe, server, "Broken?")
    answer.write("Bread or")
    expect(recipe.get_by_test_id("suggestion")).to_have_text("Bread or")
    answer.fail("UpstreamError", "The model is gone.")
    expect(recipe.get_by_test_id("suggest-error")).to_have_text("The connection was lost.")
    expect(recipe.get_by_test_id("suggestion")).to_have_text("Bread or")
    recipe.reload()
    expect(recipe.get_by_text("Broken?")).to_have_count(0)


def test_leaving_the_page_cancels(recipe, server):
    answer = suggest(recipe, server)
    answer.write("Bread or")
    expect(recipe.get_by_test_id("suggestion")).to_have_text("Bread or")
    recipe.goto("/")
    answer.wait_for_cancel()


def test_the_talk_goes_on_in_the_chat(recipe):
    recipe.get_by_text("Talk it over").click()
    expect(recipe.get_by_test_id("prompt")).to_have_value("About Omelette: ")
