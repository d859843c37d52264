"""The embedded model, for real: SmolLM2 on one thread."""

import builtins
import json
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from time import monotonic

import pytest
from python_process import run_python

from flask_llmstream.backends.llama_cpp import LlamaCppBackend, _LoadedModel
from flask_llmstream.core.assembly import Assembler
from flask_llmstream.core.messages import (
    Finish,
    InferenceRequest,
    Message,
    ToolCallDelta,
    Usage,
)
from flask_llmstream.exceptions import (
    ConfigurationError,
    EngineClosedError,
    InvalidRequestError,
)

pytest_plugins = ["model_fixture"]
# The first test may have to fetch the model.
pytestmark = pytest.mark.timeout(300)

PROMPT = "Name a colour."
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/City"}},
            "required": ["city"],
            "$defs": {"City": {"type": "string"}},
        },
    },
}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@dataclass
class Answer:
    items: list
    usage: Usage | None

    @property
    def texts(self):
        return [item for item in self.items if isinstance(item, str)]

    @property
    def text(self):
        return "".join(self.texts)

    @property
    def arguments(self):
        return "".join(item.arguments for item in self.items if isinstance(item, ToolCallDelta))

    @property
    def finishes(self):
        return [item for item in self.items if isinstance(item, Finish)]


def ask(backend, *, until=lambda _item: False, **fields):
    """What *backend* emits, up to the item where *until* says that it is enough."""
    items = []

    def emit(item):
        items.append(item)
        return not until(item)

    fields = {"prompt": PROMPT, "max_tokens": 6, "seed": 1} | fields
    response = backend.generate(InferenceRequest(stream_callback=emit, **fields))
    return Answer(items, response.usage)


# The answer


def test_tokens_come_as_plain_text_then_the_finish(smollm2):
    answer = ask(smollm2)
    assert answer.items == [*answer.texts, Finish("length")]
    assert all(type(text) is str and text for text in answer.texts)
    assert 3 <= len(answer.texts) <= 6


def test_usage_is_counted_by_the_model(smollm2):
    answer = ask(smollm2, prompt="Count me.", max_tokens=3)
    assert answer.usage.completion_tokens == 3
    assert answer.usage.prompt_tokens > 10
    again = ask(smollm2, prompt="Count me.", max_tokens=3)
    assert again.usage.prompt_tokens == answer.usage.prompt_tokens
    assert again.usage.cached_tokens > 0


def test_an_answer_that_ends_by_itself_stops(smollm2):
    answer = ask(smollm2, prompt="Say yes.", temperature=0.0, max_tokens=200)
    assert answer.finishes == [Finish("stop")]


def test_an_answer_ends_where_the_context_does(smollm2):
    answer = ask(
        smollm2, prompt="word " * (smollm2.context_tokens - 45), temperature=1.5, max_tokens=None
    )
    assert answer.finishes[0].reason in ("length", "stop")
    assert answer.usage.total_tokens <= smollm2.context_tokens


@pytest.mark.parametrize("seed", [0, 7, -1, 2**32 - 1, 2**63 - 1])
def test_one_seed_gives_one_text(smollm2, seed):
    # The first fills the cache: a prompt in one batch rounds differently from its last token.
    _, first, second = (ask(smollm2, seed=seed, max_tokens=8).text for _ in range(3))
    assert first == second


def test_sampling_fields_reach_the_model(smollm2):
    greedy = ask(smollm2, temperature=0.0).text
    assert ask(smollm2, top_k=1, temperature=2.0).text == greedy
    assert ask(smollm2, top_p=0.0001, temperature=1.0).text == greedy


def test_stop_strings_are_found_by_the_engine_and_the_usage_is_there(smollm2):
    whole = ask(smollm2, temperature=0.0, max_tokens=8)
    stop = whole.texts[2]
    request = InferenceRequest(prompt=PROMPT, temperature=0.0, max_tokens=8, stop=(stop,))
    assembler = Assembler(request)

    def emit(item):
        list(assembler.accept(item))
        return not assembler.is_cut

    request.stream_callback = emit
    response = smollm2.generate(request)
    assert assembler.response().text == "".join(whole.texts[:2])
    assert assembler.response().choices[0].stop_sequence == stop
    assert 3 <= response.usage.completion_tokens <= 4


def test_chat_history_is_read(smollm2):
    answer = ask(
        smollm2,
        prompt="",
        messages=[
            Message("system", "You repeat what the user said before."),
            Message("user", "My name is Zanzibar."),
            Message("assistant", "Your name is Zanzibar."),
            Message("user", "What is my name?"),
        ],
        temperature=0.0,
        max_tokens=12,
    )
    assert "Zanzibar" in answer.text


# What it supports


def test_log_probabilities(smollm2):
    answer = ask(smollm2, logprobs=True, top_logprobs=2, max_tokens=3, temperature=0.0)
    assert len(answer.texts) == 3
    for token in answer.texts:
        assert token.logprob < 0
        assert [len(token.top_logprobs), token.top_logprobs[0]] == [2, (token, token.logprob)]


def test_log_probabilities_without_alternatives(smollm2):
    first = ask(smollm2, logprobs=True, max_tokens=1).texts[0]
    assert first.logprob < 0
    assert first.top_logprobs == ()


def test_several_choices_each_end_and_are_counted_once(smollm2):
    answer = ask(smollm2, n=3, max_tokens=4)
    assert sorted(finish.choice for finish in answer.finishes) == [0, 1, 2]
    texts = ["".join(t for t in answer.texts if getattr(t, "choice", 0) == i) for i in range(3)]
    assert len(set(texts)) > 1
    assert texts[0] == ask(smollm2, max_tokens=4).text
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == ask(smollm2).usage.prompt_tokens


def test_more_choices_than_slots_are_refused(smollm2):
    with pytest.raises(InvalidRequestError, match="n must be at most 4") as caught:
        ask(smollm2, n=5)
    assert caught.value.param == "n"


def test_a_json_object(smollm2):
    answer = ask(
        smollm2,
        prompt="A point as JSON, shortly.",
        response_format={"type": "json_object"},
        temperature=0.0,
        max_tokens=100,
    )
    if answer.finishes == [Finish("stop")]:
        assert isinstance(json.loads(answer.text), dict)
    else:
        assert answer.text.startswith("{")


def test_a_json_schema(smollm2):
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "dark": {"type": "boolean"}},
        "required": ["colour", "dark"],
        "additionalProperties": False,
    }
    answer = ask(
        smollm2,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        max_tokens=60,
    )
    value = json.loads(answer.text)
    assert value["colour"] in ("red", "blue")
    assert isinstance(value["dark"], bool)


def test_a_schema_that_cannot_be_used_is_refused_with_its_place(smollm2):
    schema = {"type": "object", "properties": {"a": {"type": "banana"}}}
    with pytest.raises(InvalidRequestError, match=r"^JSON schema error at #/properties/a"):
        ask(smollm2, response_format={"type": "json_schema", "json_schema": {"schema": schema}})


def test_a_required_call_is_made_whatever_the_model_would_say(smollm2):
    answer = ask(
        smollm2,
        prompt="What is the weather in Oslo?",
        tools=[WEATHER, ADD],
        tool_choice="required",
        max_tokens=80,
    )
    first, *rest = answer.items
    assert first.name in ("get_weather", "add")
    assert first.id.startswith("call_")
    assert all(isinstance(item, ToolCallDelta) and item.name is None for item in rest[:-1])
    assert isinstance(json.loads(answer.arguments), dict)
    assert rest[-1] == Finish("tool_calls")


def test_a_named_call_follows_its_own_schema(smollm2):
    answer = ask(
        smollm2,
        prompt="What is the weather in Oslo?",
        tools=[ADD, WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=80,
        n=2,
    )
    names = {item.choice: item.name for item in answer.items if getattr(item, "name", None)}
    assert names == {0: "get_weather", 1: "get_weather"}
    for index in range(2):
        deltas = [i for i in answer.items if isinstance(i, ToolCallDelta) and i.choice == index]
        assert isinstance(json.loads("".join(d.arguments for d in deltas))["city"], str)


@pytest.mark.parametrize("max_tokens", [3, 40])
def test_a_call_cut_by_max_tokens_ends_with_length_and_is_no_text(smollm2, max_tokens):
    parameters = {
        "properties": {"city": {"type": "string", "minLength": 500}},
        "required": ["city"],
    }
    tool = {"type": "function", "function": {"name": "say", "parameters": parameters}}
    answer = ask(smollm2, tools=[tool], tool_choice="required", max_tokens=max_tokens)
    assert answer.finishes == [Finish("length")]
    assert answer.texts == []
    assert bool(answer.arguments) == (max_tokens == 40)


def test_auto_may_answer_in_prose(smollm2):
    answer = ask(smollm2, prompt="Say hello.", tools=[WEATHER], tool_choice="auto")
    assert answer.text
    assert answer.finishes == [Finish("length")]


def test_tools_that_must_not_be_called_are_not_mentioned(smollm2):
    silent = ask(smollm2, tools=[WEATHER], tool_choice="none")
    assert silent.usage.prompt_tokens == ask(smollm2).usage.prompt_tokens


# Counting


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "Count me."},
        {"messages": [Message("system", "Be brief."), Message("user", "Hi, " * 40)]},
        {"tools": [WEATHER, ADD]},
        {"tools": [WEATHER], "tool_choice": "required", "n": 2},
    ],
    ids=["a prompt", "a chat", "tools", "a tool that must be called"],
)
def test_a_prompt_is_counted_as_the_model_reads_it(smollm2, fields):
    fields = {"prompt": PROMPT} | fields
    counted = smollm2.count_tokens(InferenceRequest(**fields))
    assert counted == ask(smollm2, max_tokens=1, **fields).usage.prompt_tokens


def test_a_prompt_over_the_context_is_counted_all_the_same(smollm2):
    counted = smollm2.count_tokens(InferenceRequest(prompt="word " * 2000))
    assert 2000 < counted < 2100


# What it refuses


def test_a_prompt_over_the_context_is_refused_with_both_numbers(smollm2):
    with pytest.raises(
        InvalidRequestError, match=rf"\d+ tokens.* {smollm2.context_tokens}"
    ) as caught:
        ask(smollm2, prompt="word " * 2000)
    assert caught.value.code == "context_length_exceeded"


def test_a_request_without_a_callback_is_a_mistake_in_the_code(smollm2):
    with pytest.raises(ValueError, match="stream_callback"):
        smollm2.generate(InferenceRequest(prompt="x"))


class FakeServer:
    """llama.cpp's server, saying what it is told to."""

    def __init__(self, *chunks):
        self.chunks = chunks

    def handle_chat_completions(self, _body, callback):
        for chunk in self.chunks:
            if callback(chunk):
                return


def refuse(**error):
    model = _LoadedModel(FakeServer({"error": error}), Path("/srv/models/x.gguf"))
    model.chat({}, lambda _chunk: True)


def test_a_refusal_never_tells_where_the_model_is():
    with pytest.raises(InvalidRequestError) as caught:
        refuse(code=400, message="no template in /srv/models/x.gguf")
    assert caught.value.message == "no template in x.gguf"


def test_a_failure_of_llama_cpp_is_not_the_callers_fault():
    with pytest.raises(RuntimeError, match="out of memory"):
        refuse(code=500, message="out of memory")


# Cancelling


def test_false_stops_the_decode_and_the_usage_is_that_far(smollm2):
    answer = ask(smollm2, until=lambda _item: True, max_tokens=400)
    assert len(answer.items) == 1
    assert answer.usage.completion_tokens == 1


def test_what_the_callback_raises_comes_out_after_the_run_is_cancelled(smollm2):
    class BrokenError(Exception):
        pass

    def emit(_item):
        raise BrokenError

    with pytest.raises(BrokenError):
        smollm2.generate(InferenceRequest(prompt=PROMPT, stream_callback=emit))
    assert ask(smollm2).texts


def test_a_prefill_is_cancelled_between_two_batches(smollm2):
    checked_at = []

    class Control:
        @property
        def is_over(self):
            checked_at.append(monotonic())
            return len(checked_at) > 1

    prompt = "word " * (smollm2.context_tokens - 100)
    started_at = monotonic()
    items = []
    smollm2.generate(
        InferenceRequest(prompt=prompt, stream_callback=items.append, control=Control())
    )
    cancelled_in = monotonic() - started_at
    assert items == []
    started_at = monotonic()
    ask(smollm2, prompt=prompt, max_tokens=1)
    assert cancelled_in < (monotonic() - started_at) / 2


def test_a_cancelled_run_frees_its_slot(smollm2):
    for _ in range(6):
        ask(smollm2, until=lambda _item: True, max_tokens=400)
    started_at = monotonic()
    assert len(ask(smollm2).texts) > 1
    assert monotonic() - started_at < 5


def test_requests_run_together_and_do_not_mix(smollm2):
    words = ["crimson apples", "yellow bananas", "purple grapes"]
    answers = {}
    is_under_way = threading.Barrier(len(words), timeout=30)

    def run(word):
        waited = []

        def until(_item):
            # Each has decoded something before any goes on: they share the model.
            if not waited:
                waited.append(is_under_way.wait())
            return False

        only = {"type": "json_schema", "json_schema": {"schema": {"const": word}}}
        answers[word] = ask(smollm2, response_format=only, max_tokens=30, until=until).text

    threads = [threading.Thread(target=run, args=(word,)) for word in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {word: json.loads(text) for word, text in answers.items()} == {w: w for w in words}


# Loading


def test_creating_the_backend_loads_nothing(smollm2_path):
    backend = LlamaCppBackend(smollm2_path)
    assert not backend.is_loaded
    assert backend.context_tokens == 2048


def test_an_installed_model_goes_by_its_name(smollm2_path):
    backend = LlamaCppBackend("smollm2", context_tokens=256, parallel=1)
    backend.load()
    backend.load()
    assert backend.is_loaded
    assert ask(backend, max_tokens=2).texts
    backend.close()
    backend.close()
    assert not backend.is_loaded
    with pytest.raises(EngineClosedError):
        ask(backend)


def test_close_cancels_what_runs(smollm2_path):
    backend = LlamaCppBackend(smollm2_path, context_tokens=512, parallel=1)
    is_decoding = threading.Event()
    failures = []

    def run():
        try:
            ask(backend, max_tokens=None, until=lambda _item: is_decoding.set())
        except EngineClosedError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert is_decoding.wait(30)
    backend.close()
    thread.join(10)
    assert len(failures) == 1


def test_a_backend_that_was_never_loaded_can_be_closed(smollm2_path):
    backend = LlamaCppBackend(smollm2_path)
    backend.close()
    with pytest.raises(EngineClosedError):
        backend.load()


def test_first_requests_at_once_load_one_model(smollm2_path):
    backend = LlamaCppBackend(smollm2_path, context_tokens=256, parallel=2)
    models = []
    threads = [
        threading.Thread(target=lambda: models.append(backend._get_loaded())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    backend.close()
    assert len(models) == 4
    assert len(set(models)) == 1


def test_a_model_that_is_not_installed_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMSTREAM_CACHE_DIR", str(tmp_path))
    with pytest.raises(ConfigurationError, match="flask llmstream model install smollm2"):
        LlamaCppBackend("smollm2").load()


def test_a_missing_file_is_named_without_its_directory(tmp_path):
    backend = LlamaCppBackend(tmp_path / "none.gguf")
    with pytest.raises(ConfigurationError, match=r"none\.gguf.*llmstream model install") as caught:
        backend.load()
    assert str(tmp_path) not in caught.value.message


def test_it_is_ready_where_its_file_is_there_and_loads_nothing_to_tell(smollm2_path, tmp_path):
    backend = LlamaCppBackend(smollm2_path)
    backend.check_ready()
    assert not backend.is_loaded
    backend.close()
    with pytest.raises(EngineClosedError):
        backend.check_ready()
    with pytest.raises(ConfigurationError, match="model install"):
        LlamaCppBackend(tmp_path / "none.gguf").check_ready()


def test_a_file_that_is_no_model_is_named_without_its_directory(tmp_path):
    (tmp_path / "bad.gguf").write_text("no model")
    with pytest.raises(ConfigurationError, match=r"cannot load bad\.gguf") as caught:
        LlamaCppBackend(tmp_path / "bad.gguf").load()
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize("option", ["context_tokens", "parallel", "threads"])
def test_an_option_out_of_range_is_named(option):
    with pytest.raises(ConfigurationError, match=f"{option} must be at least 1, not 0"):
        LlamaCppBackend("x.gguf", **{option: 0})


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ("libgomp.so.1: cannot open shared object file", "libgomp1"),
        ("No module named 'xllamacpp'", r"pip install 'flask-llmstream\[llamacpp\]'"),
    ],
)
def test_a_binding_that_cannot_be_imported_names_the_remedy(monkeypatch, message, remedy):
    real_import = builtins.__import__

    def fail(name, *args, **kwargs):
        if name == "xllamacpp":
            raise ImportError(message)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ConfigurationError, match=remedy):
        LlamaCppBackend("x.gguf")


PRELUDE = """
import os, sys
from flask_llmstream.backends.llama_cpp import LlamaCppBackend
from flask_llmstream.core import runtime
from flask_llmstream.core.messages import InferenceRequest

def ask(backend, max_tokens=3, emit=lambda item: True):
    request = InferenceRequest(prompt="Hi", max_tokens=max_tokens, stream_callback=emit)
    return backend.generate(request).usage.completion_tokens

backend = LlamaCppBackend(sys.argv[1], context_tokens=256, parallel=2)
"""


def test_a_process_that_ends_in_the_middle_of_a_decode_ends_cleanly(smollm2_path):
    source = """
    is_decoding = runtime.ThreadParker()
    runtime.start_thread(lambda: ask(backend, 200, lambda item: is_decoding.unpark() or True))
    is_decoding.park()
    print("leaving")
    """
    assert run_python(PRELUDE + dedent(source), smollm2_path) == "leaving\n"


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_a_backend_created_before_fork_works_on_both_sides(smollm2_path):
    source = """
    child = os.fork()
    assert ask(backend) == 3
    if child:
        assert os.waitpid(child, 0)[1] == 0
        print("both")
    """
    assert run_python(PRELUDE + dedent(source), smollm2_path) == "both\n"


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_a_model_loaded_before_fork_is_loaded_anew_in_the_child(smollm2_path):
    source = """
    backend.load()
    child = os.fork()
    if not child:
        assert not backend.is_loaded
        os._exit(0 if ask(backend) == 3 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert ask(backend) == 3
    print("both")
    """
    assert run_python(PRELUDE + dedent(source), smollm2_path) == "both\n"


def test_in_a_patched_process_the_hub_turns_while_a_native_thread_decodes(smollm2_path):
    source = """
    import gevent
    backend.load()
    gevent.sleep(0)
    parker = runtime.make_parker()
    counts = []

    def work():
        counts.append(ask(backend, 30))
        parker.unpark()

    turns = 0
    def turn():
        global turns
        while not counts:
            turns += 1
            gevent.sleep(0.005)

    turner = gevent.spawn(turn)
    with gevent.Timeout(40):
        runtime.start_thread(work)
        while not counts:
            parker.park()
        turner.join()
    assert counts[0] > 3, counts
    assert turns > counts[0], turns
    """
    patch = "from gevent import monkey; monkey.patch_all()\n"
    run_python(patch + PRELUDE + dedent(source), smollm2_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_port_is_opened_and_no_file_is_left(smollm2_path, tmp_path):
    source = """
    ask(backend)
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            pass  # the descriptor that listed them
    sockets = {link[len("socket:["):-1] for link in links if link.startswith("socket:[")}
    assert sockets  # llama.cpp's own, and nobody can reach it
    for table in ("tcp", "tcp6", "udp", "udp6"):
        lines = open(f"/proc/self/net/{table}").read().splitlines()[1:]
        assert not sockets & {line.split()[9] for line in lines}, table
    assert os.listdir(os.environ["TMPDIR"]) == []
    """
    environ = dict(os.environ, TMPDIR=str(tmp_path))
    run_python(PRELUDE + dedent(source), smollm2_path, env=environ)


def test_loading_and_answering_say_nothing(smollm2_path, capfd):
    backend = LlamaCppBackend(smollm2_path, context_tokens=256, parallel=1)
    ask(backend, max_tokens=2)
    backend.close()
    assert capfd.readouterr() == ("", "")
