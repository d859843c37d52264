"""One answer in every dialect, streamed and whole: they may differ in names, and in nothing else."""

import json
from collections import defaultdict
from dataclasses import dataclass, field, replace

import pytest
from rendering import WIRES

from flask_llmstream import Finish, Reasoning, Refusal, ToolCallDelta, Usage

STOPS = ("stop", "length", "tool_calls", "content_filter")


@dataclass(frozen=True)
class Said:
    """What an answer says. Calls are (name, arguments as text); tokens those in and out."""

    text: str = ""
    reasoning: str = ""
    refusal: str = ""
    calls: tuple = ()
    finish: str = "stop"
    tokens: tuple = (3, 2)


CALLS = (
    ToolCallDelta(0, id="c1", name="now", arguments=""),
    ToolCallDelta(1, id="c2", name="weather", arguments='{"city":'),
    ToolCallDelta(1, arguments='"Oslo"}'),
)
CALLED = (("now", "{}"), ("weather", '{"city":"Oslo"}'))
ANSWERS = {
    "text": (("Hel", "lo"), Said("Hello")),
    "nothing": ((), Said()),
    "length": (("Hel", Finish("length")), Said("Hel", finish="length")),
    "filtered": (("Hel", Finish("content_filter")), Said("Hel", finish="content_filter")),
    "refusal": ((Refusal("I "), Refusal("won't.")), Said(refusal="I won't.")),
    "text and refusal": (("Hm. ", Refusal("No.")), Said("Hm. ", refusal="No.")),
    "reasoning": ((Reasoning("Hm."), "Hello"), Said("Hello", "Hm.")),
    "reasoning alone": (
        (Reasoning("Hm."), Finish("length")),
        Said(reasoning="Hm.", finish="length"),
    ),
    "calls": ((*CALLS, Finish("tool_calls")), Said(calls=CALLED, finish="tool_calls")),
    # The backend did not say why it stopped.
    "calls unsaid": (CALLS, Said(calls=CALLED)),
    "everything": (
        (Reasoning("Hm."), "I look.", *CALLS, Finish("tool_calls")),
        Said("I look.", "Hm.", "", CALLED, "tool_calls"),
    ),
}


def compact(arguments):
    """Arguments as text: some dialects have them parsed, and none for an empty object."""
    parsed = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    return json.dumps(parsed, separators=(",", ":"))


def joined(pieces, key):
    return "".join(piece.get(key) or "" for piece in pieces)


def calls_in_pieces(pieces):
    """OpenAI's and the package's own."""
    names, arguments = {}, defaultdict(str)
    for piece in pieces:
        function = piece.get("function", piece)
        names.setdefault(piece["index"], function.get("name"))
        arguments[piece["index"]] += function.get("arguments") or ""
    return tuple((name, compact(arguments[index])) for index, name in names.items())


def openai_tokens(usage):
    return usage["prompt_tokens"], usage["completion_tokens"]


def native_stream(objects):
    *_, last = objects
    calls = [each["tool_call"] for each in objects if "tool_call" in each]
    return Said(
        joined(objects, "token"),
        joined(objects, "reasoning"),
        joined(objects, "refusal"),
        calls_in_pieces(calls),
        last["finish_reason"],
        openai_tokens(last["usage"]),
    )


def native_whole(answer):
    return Said(
        answer["text"],
        answer.get("reasoning", ""),
        answer.get("refusal", ""),
        tuple((call["name"], compact(call["arguments"])) for call in answer.get("tool_calls", ())),
        answer["finish_reason"],
        openai_tokens(answer["usage"]),
    )


def chat_said(pieces, finish, usage):
    calls = []
    for piece in pieces:
        calls += [
            {"index": number, **call} for number, call in enumerate(piece.get("tool_calls") or ())
        ]
    return Said(
        joined(pieces, "content"),
        joined(pieces, "reasoning_content"),
        joined(pieces, "refusal"),
        calls_in_pieces(calls),
        finish,
        openai_tokens(usage),
    )


def chat_stream(objects):
    choices = [choice for each in objects for choice in each.get("choices", ())]
    (finish,) = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    (usage,) = [each["usage"] for each in objects if each.get("usage")]
    return chat_said([choice["delta"] for choice in choices], finish, usage)


def chat_whole(answer):
    (choice,) = answer["choices"]
    return chat_said([choice["message"]], choice["finish_reason"], answer["usage"])


def completion_stream(objects):
    choices = [choice for each in objects for choice in each.get("choices", ())]
    (finish,) = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    (usage,) = [each["usage"] for each in objects if each.get("usage")]
    return Said(joined(choices, "text"), finish=finish, tokens=openai_tokens(usage))


def completion_whole(answer):
    (choice,) = answer["choices"]
    return Said(
        choice["text"], finish=choice["finish_reason"], tokens=openai_tokens(answer["usage"])
    )


def responses_stream(objects):
    """Of the deltas alone; the last event's response must say the same."""
    said = defaultdict(str)
    for each in objects:
        kind, _, what = each["type"].removeprefix("response.").rpartition(".")
        if what == "delta":
            said[kind, each.get("output_index")] += each["delta"]
    texts = dict.fromkeys(("output_text", "reasoning_text", "refusal"), "")
    for (kind, _), text in said.items():
        if kind in texts:
            texts[kind] += text
    whole = responses_whole(objects[-1]["response"])
    items = objects[-1]["response"]["output"]
    calls = tuple(
        (item["name"], compact(said["function_call_arguments", index]))
        for index, item in enumerate(items)
        if item["type"] == "function_call"
    )
    return replace(
        whole,
        text=texts["output_text"],
        reasoning=texts["reasoning_text"],
        refusal=texts["refusal"],
        calls=calls,
    )


def responses_whole(answer):
    items = answer["output"]
    parts = [part for item in items for part in item.get("content", ())]

    def text_of(kind, key="text"):
        return joined([part for part in parts if part["type"] == kind], key)

    calls = [item for item in items if item["type"] == "function_call"]
    usage = answer["usage"]
    return Said(
        text_of("output_text"),
        text_of("reasoning_text"),
        text_of("refusal", "refusal"),
        tuple((call["name"], compact(call["arguments"])) for call in calls),
        (answer["incomplete_details"] or {"reason": answer["status"]})["reason"],
        (usage["input_tokens"], usage["output_tokens"]),
    )


def anthropic_said(blocks, finish, usage):
    calls = [block for block in blocks if block["type"] == "tool_use"]
    return Said(
        joined(blocks, "text"),
        joined(blocks, "thinking"),
        "",
        tuple((call["name"], compact(call["input"])) for call in calls),
        finish,
        (usage["input_tokens"], usage["output_tokens"]),
    )


def anthropic_stream(objects):
    blocks = {}
    for each in objects:
        if each["type"] == "content_block_start":
            blocks[each["index"]] = {**each["content_block"]}
        elif each["type"] == "content_block_delta":
            delta, block = each["delta"], blocks[each["index"]]
            for name in ("text", "thinking"):
                block[name] = block.get(name, "") + delta.get(name, "")
            if delta["type"] == "input_json_delta":
                block["input"] = (block["input"] or "") + delta["partial_json"]
    (end,) = [each for each in objects if each["type"] == "message_delta"]
    return anthropic_said(blocks.values(), end["delta"]["stop_reason"], end["usage"])


def anthropic_whole(answer):
    return anthropic_said(answer["content"], answer["stop_reason"], answer["usage"])


def ollama_stream(objects):
    *_, last = objects
    pieces = [each.get("message", each) for each in objects]
    calls = [call["function"] for piece in pieces for call in piece.get("tool_calls", ())]
    return Said(
        joined(pieces, "content") + joined(pieces, "response"),
        joined(pieces, "thinking"),
        "",
        tuple((call["name"], compact(call["arguments"])) for call in calls),
        last["done_reason"],
        (last["prompt_eval_count"], last["eval_count"]),
    )


def ollama_whole(answer):
    return ollama_stream([answer])


def ai_sdk_said(text, reasoning, calls, metadata):
    usage = metadata["usage"]
    return Said(
        text,
        reasoning,
        "",
        tuple(calls),
        metadata["finishReason"],
        (usage["inputTokens"], usage["outputTokens"]),
    )


def ai_sdk_stream(objects):
    def text_of(kind):
        return joined([each for each in objects if each["type"] == kind], "delta")

    calls = [each for each in objects if each["type"] == "tool-input-available"]
    return ai_sdk_said(
        text_of("text-delta"),
        text_of("reasoning-delta"),
        [(call["toolName"], compact(call["input"])) for call in calls],
        objects[-1]["messageMetadata"],
    )


def ai_sdk_whole(answer):
    parts = answer["parts"]

    def text_of(kind):
        return joined([part for part in parts if part["type"] == kind], "text")

    calls = [part for part in parts if part["type"].startswith("tool-")]
    return ai_sdk_said(
        text_of("text"),
        text_of("reasoning"),
        [(call["type"].removeprefix("tool-"), compact(call["input"])) for call in calls],
        answer["metadata"],
    )


SAME = dict(zip(STOPS, STOPS, strict=True))


@dataclass(frozen=True)
class Reading:
    """
    How a dialect is read, and what it has other words for, or none.

    Args:
        stream: Of the objects of a stream.
        whole: Of a document.
        words: Its finish reasons.
        refuses: Where a refusal goes: ``refusal``, ``text``, or nowhere.
        untold: What it has no form for.
        infers: Its word for a stop, by what came before that: ``calls``, ``refusal``.
        asks_usage: A stream has it for who asks alone.
    """

    stream: object
    whole: object
    words: dict
    refuses: str = "text"
    untold: tuple = ()
    infers: dict = field(default_factory=dict)
    asks_usage: bool = False

    def expects(self, said):
        """What is read of an answer that says *said*."""
        word = self.words[said.finish]
        for name, inferred in self.infers.items():
            if said.finish == "stop" and getattr(said, name):
                word = inferred
        refused, said = said.refusal, replace(said, refusal="", finish=word)
        if self.refuses:
            said = replace(said, **{self.refuses: getattr(said, self.refuses) + refused})
        return replace(said, **{name: type(getattr(said, name))() for name in self.untold})


def words(stop, length, tool_calls, content_filter):
    return dict(zip(STOPS, (stop, length, tool_calls, content_filter), strict=True))


OLLAMA = Reading(ollama_stream, ollama_whole, {**SAME, "tool_calls": "stop"})
READINGS = {
    "native": Reading(native_stream, native_whole, SAME, "refusal"),
    "openai_chat": Reading(chat_stream, chat_whole, SAME, "refusal", asks_usage=True),
    "openai_completions": Reading(
        completion_stream,
        completion_whole,
        {**SAME, "tool_calls": "stop"},
        "",
        ("reasoning", "calls"),
        # An empty text alone would be an answer.
        infers={"refusal": "content_filter"},
        asks_usage=True,
    ),
    "openai_responses": Reading(
        responses_stream,
        responses_whole,
        words("completed", "max_output_tokens", "completed", "content_filter"),
        "refusal",
    ),
    "anthropic": Reading(
        anthropic_stream,
        anthropic_whole,
        words("end_turn", "max_tokens", "tool_use", "refusal"),
        infers={"calls": "tool_use", "refusal": "refusal"},
    ),
    "ollama_chat": OLLAMA,
    "ollama_generate": OLLAMA,
    "ai_sdk": Reading(
        ai_sdk_stream, ai_sdk_whole, words("stop", "length", "tool-calls", "content-filter")
    ),
}
NDJSON_WIRES = {wire.dialect.name: wire for wire in WIRES if wire.framing.name == "ndjson"}


def test_every_dialect_is_read():
    assert READINGS.keys() == NDJSON_WIRES.keys()


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("dialect", READINGS)
def test_a_stream_and_a_document_say_what_every_other_dialect_says(dialect, answer):
    items, said = ANSWERS[answer]
    items = (*items, Usage(*said.tokens))
    wire, reading = NDJSON_WIRES[dialect], READINGS[dialect]
    asks = {"stream_options": {"include_usage": True}} if reading.asks_usage else {}
    lines = wire.render(*items, stream=True, **asks).splitlines()
    document = json.loads(wire.document(*items))
    assert reading.stream([json.loads(line) for line in lines]) == reading.expects(said)
    assert reading.whole(document) == reading.expects(said)
