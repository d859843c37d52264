import pytest

from flask_llmstream.core.messages import (
    Finish,
    InferenceResponse,
    Reasoning,
    Token,
    ToolCallDelta,
    Usage,
)
from flask_llmstream.exceptions import EngineError
from flask_llmstream.framing import TextRenderer


@pytest.mark.parametrize("item", ["é\n😀", Token("é\n😀", logprob=-0.1)])
def test_text_is_written_as_it_is(item):
    assert TextRenderer().render(item) == "é\n😀".encode()


@pytest.mark.parametrize(
    "item",
    [
        "",
        Token("other", choice=1),
        Reasoning("hm"),
        ToolCallDelta(0, arguments="{}"),
        Usage(1, 2),
        Finish("stop"),
    ],
)
def test_what_is_not_text_of_the_first_choice_is_left_out(item):
    assert TextRenderer().render(item) == b""


def test_nothing_comes_around_the_text():
    renderer = TextRenderer()
    assert renderer.start() == renderer.heartbeat == b""
    assert renderer.end(InferenceResponse(text="whole")) == b""


def test_an_error_has_no_form_so_that_the_transfer_is_aborted():
    assert TextRenderer().error(EngineError("gone")) is None


def test_a_lone_surrogate_is_refused():
    with pytest.raises(UnicodeEncodeError):
        TextRenderer().render("\ud800")
