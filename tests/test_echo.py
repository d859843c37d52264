from time import monotonic

import pytest
from hypothesis import given
from hypothesis import strategies as st
from python_process import run_python

from flask_llmstream.backends.echo import EchoBackend
from flask_llmstream.core.messages import InferenceRequest, Message, Usage
from flask_llmstream.exceptions import ConfigurationError
from flask_llmstream.typing import Backend


def test_it_is_a_backend_that_supports_nothing_special():
    assert isinstance(EchoBackend(), Backend)
    assert EchoBackend.supports == frozenset()


def test_words_keep_the_white_space_behind_them():
    *words, _ = EchoBackend().generate(InferenceRequest(prompt="one  two\nthree"))
    assert words == ["one  ", "two\n", "three"]


@given(st.text())
def test_the_pieces_add_up_to_the_text(text):
    *words, _ = EchoBackend().generate(InferenceRequest(prompt=text))
    assert "".join(words) == text
    assert "" not in words


def test_it_says_what_the_last_user_said_and_counts_every_message():
    request = InferenceRequest(
        messages=[
            Message("system", "Be brief."),
            Message("user", "first"),
            Message("assistant", "yes"),
            Message("user", [{"type": "text", "text": "second question"}]),
        ]
    )
    assert list(EchoBackend().generate(request)) == ["second ", "question", Usage(6, 2)]


def test_an_empty_prompt_has_an_empty_answer():
    assert list(EchoBackend().generate(InferenceRequest())) == [Usage(0, 0)]


def test_the_pace_is_kept():
    started_at = monotonic()
    items = list(EchoBackend(tokens_per_second=100).generate(InferenceRequest(prompt="a b c d")))
    assert len(items) == 5
    assert monotonic() - started_at >= 0.04


@pytest.mark.parametrize("pace", [0, -1])
def test_an_impossible_pace_is_refused(pace):
    with pytest.raises(ConfigurationError, match="tokens_per_second"):
        EchoBackend(tokens_per_second=pace)


def test_a_paced_echo_in_a_greenlet_lets_others_run():
    run_python(
        """
        from gevent import monkey; monkey.patch_all()
        import gevent
        from flask_llmstream.backends.echo import EchoBackend
        from flask_llmstream.core.messages import InferenceRequest

        seen = []
        def say(prompt):
            for item in EchoBackend(tokens_per_second=50).generate(InferenceRequest(prompt=prompt)):
                seen.append(item)
        with gevent.Timeout(20):
            echo = gevent.spawn(say, "a b c")
            others = gevent.spawn(seen.append, "others")
            gevent.joinall([echo, others], raise_error=True)
        assert seen.index("others") < seen.index("c"), seen
        """
    )
