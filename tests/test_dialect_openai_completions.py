"""OpenAI's older completions: bodies to requests, and answers in the shape of their SDK."""

from __future__ import annotations

import enum
import json
import math
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from rendering import read_sse, render_stream, run

from flask_llmstream import exceptions
from flask_llmstream._version import __version__
from flask_llmstream.core.channel import Channel
from flask_llmstream.core.channel_group import ChannelGroup
from flask_llmstream.core.messages import (
    Choice,
    Finish,
    InferenceRequest,
    InferenceResponse,
    Reasoning,
    Refusal,
    Token,
    ToolCallDelta,
    Usage,
)
from flask_llmstream.dialects import OpenAICompletionsDialect, Parsed
from flask_llmstream.dialects.extra_body import check_extra_body
from flask_llmstream.dialects.generation import MAX_CHOICES
from flask_llmstream.engines.gathering import gather
from flask_llmstream.engines.handle import InferenceHandle
from flask_llmstream.exceptions import InvalidRequestError
from flask_llmstream.framing import NDJSON, SSE, TEXT

DIALECT = OpenAICompletionsDialect(clock=lambda: 1700000000.9)
ENVELOPE = (
    '"id":"cmpl-1","object":"text_completion","created":1700000000,"model":"m",'
    f'"system_fingerprint":"fp_flask_llmstream_{__version__}"'
)
DONE = b"data: [DONE]\n\n"


def parse(**fields):
    parsed = DIALECT.parse(json.dumps({"model": "m", "prompt": "Once", **fields}).encode())
    for request in parsed.requests:
        request.request_id = "1"
    return parsed


def refused(**fields) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        parse(**fields)
    return caught.value


def make_renderer(framing=SSE, **fields):
    return DIALECT.renderer(parse(**fields), framing)


def chunk(choices: str, rest: str = "") -> bytes:
    return f'data: {{{ENVELOPE},"choices":[{choices}]{rest}}}\n\n'.encode()


def choice(text: str, *, index=0, logprobs="null", finish_reason="null") -> str:
    return (
        f'{{"index":{index},"text":{json.dumps(text, ensure_ascii=False)},'
        f'"logprobs":{logprobs},"finish_reason":{finish_reason}}}'
    )


def document(response=None, /, **fields):
    response = response or InferenceResponse()
    return json.loads(DIALECT.document(parse(**fields), response))


class TestParsing:
    def test_a_minimal_body_leaves_every_choice_to_the_backend(self):
        parsed = DIALECT.parse(b'{"prompt":"Once"}')

        assert parsed.stream is None
        assert parsed.requests == (InferenceRequest(prompt="Once"),)
        assert parsed.request.max_tokens is None, "OpenAI would cut it off after 16"

    def test_every_field_reaches_the_request(self):
        parsed = parse(
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
            max_tokens=5,
            temperature=0.5,
            top_p=0.9,
            top_k=40,
            seed=-7,
            stop=["a", "b"],
            n=2,
            logprobs=3,
            response_format={"type": "json_object"},
            metadata={"a": "b"},
            user="u1",
            min_p=0.1,
        )

        assert (parsed.stream, parsed.include_usage, parsed.continuous_usage) == (True, True, True)
        assert (parsed.n, parsed.logprobs, parsed.echoed, parsed.others) == (2, 3, (), ())
        assert parsed.request == InferenceRequest(
            prompt="Once",
            model="m",
            request_id="1",
            max_tokens=5,
            temperature=0.5,
            top_p=0.9,
            top_k=40,
            seed=-7,
            stop=["a", "b"],
            n=2,
            logprobs=True,
            top_logprobs=3,
            response_format={"type": "json_object"},
            metadata={"user": "u1", "a": "b"},
            extra_body={"user": "u1", "min_p": 0.1},
        )

    def test_null_is_the_same_as_absent(self):
        names = (
            "stream stream_options max_tokens temperature top_p top_k seed stop n best_of echo "
            "suffix logprobs response_format metadata user tools presence_penalty "
            "frequency_penalty logit_bias"
        )

        assert parse(**dict.fromkeys(names.split())) == parse()

    def test_each_of_several_prompts_is_a_request(self):
        parsed = parse(prompt=["a", "b", "c"], n=2, seed=1)

        assert [request.prompt for request in parsed.requests] == ["a", "b", "c"]
        assert {(request.n, request.seed) for request in parsed.requests} == {(2, 1)}

    def test_several_requests_share_nothing_that_an_app_may_change(self):
        first, second = parse(prompt=["a", "b"], metadata={"a": "b"}, min_p=0.1).requests
        first.metadata["tenant"] = "x"
        first.extra_body["min_p"] = 0.2

        assert (second.metadata, second.extra_body) == ({"a": "b"}, {"min_p": 0.1})

    def test_logprobs_of_zero_are_the_chosen_tokens_own(self):
        request = parse(logprobs=0).request

        assert (request.logprobs, request.top_logprobs) == (True, 0)

    def test_best_of_asks_for_more_choices_and_their_log_probabilities(self):
        parsed = parse(n=2, best_of=5)

        assert (parsed.n, parsed.logprobs) == (2, None)
        assert (parsed.request.n, parsed.request.logprobs) == (5, True)

    @pytest.mark.parametrize("fields", [{"best_of": 1}, {"n": 3, "best_of": 3}])
    def test_best_of_all_is_no_choice(self, fields):
        request = parse(**fields).request

        assert (request.n, request.logprobs) == (fields.get("n", 1), False)

    @pytest.mark.parametrize(
        ("fields", "param", "reason"),
        [
            ({"prompt": None}, "prompt", "expected"),
            ({"prompt": ""}, "prompt", "empty"),
            ({"prompt": []}, "prompt", "empty"),
            ({"prompt": ["a", ""]}, "prompt", "empty"),
            ({"prompt": [1, 2]}, "prompt", "token ids"),
            ({"prompt": [[1, 2], [3]]}, "prompt", "token ids"),
            ({"prompt": ["a", 1]}, "prompt", "token ids"),
            ({"prompt": ["a"] * (MAX_CHOICES + 1)}, "prompt", "at most 128"),
            ({"prompt": ["a"] * 65, "n": 2}, "prompt", "at most 128"),
            ({"prompt": ["a"] * 65, "best_of": 2}, "prompt", "at most 128"),
            ({"suffix": " end"}, "suffix", "not supported"),
            ({"best_of": 1, "n": 2}, "best_of", "at least `n`"),
            ({"best_of": 0}, "best_of", "expected"),
            ({"n": 0}, "n", "expected"),
            ({"logprobs": 6}, "logprobs", "<= 5"),
            ({"logprobs": True}, "logprobs", "expected"),
            ({"logprobs": 0, "echo": True}, "logprobs", "`echo`"),
            ({"max_tokens": 0}, "max_tokens", "expected"),
            ({"tools": [{"type": "function"}]}, "tools", "chat completions"),
            ({"echo": "yes"}, "echo", "expected"),
            ({"response_format": {"type": "xml"}}, "response_format.type", "must be one of"),
        ],
    )
    def test_what_is_wrong_is_named(self, fields, param, reason):
        error = refused(**fields)

        assert error.param == param
        assert reason in error.message

    def test_a_prompt_is_required(self):
        with pytest.raises(InvalidRequestError, match="prompt: is required"):
            DIALECT.parse(b'{"model":"m"}')

    def test_as_many_as_are_allowed_are_taken(self):
        assert len(parse(prompt=["a"] * (MAX_CHOICES // 2), n=2).requests) == MAX_CHOICES // 2

    def test_what_says_nothing_is_taken(self):
        parsed = parse(suffix="", tools=[], echo=False, logprobs=None, presence_penalty=0)

        assert parsed == parse()

    @pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty"])
    def test_what_changes_the_answer_is_kept_for_backends_that_can(self, field):
        extra_body = parse(**{field: 0.5}).request.extra_body

        with pytest.raises(InvalidRequestError, match=field):
            check_extra_body(extra_body)


class TestStreams:
    def test_a_whole_stream(self):
        stream = render_stream(
            make_renderer(),
            ["Hi", " there", Finish("stop"), Usage(9, 2)],
            InferenceResponse(text="Hi there", usage=Usage(9, 2)),
        )

        assert stream == (
            chunk(choice("Hi"))
            + chunk(choice(" there"))
            + chunk(choice("", finish_reason='"stop"'))
            + DONE
        )

    def test_usage_comes_in_a_chunk_without_choices_when_asked_for(self):
        stream = render_stream(
            make_renderer(stream_options={"include_usage": True}),
            ["Hi", Finish("length")],
            InferenceResponse(text="Hi", usage=Usage(9, 1, 4, 0)),
        )

        null = ',"usage":null'
        assert stream == (
            chunk(choice("Hi"), null)
            + chunk(choice("", finish_reason='"length"'), null)
            + chunk(
                "",
                ',"usage":{"prompt_tokens":9,"completion_tokens":1,"total_tokens":10,'
                '"prompt_tokens_details":{"cached_tokens":4},'
                '"completion_tokens_details":{"reasoning_tokens":0}}',
            )
            + DONE
        )

    def test_usage_so_far_is_in_every_chunk_when_asked_for(self):
        options = {"include_usage": True, "continuous_usage_stats": True}
        stream = render_stream(
            make_renderer(stream_options=options),
            [Usage(9, 0), "Hi", " there", Finish("stop")],
            InferenceResponse(usage=Usage(9, 2)),
        )

        chunks = [json.loads(payload) for payload in read_sse(stream)[:-1]]
        assert [each["usage"]["total_tokens"] for each in chunks] == [10, 11, 11, 11]

    def test_every_prompt_s_choices_are_open(self):
        renderer = make_renderer(prompt=["a", "b"], n=2)

        assert renderer.start() == b""
        assert renderer.render(Token("x", choice=3)) == chunk(choice("x", index=3))
        assert renderer.render(Token("x", choice=4)) == b""
        assert renderer.render(Finish("length", choice=3)) == chunk(
            choice("", index=3, finish_reason='"length"')
        )
        assert renderer.render(Token("y", choice=3)) == b""
        reasons = (Choice(0), Choice(1, finish_reason="length"), Choice(2), Choice(3))
        assert renderer.end(InferenceResponse(choices=reasons)) == (
            chunk(choice("", finish_reason='"stop"'))
            + chunk(choice("", index=1, finish_reason='"length"'))
            + chunk(choice("", index=2, finish_reason='"stop"'))
            + DONE
        )

    def test_the_prompt_comes_first_where_it_is_echoed(self):
        renderer = make_renderer(prompt=["a", "b"], n=2, echo=True)

        assert renderer.start() == b"".join(
            chunk(choice(prompt, index=index)) for index, prompt in enumerate("aabb")
        )

    def test_what_is_echoed_is_what_the_client_wrote(self):
        parsed = parse(echo=True)
        parsed.request.prompt = "Be brief. Once"

        assert b'"text":"Once"' in DIALECT.renderer(parsed, SSE).start()
        assert json.loads(DIALECT.document(parsed, InferenceResponse(text="!")))["choices"][0][
            "text"
        ] == ("Once!")

    def test_logprobs_are_in_the_old_shape(self):
        renderer = make_renderer(logprobs=1)
        token = Token("é", logprob=-0.1, top_logprobs=[("é", -0.1), ("e", -2.0)])

        assert renderer.render(token) == chunk(
            choice(
                "é",
                logprobs='{"tokens":["é"],"token_logprobs":[-0.1],'
                '"top_logprobs":[{"é":-0.1}],"text_offset":[0]}',
            )
        )
        # Offsets count characters, a choice for itself.
        assert b'"text_offset":[1]' in renderer.render(Token("ab", logprob=-1.0))
        assert b'"text_offset":[3]' in renderer.render(Token("", logprob=-1.0))

    def test_the_chosen_token_is_told_beside_the_alternatives(self):
        token = Token("c", logprob=-3.0, top_logprobs=[("a", -1.0), ("b", -2.0), ("c", -3.0)])

        def told(logprobs):
            payload = json.loads(read_sse(make_renderer(logprobs=logprobs).render(token))[0])
            return payload["choices"][0]["logprobs"]["top_logprobs"]

        assert told(2) == [{"a": -1.0, "b": -2.0, "c": -3.0}]
        assert told(0) == [{"c": -3.0}]
        assert told(5) == [{"a": -1.0, "b": -2.0, "c": -3.0}]

    def test_of_two_alternatives_with_one_text_the_likelier_counts(self):
        token = Token("�", logprob=-1.0, top_logprobs=[("�", -1.0), ("�", -5.0)])

        assert b'"top_logprobs":[{"\xef\xbf\xbd":-1.0}]' in make_renderer(logprobs=2).render(token)

    @pytest.mark.parametrize("logprob", [-math.inf, math.nan])
    def test_a_logprob_that_json_cannot_hold_is_openais_lowest(self, logprob):
        frame = make_renderer(logprobs=0).render(Token("Hi", logprob=logprob))

        assert b'"token_logprobs":[-9999.0],"top_logprobs":[{"Hi":-9999.0}]' in frame

    def test_logprobs_that_were_not_asked_for_or_not_given_are_null(self):
        plain = chunk(choice("Hi"))

        assert make_renderer().render(Token("Hi", logprob=-0.1)) == plain
        assert make_renderer(logprobs=0).render(Token("Hi")) == plain
        assert make_renderer(logprobs=0).render("Hi") == plain
        assert make_renderer().render(Token("", logprob=-0.1)) == b""

    def test_what_is_not_text_has_no_place(self):
        renderer = make_renderer()

        for item in (Reasoning("Hm"), ToolCallDelta(0, id="c", name="f"), Usage(1, 1), ""):
            assert renderer.render(item) == b""

    @pytest.mark.parametrize(
        ("reason", "told"),
        [
            ("stop", "stop"),
            ("length", "length"),
            ("content_filter", "content_filter"),
            ("tool_calls", "stop"),
        ],
    )
    def test_finish_reasons_are_those_of_the_route(self, reason, told):
        frame = make_renderer().render(Finish(reason))

        assert frame == chunk(choice("", finish_reason=f'"{told}"'))

    def test_a_refusal_is_no_text_but_shows(self):
        renderer = make_renderer(n=2)

        assert renderer.render(Refusal("No.", choice=1)) == b""
        assert renderer.render(Finish("stop", choice=1)) == chunk(
            choice("", index=1, finish_reason='"content_filter"')
        )
        assert b'"finish_reason":"stop"' in renderer.render(Finish("stop"))

    def test_a_subclass_of_str_is_text(self):
        class Word(str, enum.Enum):  # its str() is "Word.HI"
            HI = "Hi"

        assert make_renderer().render(Word.HI) == chunk(choice("Hi"))

    def test_best_of_cannot_be_streamed(self):
        for framing in (SSE, NDJSON, TEXT):
            with pytest.raises(InvalidRequestError, match="cannot be streamed") as caught:
                DIALECT.renderer(parse(best_of=2), framing)
            assert caught.value.param == "best_of"
        assert DIALECT.renderer(parse(n=2, best_of=2), SSE)

    def test_text_framing_is_the_first_choice_alone(self):
        items = ["Hi", Reasoning("Hm"), Token("b", choice=1), " é"]

        assert render_stream(make_renderer(TEXT), items, InferenceResponse()) == "Hi é".encode()
        echoing = make_renderer(TEXT, prompt=["Once", "Then"], echo=True)
        assert render_stream(echoing, items, InferenceResponse()) == "OnceHi é".encode()

    def test_ndjson_is_the_same_chunks_one_a_line(self):
        items, response = ["Hi", Finish("stop")], InferenceResponse(text="Hi")

        lines = render_stream(make_renderer(NDJSON), items, response)

        payloads = read_sse(render_stream(make_renderer(), items, response))
        assert lines == b"".join(payload + b"\n" for payload in [*payloads[:-1], b'{"done":true}'])

    def test_errors_and_heartbeats_are_chat_s(self):
        error = exceptions.EngineError("The model broke.")
        expected = (
            b'{"error":{"message":"The model broke.","type":"server_error","param":null,'
            b'"code":"engine_error","retryable":true}}'
        )

        assert make_renderer().error(error) == b"data: " + expected + b"\n\n"
        assert DIALECT.error_document(error) == expected
        assert make_renderer().heartbeat == b": ping\n\n"

    def test_a_request_that_did_not_come_from_a_body_can_be_rendered(self):
        parsed = Parsed(InferenceRequest(prompt="Once", model="m", request_id="1", n=2))

        renderer = DIALECT.renderer(parsed, SSE)

        assert renderer.render(Token("x", choice=1)) == chunk(choice("x", index=1))


class TestDocuments:
    def test_a_whole_answer(self):
        response = InferenceResponse(text="Hi", usage=Usage(9, 1, 4, 0))

        assert DIALECT.document(parse(), response).decode() == (
            f'{{{ENVELOPE},"choices":[{choice("Hi", finish_reason=chr(34) + "stop" + chr(34))}],'
            '"usage":{"prompt_tokens":9,"completion_tokens":1,"total_tokens":10,'
            '"prompt_tokens_details":{"cached_tokens":4},'
            '"completion_tokens_details":{"reasoning_tokens":0}}}'
        )

    def test_echo_puts_each_choice_s_prompt_before_it(self):
        choices = tuple(Choice(index, text) for index, text in enumerate("wxyz"))

        told = document(InferenceResponse(choices=choices), prompt=["a", "b"], n=2, echo=True)

        assert [(each["index"], each["text"]) for each in told["choices"]] == [
            (0, "aw"),
            (1, "ax"),
            (2, "by"),
            (3, "bz"),
        ]

    def test_logprobs_of_a_whole_choice(self):
        tokens = (
            Token("é", logprob=-0.1, top_logprobs=[("é", -0.1)]),
            Token("ab", logprob=-0.2),
            Token("c", logprob=-0.3),
        )
        response = InferenceResponse(choices=(Choice(0, "éabc", logprobs=tokens),))

        told = document(response, logprobs=1)["choices"][0]["logprobs"]

        assert told == {
            "tokens": ["é", "ab", "c"],
            "token_logprobs": [-0.1, -0.2, -0.3],
            "top_logprobs": [{"é": -0.1}, {"ab": -0.2}, {"c": -0.3}],
            "text_offset": [0, 1, 3],
        }
        assert document(response)["choices"][0]["logprobs"] is None
        assert document(logprobs=1)["choices"][0]["logprobs"] is None

    def test_what_is_not_text_has_no_place(self):
        response = InferenceResponse(
            choices=(
                Choice(0, "", reasoning="Hm", finish_reason="tool_calls"),
                Choice(1, "", refusal="No."),
            )
        )

        assert document(response, n=2)["choices"] == [
            {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"},
            {"index": 1, "text": "", "logprobs": None, "finish_reason": "content_filter"},
        ]

    def test_best_of_tells_those_with_the_highest_mean_log_probability(self):
        def scored(index, text, *logprobs):
            tokens = tuple(Token("x", logprob=each) for each in logprobs)
            return Choice(index, text, logprobs=tokens)

        response = InferenceResponse(
            choices=(
                scored(0, "long and good", -1.0, -1.0, -1.0, -1.0),
                scored(1, "short and bad", -2.0),
                scored(2, "best", -0.5),
                scored(3, "nothing"),
                # The second prompt's.
                scored(4, "impossible", -math.inf),
                scored(5, "first of two", -1.0),
                scored(6, "second of two", -1.0),
                scored(7, "unheard of", math.nan, -0.1),
            )
        )

        told = document(response, prompt=["a", "b"], n=2, best_of=4, echo=True)["choices"]

        assert [(each["index"], each["text"]) for each in told] == [
            (0, "abest"),
            (1, "along and good"),
            (2, "bfirst of two"),
            (3, "bsecond of two"),
        ]
        assert all(each["logprobs"] is None for each in told)

    def test_best_of_tells_log_probabilities_where_they_are_asked_for(self):
        response = InferenceResponse(
            choices=(
                Choice(0, "a", logprobs=(Token("a", logprob=-2.0),)),
                Choice(1, "b", logprobs=(Token("b", logprob=-1.0),)),
            )
        )

        (told,) = document(response, best_of=2, logprobs=0)["choices"]

        assert (told["index"], told["logprobs"]["tokens"]) == (0, ["b"])

    def test_the_model_is_the_one_asked_for_or_else_the_one_that_answered(self):
        parsed = parse()
        parsed.request.model = ""

        told = json.loads(DIALECT.document(parsed, InferenceResponse(model="served")))

        assert told["model"] == "served"


# However it is told, it is the same answer.

texts = st.text(max_size=4)
logprobs = st.floats(max_value=0, allow_nan=False)


def items_of(choice, *, scored):
    scored_tokens = st.builds(
        Token,
        texts,
        logprob=logprobs,
        top_logprobs=st.lists(st.tuples(texts, logprobs), max_size=2),
        choice=st.just(choice),
    )
    plain_tokens = st.builds(Token, texts, choice=st.just(choice))
    return st.one_of(
        scored_tokens if scored else plain_tokens,
        scored_tokens,
        st.builds(Reasoning, texts, choice=st.just(choice)),
        st.builds(Refusal, texts, choice=st.just(choice)),
        st.builds(ToolCallDelta, st.integers(0, 1), arguments=texts, choice=st.just(choice)),
        st.builds(Finish, st.sampled_from(["length", "tool_calls"]), choice=st.just(choice)),
    )


@st.composite
def answers(draw):
    """A body, and what the backend emits for each of its prompts."""
    body = {
        "prompt": draw(st.lists(st.sampled_from(["a", "éa"]), min_size=1, max_size=3)),
        "n": draw(st.integers(1, 2)),
        "stop": draw(st.lists(st.sampled_from(["ab", "0"]), max_size=2)),
        "stream_options": {
            "include_usage": True,
            "continuous_usage_stats": draw(st.booleans()),
        },
    }
    scored = draw(st.booleans())
    if scored:
        body["logprobs"] = draw(st.integers(0, 2))
    else:
        body["echo"] = draw(st.booleans())
    runs = []
    for _ in body["prompt"]:
        items = [Token("x", logprob=-1.0, choice=choice) for choice in range(body["n"])]
        items += draw(
            st.lists(
                st.integers(0, body["n"] - 1).flatmap(
                    lambda choice: items_of(choice, scored=scored)
                ),
                max_size=8,
            )
        )
        items += draw(st.lists(st.builds(Usage, *[st.integers(0, 9)] * 4), max_size=1))
        runs.append(items)
    return body, runs


def played(parsed, runs, order):
    """The items of all *runs* as the response gets them, in some order; and their answer."""
    channels = [Channel(size=1000) for _ in runs]
    choices = [request.n for request in parsed.requests]
    group = ChannelGroup(channels, choices)
    handles = [InferenceHandle("1", cancel=lambda reason: None) for _ in runs]
    gathered = gather(handles, choices)
    left = []
    for request, items, channel, handle in zip(
        parsed.requests, runs, channels, handles, strict=True
    ):
        passed, response = run(request, items)
        left.append([(channel, item) for item in passed])
        handle.publish(response)
    received = []
    while any(left):
        mine = [queue for queue in left if queue]
        channel, item = mine[order.randrange(len(mine))].pop(0)
        channel.send(item)
        if order.random() < 0.5:
            received += group.receive_batch(0)
    return [*received, *group.receive_batch(0)], gathered.get(0)


def joined(chunks):
    """What a client makes of a stream: choices by index."""
    told = defaultdict(lambda: {"text": "", "finish_reason": None, "logprobs": None})
    for each in chunks:
        for choice in each["choices"]:
            mine = told[choice["index"]]
            assert mine["finish_reason"] is None, "nothing follows a finish reason"
            mine["text"] += choice["text"]
            mine["finish_reason"] = choice["finish_reason"]
            if choice["logprobs"] is not None:
                mine["logprobs"] = mine["logprobs"] or defaultdict(list)
                for name, values in choice["logprobs"].items():
                    mine["logprobs"][name] += values
    return dict(told)


@given(answers(), st.randoms(use_true_random=False))
def test_a_stream_adds_up_to_the_document(answer, order):
    body, runs = answer
    parsed = parse(**body)
    items, response = played(parsed, runs, order)

    payloads = read_sse(render_stream(DIALECT.renderer(parsed, SSE), items, response))
    document = json.loads(DIALECT.document(parsed, response))

    assert payloads.pop() == b"[DONE]"
    chunks = [json.loads(payload) for payload in payloads]
    # Not the chunks: the type has no null finish_reason, though OpenAI streams it.
    Completion.model_validate(document)
    *_, last = chunks
    assert last["choices"] == []
    assert last["usage"] == document["usage"]
    whole = {choice.pop("index"): choice for choice in document["choices"]}
    assert joined(chunks) == whole
    assert list(whole) == list(range(len(body["prompt"]) * body["n"]))
