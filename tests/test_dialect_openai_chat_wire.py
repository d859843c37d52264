"""OpenAI chat answers, byte by byte and through OpenAI's own types and client."""

from __future__ import annotations

import enum
import importlib
import json
import math
from dataclasses import replace

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from rendering import read_sse, render_stream, run

from flask_llmstream import exceptions
from flask_llmstream._version import __version__
from flask_llmstream.core.messages import (
    Choice,
    Finish,
    InferenceRequest,
    InferenceResponse,
    Reasoning,
    Refusal,
    Token,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from flask_llmstream.dialects import OpenAIChatDialect, Parsed, model_list, model_object
from flask_llmstream.framing import NDJSON, SSE, TEXT

DIALECT = OpenAIChatDialect(clock=lambda: 1700000000.9)
ENVELOPE = (
    '"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"m",'
    f'"system_fingerprint":"fp_flask_llmstream_{__version__}"'
)
DONE = b"data: [DONE]\n\n"


def chunk(choices: str, rest: str = "") -> bytes:
    return f'data: {{{ENVELOPE},"choices":[{choices}]{rest}}}\n\n'.encode()


def choice(delta: str, *, index=0, logprobs="null", finish_reason="null") -> str:
    return (
        f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish_reason}}}'
    )


def parse(**fields):
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
    parsed = DIALECT.parse(json.dumps(body).encode())
    parsed.request.request_id = "1"
    return parsed


def make_renderer(framing=SSE, **fields):
    return DIALECT.renderer(parse(**fields), framing)


class TestShapes:
    def test_a_whole_stream(self):
        stream = render_stream(
            make_renderer(),
            ["Hi", " there", Finish("stop"), Usage(9, 2)],
            InferenceResponse(text="Hi there", usage=Usage(9, 2)),
        )

        assert stream == (
            chunk(choice('{"role":"assistant","content":""}'))
            + chunk(choice('{"content":"Hi"}'))
            + chunk(choice('{"content":" there"}'))
            + chunk(choice("{}", finish_reason='"stop"'))
            + DONE
        )

    def test_usage_comes_in_a_chunk_without_choices_when_asked_for(self):
        stream = render_stream(
            make_renderer(stream_options={"include_usage": True}),
            ["Hi", Usage(9, 1, 4, 0), Finish("length")],
            InferenceResponse(text="Hi", finish_reason="length", usage=Usage(9, 1, 4, 0)),
        )

        null = ',"usage":null'
        assert stream == (
            chunk(choice('{"role":"assistant","content":""}'), null)
            + chunk(choice('{"content":"Hi"}'), null)
            + chunk(choice("{}", finish_reason='"length"'), null)
            + chunk(
                "",
                ',"usage":{"prompt_tokens":9,"completion_tokens":1,"total_tokens":10,'
                '"prompt_tokens_details":{"cached_tokens":4},'
                '"completion_tokens_details":{"reasoning_tokens":0}}',
            )
            + DONE
        )

    def test_usage_so_far_is_in_every_chunk_when_asked_for(self):
        stream = render_stream(
            make_renderer(
                stream_options={"include_usage": True, "continuous_usage_stats": True}, n=2
            ),
            [Reasoning("Hm"), "Hi", Token(" you", choice=1), Finish("stop"), Usage(9, 5), "!"],
            InferenceResponse(usage=Usage(9, 7)),
        )

        chunks = [json.loads(payload) for payload in read_sse(stream)[:-1]]
        usages = [
            (each["usage"]["prompt_tokens"], each["usage"]["completion_tokens"]) for each in chunks
        ]
        so_far = [(0, 0), (0, 0), (0, 1), (0, 2), (0, 3), (0, 3)]
        # The rest is the engine's word: the second choice's end, and the usage chunk.
        assert usages == [*so_far, (9, 7), (9, 7)]
        assert chunks[-1]["choices"] == []
        assert all(
            each["usage"]["total_tokens"] == sum(usage)
            for each, usage in zip(chunks, usages, strict=True)
        )
        assert all(ChatCompletionChunk.model_validate(each) for each in chunks)

    def test_usage_so_far_counts_on_from_what_the_backend_reports(self):
        renderer = make_renderer(
            stream_options={"include_usage": True, "continuous_usage_stats": True}
        )
        renderer.render("a")
        assert renderer.render(Usage(9, 0, 4, 0)) == b""

        usage = json.loads(read_sse(renderer.render("b"))[0])["usage"]

        assert usage["prompt_tokens_details"] == {"cached_tokens": 4}
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (9, 1)

    def test_counting_changes_nothing_else(self):
        options = {"include_usage": True, "continuous_usage_stats": True}
        renderer = make_renderer(NDJSON, stream_options=options)

        assert renderer.heartbeat == b""
        assert renderer.error(exceptions.EngineError("x")) == make_renderer(NDJSON).error(
            exceptions.EngineError("x")
        )
        assert renderer.end(InferenceResponse(text="Hi")).endswith(b'{"done":true}\n')

    @pytest.mark.parametrize(
        ("asked", "told"),
        [("flex", "flex"), ("default", "default"), ("auto", "default"), ("fast", "priority")],
    )
    def test_the_service_tier_is_in_every_chunk(self, asked, told):
        renderer = make_renderer(service_tier=asked, metadata={"a": "b"})
        stream = render_stream(renderer, ["Hi"], InferenceResponse())

        for payload in read_sse(stream)[:-1]:
            assert json.loads(payload)["service_tier"] == told
            assert "metadata" not in json.loads(payload)

    def test_usage_is_zeros_where_nothing_was_counted(self):
        renderer = make_renderer(stream_options={"include_usage": True})

        assert b'"usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0' in renderer.end(
            InferenceResponse()
        )

    def test_logprobs_carry_bytes_and_the_alternatives_asked_for(self):
        renderer = make_renderer(logprobs=True, top_logprobs=1)

        frame = renderer.render(Token("é", logprob=-0.1, top_logprobs=[("é", -0.1), ("e", -2.0)]))

        position = '"token":"é","logprob":-0.1,"bytes":[195,169]'
        assert frame == chunk(
            choice(
                '{"content":"é"}',
                logprobs=f'{{"content":[{{{position},"top_logprobs":[{{{position}}}]}}],"refusal":null}}',
            )
        )

    def test_a_token_without_text_still_shows_its_log_probability(self):
        frame = make_renderer(logprobs=True).render(Token("", logprob=-0.5))

        assert frame == chunk(
            choice(
                '{"content":""}',
                logprobs='{"content":[{"token":"","logprob":-0.5,"bytes":[],"top_logprobs":[]}],"refusal":null}',
            )
        )

    def test_logprobs_that_were_not_asked_for_or_not_given_are_null(self):
        plain = chunk(choice('{"content":"Hi"}'))

        assert make_renderer().render(Token("Hi", logprob=-0.1)) == plain
        assert make_renderer(logprobs=True).render(Token("Hi")) == plain
        assert make_renderer(logprobs=True).render("Hi") == plain
        assert make_renderer().render(Token("", logprob=-0.1)) == b""

    @pytest.mark.parametrize("logprob", [-math.inf, math.nan])
    def test_a_logprob_that_json_cannot_hold_is_openais_lowest(self, logprob):
        frame = make_renderer(logprobs=True).render(Token("Hi", logprob=logprob))

        assert b'"logprob":-9999.0' in frame

    def test_reasoning_is_not_content(self):
        renderer = make_renderer()

        assert renderer.render(Reasoning("Hm")) == chunk(choice('{"reasoning_content":"Hm"}'))
        assert renderer.render(Reasoning("")) == b""

    def test_a_refusal_is_not_content(self):
        renderer = make_renderer()

        assert renderer.render(Refusal("No.")) == chunk(choice('{"refusal":"No."}'))
        assert renderer.render(Refusal("")) == b""

    def test_a_tool_call_says_id_type_and_name_once(self):
        renderer = make_renderer()

        assert renderer.render(ToolCallDelta(0, id="call_1", name="f")) == chunk(
            choice(
                '{"tool_calls":[{"index":0,"id":"call_1","type":"function",'
                '"function":{"name":"f","arguments":""}}]}'
            )
        )
        # Even if the backend repeats them.
        assert renderer.render(ToolCallDelta(0, id="call_1", name="f", arguments='{"a":')) == chunk(
            choice('{"tool_calls":[{"index":0,"function":{"arguments":"{\\"a\\":"}}]}')
        )
        assert renderer.render(ToolCallDelta(0)) == b""
        assert renderer.render(ToolCallDelta(1, id="call_2", name="g", arguments="{}")) == chunk(
            choice(
                '{"tool_calls":[{"index":1,"id":"call_2","type":"function",'
                '"function":{"name":"g","arguments":"{}"}}]}'
            )
        )

    def test_a_tool_call_without_an_id_is_given_one(self):
        renderer = make_renderer()

        first, second = (
            json.loads(read_sse(renderer.render(ToolCallDelta(index, name="f")))[0])
            for index in (0, 1)
        )

        ids = [each["choices"][0]["delta"]["tool_calls"][0]["id"] for each in (first, second)]
        assert all(call_id.startswith("call_") for call_id in ids)
        assert ids[0] != ids[1]

    def test_every_choice_has_a_role_a_finish_reason_and_tool_calls_of_its_own(self):
        renderer = make_renderer(n=2)
        role = '{"role":"assistant","content":""}'

        assert renderer.start() == chunk(choice(role)) + chunk(choice(role, index=1))
        assert renderer.render(Token("b", choice=1)) == chunk(choice('{"content":"b"}', index=1))
        assert renderer.render(Reasoning("c", choice=1)) == chunk(
            choice('{"reasoning_content":"c"}', index=1)
        )
        for index in (0, 1):
            assert b'"id":"call_1"' in renderer.render(
                ToolCallDelta(0, id="call_1", name="f", choice=index)
            )
        assert renderer.render(Finish("length", choice=1)) == chunk(
            choice("{}", index=1, finish_reason='"length"')
        )
        assert (
            renderer.end(InferenceResponse()) == chunk(choice("{}", finish_reason='"stop"')) + DONE
        )

    def test_missing_finish_reasons_come_from_the_response(self):
        response = InferenceResponse(
            choices=(
                Choice(0, finish_reason="tool_calls"),
                Choice(1, finish_reason="length"),
            )
        )

        assert make_renderer(n=3).end(response) == (
            chunk(choice("{}", finish_reason='"tool_calls"'))
            + chunk(choice("{}", index=1, finish_reason='"length"'))
            + chunk(choice("{}", index=2, finish_reason='"stop"'))
            + DONE
        )

    def test_nothing_follows_a_finish_reason(self):
        renderer = make_renderer(n=2, logprobs=True)
        renderer.render(Finish("stop"))

        for item in (
            "Hi",
            Token("Hi"),
            Token("Hi", logprob=-0.1),
            Reasoning("Hm"),
            ToolCallDelta(0, id="c", name="f"),
            Finish("length"),
        ):
            assert renderer.render(item) == b""
        assert renderer.render(Token("b", choice=1)) != b""

    def test_a_choice_that_was_not_asked_for_renders_as_nothing(self):
        renderer = make_renderer()

        for item in (
            Token("b", choice=1),
            Finish("stop", choice=1),
            Reasoning("r", choice=1),
            Refusal("r", choice=1),
        ):
            assert renderer.render(item) == b""

    def test_an_empty_text_renders_as_nothing(self):
        assert make_renderer().render("") == b""

    def test_a_subclass_of_str_is_text(self):
        class Word(str, enum.Enum):  # its str() is "Word.HI"
            HI = "Hi"

        assert make_renderer().render(Word.HI) == chunk(choice('{"content":"Hi"}'))

    def test_an_error_ends_the_stream_without_an_event_line_or_a_done_marker(self):
        error = exceptions.EngineError("The model broke.")

        assert make_renderer().error(error) == (
            b'data: {"error":{"message":"The model broke.","type":"server_error","param":null,'
            b'"code":"engine_error","retryable":true}}\n\n'
        )

    def test_the_heartbeat_is_a_comment(self):
        assert make_renderer().heartbeat == b": ping\n\n"
        assert make_renderer(NDJSON).heartbeat == b""

    def test_ndjson_is_the_same_chunks_one_a_line(self):
        items = ["Hi", Finish("stop")]
        response = InferenceResponse(text="Hi", usage=Usage(1, 1))
        options = {"include_usage": True}

        lines = render_stream(make_renderer(NDJSON, stream_options=options), items, response)

        payloads = read_sse(render_stream(make_renderer(stream_options=options), items, response))
        assert lines == b"".join(payload + b"\n" for payload in [*payloads[:-1], b'{"done":true}'])
        assert make_renderer(NDJSON).error(exceptions.EngineError("x")).endswith(b"}}\n")

    def test_text_framing_is_the_tokens_alone(self):
        renderer = make_renderer(TEXT)

        stream = render_stream(renderer, ["Hi", Reasoning("Hm"), " é"], InferenceResponse())
        assert stream == "Hi é".encode()
        assert renderer.heartbeat == b""
        assert renderer.error(exceptions.EngineError("x")) is None

    @pytest.mark.parametrize("framing", [SSE, NDJSON])
    def test_no_reader_takes_a_character_for_a_line_end(self, framing):
        separators = "a\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029b"

        frame = make_renderer(framing).render(separators)

        text = frame.decode()
        assert len(text.rstrip("\n").splitlines()) == 1
        payload = json.loads(text.removeprefix("data: "))
        assert payload["choices"][0]["delta"]["content"] == separators

    def test_half_a_surrogate_pair_does_not_break_the_stream(self):
        payload = read_sse(make_renderer().render("\ud83d"))[0]

        assert json.loads(payload)["choices"][0]["delta"]["content"] == "\ud83d"


class TestIdentity:
    def test_id_and_model_are_read_when_the_renderer_is_made(self):
        parsed = parse()
        parsed.request.request_id = "r-2"
        parsed.request.model = "default"

        first = json.loads(read_sse(DIALECT.renderer(parsed, SSE).start())[0])

        assert (first["id"], first["model"]) == ("chatcmpl-r-2", "default")

    def test_an_id_is_made_where_there_is_none_and_kept_for_the_stream(self):
        parsed = parse()
        parsed.request.request_id = ""

        def ids():
            renderer = DIALECT.renderer(parsed, SSE)
            stream = render_stream(renderer, ["a", "b"], InferenceResponse())
            return {json.loads(payload)["id"] for payload in read_sse(stream)[:-1]}

        first, second = ids(), ids()
        assert len(first) == len(second) == 1
        assert first != second
        assert all(len(each) > len("chatcmpl-") for each in first | second)

    def test_a_request_that_did_not_come_from_a_body_can_be_rendered(self):
        parsed = Parsed(InferenceRequest(prompt="Hi", model="m", request_id="1"))

        stream = render_stream(DIALECT.renderer(parsed, SSE), ["Hi"], InferenceResponse())

        assert stream.endswith(chunk(choice("{}", finish_reason='"stop"')) + DONE)

    def test_created_is_now(self):
        first = json.loads(read_sse(OpenAIChatDialect().renderer(parse(), SSE).start())[0])

        assert first["created"] > 1700000000

    def test_it_streams_only_when_asked(self):
        assert DIALECT.name == "openai_chat"
        assert DIALECT.streams_by_default is False


class TestDocument:
    def test_a_text_answer(self):
        response = InferenceResponse(text="Hi", usage=Usage(9, 1, 4, 0))

        assert DIALECT.document(parse(), response).decode() == (
            f'{{{ENVELOPE.replace(".chunk", "")},"choices":[{{"index":0,'
            '"message":{"role":"assistant","content":"Hi","refusal":null},'
            '"logprobs":null,"finish_reason":"stop"}],'
            '"usage":{"prompt_tokens":9,"completion_tokens":1,"total_tokens":10,'
            '"prompt_tokens_details":{"cached_tokens":4},'
            '"completion_tokens_details":{"reasoning_tokens":0}}}'
        )

    def test_tier_and_metadata_are_told_back(self):
        parsed = parse(service_tier="auto", metadata={"a": "b"}, user="u1")

        document = ChatCompletion.model_validate_json(DIALECT.document(parsed, InferenceResponse()))

        assert document.service_tier == "default"
        assert document.metadata == {"a": "b"}
        silent = json.loads(DIALECT.document(parse(), InferenceResponse()))
        assert not {"service_tier", "metadata"} & set(silent)

    def test_tool_calls_alone_have_null_content(self):
        calls = (ToolCall("call_1", "f", "{}"), ToolCall("", "g", ""))
        response = InferenceResponse(tool_calls=calls, finish_reason="tool_calls")

        document = ChatCompletion.model_validate_json(DIALECT.document(parse(), response))

        message = document.choices[0].message
        assert message.content is None
        assert message.tool_calls is not None
        assert message.tool_calls[0].id == "call_1"
        assert message.tool_calls[0].function.name == "f"
        assert message.tool_calls[1].id.startswith("call_")
        assert document.choices[0].finish_reason == "tool_calls"

    def test_an_empty_answer_has_empty_content(self):
        document = json.loads(DIALECT.document(parse(), InferenceResponse()))

        assert document["choices"][0]["message"]["content"] == ""
        assert document["usage"]["total_tokens"] == 0

    def test_choices_reasoning_and_logprobs(self):
        tokens = (Token("a", logprob=-0.1, top_logprobs=[("a", -0.1)]),)
        response = InferenceResponse(
            model="served",
            choices=(
                Choice(0, "a", reasoning="Hm", logprobs=tokens),
                Choice(1, "b", finish_reason="length"),
            ),
        )

        document = json.loads(DIALECT.document(parse(n=2, logprobs=True, top_logprobs=1), response))

        ChatCompletion.model_validate(document)
        first, second = document["choices"]
        assert first["message"]["reasoning_content"] == "Hm"
        position = {"token": "a", "logprob": -0.1, "bytes": [97]}
        assert first["logprobs"] == {
            "content": [{**position, "top_logprobs": [position]}],
            "refusal": None,
        }
        assert (second["index"], second["logprobs"]) == (1, None)
        assert "reasoning_content" not in second["message"]
        unasked = json.loads(DIALECT.document(parse(n=2), response))
        assert unasked["choices"][0]["logprobs"] is None

    def test_the_model_is_the_one_asked_for_or_else_the_one_that_answered(self):
        parsed = parse()
        response = InferenceResponse(model="served")

        assert json.loads(DIALECT.document(parsed, response))["model"] == "m"
        parsed.request.model = ""
        assert json.loads(DIALECT.document(parsed, response))["model"] == "served"


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "error_type"),
        [
            (exceptions.InvalidRequestError("x", param="n"), "invalid_request_error"),
            (exceptions.NotAcceptableError("x"), "invalid_request_error"),
            (exceptions.RequestTooLargeError("x"), "invalid_request_error"),
            (exceptions.UnknownModelError("x"), "not_found_error"),
            (exceptions.AuthenticationError("x"), "authentication_error"),
            (exceptions.PermissionDeniedError("x"), "permission_error"),
            (exceptions.QueueFullError("x"), "rate_limit_error"),
            (exceptions.EngineClosedError("x"), "server_error"),
            (exceptions.FirstTokenTimeoutError("x"), "server_error"),
            (exceptions.UpstreamError("x"), "server_error"),
            (exceptions.SlowReaderError("x"), "server_error"),
        ],
    )
    def test_the_type_follows_the_status(self, error, error_type):
        assert json.loads(DIALECT.error_document(error)) == {
            "error": {
                "message": "x",
                "type": error_type,
                "param": error.param,
                "code": error.code,
                "retryable": error.retryable,
            }
        }

    def test_an_error_without_a_message_still_has_one(self):
        # The SDKs replace an empty message by one that says nothing.
        document = json.loads(DIALECT.error_document(exceptions.EngineError()))

        assert document["error"]["message"] == "EngineError"

    def test_a_message_that_is_not_unicode_is_sent_all_the_same(self):
        document = DIALECT.error_document(exceptions.EngineError("\udcff"))

        assert json.loads(document)["error"]["message"] == "\udcff"


class TestModels:
    def test_a_model(self):
        document = model_object("m", 1700000000)

        assert document == (
            b'{"id":"m","object":"model","created":1700000000,"owned_by":"flask_llmstream"}'
        )
        assert Model.model_validate_json(document).id == "m"

    def test_the_list_of_models(self):
        assert model_list(["b", "a"], 1700000000) == (
            b'{"object":"list","data":['
            b'{"id":"b","object":"model","created":1700000000,"owned_by":"flask_llmstream"},'
            b'{"id":"a","object":"model","created":1700000000,"owned_by":"flask_llmstream"}]}'
        )
        assert model_list([], 1) == b'{"object":"list","data":[]}'


# Newer SDKs bring an HTTP library of their own kind; this is whichever the SDK uses.
http = importlib.import_module(openai.DefaultHttpxClient.__mro__[1].__module__)


@pytest.fixture
def make_client():
    clients = []

    def make(body: bytes, *, status=200, content_type="text/event-stream"):
        def answer(_request):
            return http.Response(status, content=body, headers={"content-type": content_type})

        transport = http.MockTransport(answer)
        client = openai.OpenAI(
            base_url="http://llm.invalid/v1",
            api_key="key",
            max_retries=0,
            http_client=http.Client(transport=transport),
        )
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()


class TestWithTheOfficialClient:
    messages = ({"role": "user", "content": "Hi"},)

    def test_a_stream_of_everything_adds_up(self, make_client):
        items = [
            Reasoning("Hm"),
            Token("Hi", logprob=-0.1, top_logprobs=[("Hi", -0.1)]),
            " there",
            ToolCallDelta(0, id="call_1", name="f"),
            ToolCallDelta(0, arguments='{"a":'),
            ToolCallDelta(0, arguments="1}"),
            Finish("tool_calls"),
        ]
        renderer = make_renderer(
            logprobs=True, top_logprobs=1, stream_options={"include_usage": True}
        )
        heartbeat = renderer.heartbeat
        body = heartbeat + render_stream(renderer, items, InferenceResponse(usage=Usage(9, 3)))

        with make_client(body).chat.completions.stream(
            model="m", messages=self.messages, stream_options={"include_usage": True}
        ) as stream:
            completion = stream.get_final_completion()

        answer = completion.choices[0]
        assert completion.id == "chatcmpl-1"
        assert answer.message.content == "Hi there"
        assert answer.message.tool_calls[0].id == "call_1"
        assert answer.message.tool_calls[0].function.arguments == '{"a":1}'
        assert answer.finish_reason == "tool_calls"
        assert answer.logprobs.content[0].token == "Hi"
        assert completion.usage.total_tokens == 12

    def test_an_error_in_a_stream_is_raised_with_its_code(self, make_client):
        renderer = make_renderer()
        error = exceptions.IdleTimeoutError("No token for 60 s.")
        body = renderer.start() + renderer.render("Hi") + renderer.error(error)
        stream = make_client(body).chat.completions.create(
            model="m", messages=self.messages, stream=True
        )

        texts = []
        with pytest.raises(openai.APIError, match="No token for 60 s") as caught:
            texts.extend(each.choices[0].delta.content for each in stream)

        assert texts == ["", "Hi"]
        assert caught.value.code == "idle_timeout"
        assert caught.value.type == "server_error"

    def test_an_error_document_is_raised_with_its_param(self, make_client):
        error = exceptions.InvalidRequestError("n: too many", param="n")
        client = make_client(
            DIALECT.error_document(error), status=400, content_type="application/json"
        )

        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="m", messages=self.messages)

        assert (caught.value.param, caught.value.code) == ("n", "invalid_request")
        assert caught.value.type == "invalid_request_error"


texts = st.text(max_size=6)
choices = st.integers(0, 2)
items = st.one_of(
    texts,
    st.builds(
        Token,
        texts,
        logprob=st.none() | st.floats(max_value=0),
        top_logprobs=st.lists(st.tuples(texts, st.floats(max_value=0)), max_size=2),
        choice=choices,
    ),
    st.builds(Reasoning, texts, choice=choices),
    st.builds(Refusal, texts, choice=choices),
    st.builds(
        ToolCallDelta,
        st.integers(0, 2),
        id=st.none() | texts,
        name=st.none() | texts,
        arguments=texts,
        choice=choices,
    ),
    st.builds(Usage, st.integers(0, 9), st.integers(0, 9)),
    st.builds(Finish, st.sampled_from(["stop", "length", "tool_calls"]), choice=choices),
)


def text_until_finish(items, choice):
    text = ""
    for item in items:
        if isinstance(item, str) and getattr(item, "choice", 0) == choice:
            text += item
        elif isinstance(item, Finish) and item.choice == choice:
            break
    return text


@settings(deadline=None)  # a busy machine is no fault of the code
@given(
    st.lists(items, max_size=12),
    st.booleans(),
    st.fixed_dictionaries(
        {"include_usage": st.booleans(), "continuous_usage_stats": st.booleans()}
    ),
)
def test_any_items_make_a_stream_that_openais_types_accept(items, logprobs, options):
    renderer = make_renderer(n=3, logprobs=logprobs, stream_options=options)

    payloads = read_sse(render_stream(renderer, items, InferenceResponse()))

    assert payloads.count(b"[DONE]") == 1
    assert payloads.pop() == b"[DONE]"
    chunks = [ChatCompletionChunk.model_validate_json(payload) for payload in payloads]
    assert {(each.id, each.created, each.model) for each in chunks} == {
        ("chatcmpl-1", 1700000000, "m")
    }
    if options["include_usage"]:
        assert chunks[-1].choices == []
        assert chunks.pop().usage is not None
    assert {each.usage is not None for each in chunks} == {all(options.values())}
    for index in range(3):
        mine = [each.choices[0] for each in chunks if each.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert all(each.delta.role is None for each in mine[1:])
        assert [each.finish_reason is not None for each in mine] == [False] * (len(mine) - 1) + [
            True
        ]
        assert "".join(each.delta.content or "" for each in mine) == text_until_finish(items, index)
        calls = [each.delta.tool_calls[0] for each in mine if each.delta.tool_calls]
        for call_index in {call.index for call in calls}:
            first, *rest = (call for call in calls if call.index == call_index)
            assert first.id
            assert first.type == "function"
            assert not any({"id", "type"} & call.model_fields_set for call in rest)
            assert not any("name" in call.function.model_fields_set for call in rest)


TEXTS = ("content", "refusal", "reasoning_content")


def joined(chunks):
    """The choices that a client makes of a stream."""
    whole = {}
    for each in (choice for chunk in chunks for choice in chunk["choices"]):
        mine = whole.setdefault(
            each["index"],
            {"texts": dict.fromkeys(TEXTS, ""), "calls": {}, "tokens": [], "reason": None},
        )
        assert mine["reason"] is None, "nothing follows a finish reason"
        mine["reason"] = each["finish_reason"]
        mine["tokens"] += (each["logprobs"] or {}).get("content", ())
        for name in TEXTS:
            mine["texts"][name] += each["delta"].get(name, "")
        for call in each["delta"].get("tool_calls", ()):
            function = call["function"]
            if call["index"] in mine["calls"]:
                mine["calls"][call["index"]]["function"]["arguments"] += function["arguments"]
            else:
                mine["calls"][call["index"]] = call
    return [whole[index] for index in sorted(whole)]


def told(choice):
    """A choice of a document in the same words; calls have no index there, but their place."""
    message = choice["message"]
    return {
        "texts": {name: message.get(name) or "" for name in TEXTS},
        "calls": message.get("tool_calls", []),
        "tokens": (choice["logprobs"] or {}).get("content", []),
        "reason": choice["finish_reason"],
    }


@given(
    st.lists(items, max_size=12),
    st.booleans(),
    st.lists(st.sampled_from(["ab", "0", "é"]), max_size=2),
    st.booleans(),
)
def test_a_stream_adds_up_to_the_document(emitted, logprobs, stop, continuous):
    fields = {"n": 3, "stop": stop, "logprobs": logprobs, "top_logprobs": int(logprobs)}
    options = {"include_usage": True, "continuous_usage_stats": continuous}
    parsed = parse(**fields, stream_options=options)
    emitted = [
        replace(item, id=f"call_{item.index}", name="f")
        if isinstance(item, ToolCallDelta)
        else item
        for item in emitted
    ]
    tokens = [Token("x", logprob=-1.0, choice=choice) for choice in range(3)]
    passed, response = run(parsed.request, [*tokens, *emitted])

    payloads = read_sse(render_stream(DIALECT.renderer(parsed, SSE), passed, response))
    document = json.loads(DIALECT.document(parsed, response))

    chunks = [json.loads(payload) for payload in payloads[:-1]]
    assert chunks[-1]["usage"] == document["usage"]
    for mine, choice in zip(joined(chunks), document["choices"], strict=True):
        calls = [call for _, call in sorted(mine["calls"].items())]
        for call in calls:
            del call["index"]
        assert {**mine, "calls": calls} == told(choice)


@settings(deadline=None)  # a busy machine is no fault of the code
@given(st.lists(items, max_size=12))
def test_any_items_make_ndjson_lines_that_no_reader_splits(items):
    stream = render_stream(make_renderer(NDJSON, n=3), items, InferenceResponse())

    lines = stream.decode().splitlines()
    assert stream == "".join(line + "\n" for line in lines).encode()
    assert [json.loads(line) for line in lines][-1] == {"done": True}
