"""``flask llmstream``: in-process for what it prints, as a process for terminals and signals."""

import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import textwrap
from contextlib import closing, contextmanager, suppress
from time import monotonic

import pytest
from click.testing import CliRunner
from flask import Flask
from flask.cli import ScriptInfo
from flask_apps import serving

from flask_llmstream import InvalidRequestError, LLMStream, Usage, models
from flask_llmstream.cli import llmstream
from flask_llmstream.testing import ScriptedBackend

WAIT_SECONDS = 30
PATIENCE_SECONDS = 3
ENGINE = ["AsyncInferenceEngine"]


def make_app(llm, **settings):
    app = Flask("tests")
    app.config.update({f"LLMSTREAM_{name.upper()}": value for name, value in settings.items()})
    llm.init_app(app)
    return app


def run(app, *arguments, **options):
    """`flask llmstream …` for *app*."""
    return CliRunner().invoke(
        llmstream, arguments, obj=ScriptInfo(create_app=lambda: app), **options
    )


@pytest.fixture
def llm():
    llm = LLMStream()
    llm.add_backend("first", ScriptedBackend("Hel", "lo", Usage(3, 2), supports=["n", "tools"]))
    return llm


# engines


def test_engines_lists_every_model_and_marks_the_default(llm):
    llm.add_backend("deaf", ScriptedBackend(supports=[]), worker_threads=3, queue_size=7)

    @llm.backend("remote", worker="greenlet")
    def ask_upstream(request): ...

    result = run(make_app(llm, worker_threads=5, backpressure="reject"), "engines")

    assert [re.split("  +", line) for line in result.output.splitlines()] == [
        ["MODEL", "ENGINE", "BACKEND", "WORKERS", "QUEUE", "WHEN FULL", "SUPPORTS"],
        ["first (default)", *ENGINE, "ScriptedBackend", "5 threads", "1000", "reject", "n, tools"],
        ["deaf", *ENGINE, "ScriptedBackend", "3 threads", "7", "reject", "nothing"],
        ["remote", *ENGINE, "ask_upstream", "1000 greenlets", "1000", "reject", "unsaid"],
    ]


def test_engines_shows_what_a_callback_backend_takes_at_a_time(llm):
    class Batching:
        max_concurrency = 64

        def submit(self, request, emit): ...

    llm.add_backend("batching", Batching())
    assert "64 callbacks" in run(make_app(llm), "engines").output


def test_engines_of_an_engine_that_tells_nothing(llm):
    class Quiet:
        def queue_stats(self):
            return {}

        worker_stats = queue_stats

        def backend_for(self, model):
            return ScriptedBackend()

    llm.add_engine(Quiet(), models=["quiet"])
    assert re.search(
        r"quiet +Quiet +ScriptedBackend +\? threads", run(make_app(llm), "engines").output
    )


def test_an_app_without_the_extension_is_told_what_to_do():
    result = run(Flask("bare"), "engines")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: The app bare has no LLMStream. Call llm.init_app(app) where it is made.\n"
    )


def test_a_wrong_setting_is_one_line(llm):
    def create_app():
        return make_app(llm, queue_size=-1)

    result = CliRunner().invoke(llmstream, ["config"], obj=ScriptInfo(create_app=create_app))
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: LLMSTREAM_QUEUE_SIZE must be ")
    assert result.stderr.count("\n") == 1


# config


def test_config_lists_settings_and_the_defaults_of_those_that_differ(llm):
    output = run(make_app(llm, queue_size=7), "config").output
    assert re.search(r"^LLMSTREAM_QUEUE_SIZE +7 +default: 1000$", output, re.MULTILINE)
    assert re.search(r"^LLMSTREAM_BACKPRESSURE +block$", output, re.MULTILINE)
    assert re.search(r'^LLMSTREAM_DEFAULT_MODEL +""$', output, re.MULTILINE)
    assert output.count("default: ") == 1


def test_config_shows_names_of_api_keys_and_never_the_keys(llm):
    result = run(make_app(llm, api_keys={"batch": "s3cret"}), "config")
    assert "batch" in result.output
    assert "s3cret" not in result.output


def test_config_points_at_a_setting_that_does_not_exist(llm):
    result = run(make_app(llm, deadline=3), "config")
    assert result.exit_code == 0
    assert result.stderr == "There is no setting LLMSTREAM_DEADLINE; it changes nothing.\n"


# stats


@pytest.fixture
def no_key(monkeypatch):
    """An environment without a key in it, whatever the developer's has."""
    monkeypatch.delenv("LLMSTREAM_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def run_stats(*arguments, **options):
    return CliRunner().invoke(llmstream, ["stats", *arguments], **options)


@pytest.fixture
def server(llm, no_key):
    """An app with its figures under /ops, behind a key."""
    llm.add_backend("broken", ScriptedBackend(ValueError("as planned")))
    app = make_app(llm, api_keys="s3cret")
    app.register_blueprint(llm.openai_blueprint())
    app.register_blueprint(llm.ops_blueprint(), url_prefix="/ops")
    with serving(app) as url:
        client = app.test_client()
        for model in ("first", "first", "broken"):
            body = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
            client.post(
                "/v1/chat/completions", json=body, headers={"Authorization": "Bearer s3cret"}
            )
        yield f"{url}/ops"


def test_stats_shows_what_a_server_does(server):
    result = run_stats("--url", server, env={"LLMSTREAM_API_KEY": "s3cret"})

    first, *lines = result.output.splitlines()
    assert first == f"Worker {os.getpid()}"
    figures = ["ACCEPTED", "QUEUED", "ACTIVE", "COMPLETED", "CANCELLED", "TIMED OUT", "DROPPED"]
    assert [re.split("  +", line) for line in lines] == [
        ["MODEL", *figures, "SLOW READERS", "FAILED", "REJECTED"],
        ["broken", "1", "0", "0", "0", "0", "0", "0", "0", "1", "0"],
        ["first", "2", "0", "0", "2", "0", "0", "0", "0", "0", "0"],
        ["(all)", "3", "0", "0", "2", "0", "0", "0", "0", "1", "0"],
        [""],
        ["END", "WHY", "REQUESTS"],
        ["failed", "engine_error", "1"],
    ]


def test_stats_needs_the_key_that_the_server_wants(server):
    result = run_stats("--url", server + "/", "--key", "wrong")
    assert result.exit_code == 1
    assert "It wants an API key, in LLMSTREAM_API_KEY." in result.stderr
    assert run_stats("--url", server + "/", "--key", "s3cret").exit_code == 0


def test_stats_without_a_server_says_what_to_do():
    result = run_stats()
    assert result.exit_code == 2
    assert "--url" in result.stderr
    assert "ops_blueprint" in result.stderr


@pytest.mark.parametrize("url", ["file:///etc/passwd", "127.0.0.1:8000", "http:/x", ""])
def test_stats_asks_over_http_only(url):
    result = run_stats("--url", url)
    assert result.exit_code == 2
    assert "is no http:// or https:// address" in result.stderr


@contextmanager
def answering(answer):
    """A server whose only route answers so."""
    app = Flask("elsewhere")
    app.add_url_rule("/llmstream/stats", view_func=answer)
    with serving(app) as url:
        yield url


@pytest.mark.parametrize(
    "answer",
    [
        lambda: ("", 302, {"Location": "http://127.0.0.1:9/elsewhere"}),
        lambda: ("broken", 500),
        lambda: "no JSON",
        lambda: {"pid": "me"},
        lambda: {"pid": 1, "total": {"accepted": []}, "models": {}},
    ],
)
def test_stats_of_what_is_no_such_server_is_one_line(answer, no_key):
    with answering(answer) as url:
        result = run_stats("--url", url, "--key", "k")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {url} tells no figures: ")
    assert result.stderr.count("\n") == 1


def test_stats_tells_that_the_blueprint_is_missing(no_key):
    with serving(Flask("bare")) as url:
        assert "has no llm.ops_blueprint() there" in run_stats("--url", url).stderr


def test_stats_of_a_server_that_is_not_there_is_one_line(no_key):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        result = run_stats("--url", f"http://127.0.0.1:{sock.getsockname()[1]}")
    assert result.exit_code == 1
    assert "refused" in result.stderr
    for url in ("http://[", "http://nobody.invalid:x"):
        assert run_stats("--url", url).stderr.count("\n") == 1


def test_stats_leaves_the_terminal_alone(no_key):
    document = {"pid": 1, "total": {"failed": {"\x1b[2J": 1}}, "models": {"\x1b[31mred": {}}}
    with answering(lambda: document) as url:
        output = run_stats("--url", url).output
    assert "\x1b" not in output
    assert "red" in output


# model


@pytest.fixture
def store(monkeypatch, tmp_path):
    """An empty model store."""
    monkeypatch.setenv("LLMSTREAM_CACHE_DIR", str(tmp_path))
    return tmp_path


def run_without_app(*arguments):
    return CliRunner().invoke(llmstream, ["model", *arguments])


def put_model(store):
    """As if smollm2 were installed there."""
    model = models.MODELS["smollm2"]
    file = store / "models" / model.filename
    file.parent.mkdir()
    with file.open("wb") as sparse:
        sparse.truncate(model.size_bytes)
    return file


def test_model_list_shows_what_is_installed(store):
    assert re.search(r"smollm2 +98 MB +Apache-2.0 +not installed", run_without_app("list").output)
    file = put_model(store)
    assert str(file) in run_without_app("list").output


def test_model_path_prints_the_path_alone(store):
    file = put_model(store)
    assert run_without_app("path").output == f"{file}\n"


def test_model_path_of_a_missing_model_names_the_command_that_installs_it(store):
    result = run_without_app("path", "smollm2")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: The model smollm2 is not installed. Run: flask llmstream model install smollm2\n"
    )


def test_model_install_of_an_unknown_model_names_the_known_ones(store):
    result = run_without_app("install", "gpt")
    assert result.exit_code == 1
    assert result.stderr == "Error: There is no model 'gpt'. Known are: smollm2.\n"


def test_model_install_where_it_is_installed_says_where(store):
    file = put_model(store)
    assert run_without_app("install").output == f"smollm2 is in {file}\n"


@pytest.mark.parametrize("module", ["flask llmstream", "flask_llmstream"])
def test_the_model_commands_need_no_app(store, module):
    file = put_model(store)
    finished = subprocess.run(
        [sys.executable, "-m", *module.split(), "model", "path"],
        cwd=store,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=True,
    )
    assert finished.stdout == f"{file}\n"


def test_an_interrupted_install_exits_with_130_and_leaves_nothing(store):
    with socket.create_server(("127.0.0.1", 0)) as silent_index:
        silent_index.settimeout(WAIT_SECONDS)
        environment = {name: text for name, text in os.environ.items() if "PIP_" not in name}
        environment |= {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": f"http://127.0.0.1:{silent_index.getsockname()[1]}/simple",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "flask", "llmstream", "model", "install"],
            cwd=store,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            connection, _ = silent_index.accept()  # Now pip waits for an answer.
            with connection:
                os.killpg(process.pid, signal.SIGINT)
                _, errors = process.communicate(timeout=WAIT_SECONDS)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 130
    assert errors == "\nInterrupted. smollm2 was not installed.\n"
    assert [file.name for file in (store / "models").iterdir()] == [".lock"]


# chat


def test_chat_answers_piped_lines_and_remembers_them():
    llm = LLMStream()
    backend = ScriptedBackend("Hel", "lo", Usage(3, 2))
    llm.add_backend("m", backend)

    result = run(
        make_app(llm),
        *("chat", "--system", "Be brief.", "--max-tokens", "9", "--temperature", "0"),
        input="One?\n\nTwo?",
    )

    assert (result.exit_code, result.output) == (0, "Hello\nHello\n")
    first, second = backend.requests
    assert [(each.role, each.text) for each in second.messages] == [
        ("system", "Be brief."),
        ("user", "One?"),
        ("assistant", "Hello"),
        ("user", "Two?"),
    ]
    assert len(first.messages) == 2
    assert (first.model, first.max_tokens, first.temperature) == ("m", 9, 0.0)


def test_chat_goes_on_after_an_error_and_forgets_the_question():
    llm = LLMStream()
    asked = []

    @llm.backend("m")
    def answer(request):
        asked.append([message.text for message in request.messages])
        yield "Well. "
        if len(asked) == 1:
            raise InvalidRequestError("Too hard.")

    result = run(make_app(llm), "chat", input="Why?\nHow?\n")

    assert result.stdout == "Well. Well. \n"
    assert result.stderr == "\nError: Too hard.\n"
    assert asked == [["Why?"], ["How?"]]
    assert result.exit_code == 1


def test_chat_takes_bytes_that_are_no_text():
    llm = LLMStream()
    backend = ScriptedBackend("Pardon?")
    llm.add_backend("m", backend)
    run(make_app(llm), "chat", input=b"\xff\n")
    assert backend.requests[0].messages[0].text == "\N{REPLACEMENT CHARACTER}"


def test_chat_with_an_unknown_model_does_not_begin(llm):
    result = run(make_app(llm), "chat", "--model", "second", input="Hi\n")
    assert (result.exit_code, result.stderr) == (1, "Error: There is no model 'second' here.\n")


def test_an_interrupted_chat_in_a_pipe_exits_with_130(llm):
    @llm.before_submit
    def interrupt(request):
        raise KeyboardInterrupt

    result = run(make_app(llm), "chat", input="Hi\nAnd?\n")
    assert (result.exit_code, result.stderr) == (130, "\nInterrupted.\n")


class Terminal:
    """A process on a terminal of its own, and what it has shown."""

    def __init__(self, *command, **options):
        self._control, terminal = pty.openpty()
        self.shown = ""
        # Opening the terminal as the leader of a session makes it the controlling one,
        # without which Ctrl-C is only a character.
        attach = (
            "import os, sys; os.open(os.ttyname(0), os.O_RDWR); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", attach, *command],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            **options,
        )
        os.close(terminal)

    def type(self, text):
        os.write(self._control, text.encode())

    def wait_for(self, text, seconds=WAIT_SECONDS):
        """Until *text* is shown, after what was waited for before."""
        until = monotonic() + seconds
        while text not in self.shown:
            ready, _, _ = select.select([self._control], [], [], max(0, until - monotonic()))
            if not ready:
                raise TimeoutError(f"no {text!r} in {self.shown!r}")
            try:
                self.shown += os.read(self._control, 4096).decode()
            except OSError as exc:
                raise AssertionError(f"it ended: {self.shown!r}") from exc
        self.shown = self.shown.partition(text)[2]

    def press_ctrl_c(self, wait):
        """
        Until ``wait(seconds)`` is happy, as a person would.

        Once does not always do: a signal that comes just before Python blocks (in
        readline's select, in a lock) is seen when that returns.
        """
        for _ in range(WAIT_SECONDS // PATIENCE_SECONDS):
            self.type("\x03")
            with suppress(TimeoutError, subprocess.TimeoutExpired):
                wait(PATIENCE_SECONDS)
                return
        raise TimeoutError(f"Ctrl-C does nothing at {self.shown!r}")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._control)


@pytest.fixture
def open_chat(tmp_path):
    """A chat on a terminal, with a backend that never ends its answer to "endless"."""
    (tmp_path / "app.py").write_text(
        textwrap.dedent("""
            from flask import Flask
            from flask_llmstream import Finish, LLMStream
            from flask_llmstream.testing import Gate

            llm = LLMStream(app := Flask(__name__))

            @llm.backend("m")
            def answer(request):
                texts = [message.text for message in request.messages]
                yield f"<{'|'.join(texts)}>"
                if texts[-1] == "endless":
                    Gate().pass_through()
                yield Finish("length")
        """)
    )
    environment = {**os.environ, "TERM": "dumb", "PYTHONPATH": str(tmp_path)}
    terminal = Terminal(
        *(sys.executable, "-m", "flask", "llmstream", "chat", "--max-tokens", "50"),
        cwd=tmp_path,
        env=environment,
    )
    with closing(terminal):
        terminal.wait_for("> ")
        yield terminal


def test_ctrl_c_stops_the_answer_only_and_ctrl_d_leaves(open_chat):
    open_chat.type("endless\n")
    open_chat.wait_for("<endless>")
    open_chat.press_ctrl_c(lambda seconds: open_chat.wait_for("[stopped]", seconds))
    open_chat.wait_for("> ")
    open_chat.type("so?\n")
    open_chat.wait_for("<endless|<endless>|so?>")
    open_chat.wait_for("1 tokens, the first after ")
    open_chat.wait_for("; cut off at the length limit")
    open_chat.wait_for("> ")
    open_chat.type("\x04")
    assert open_chat.process.wait(WAIT_SECONDS) == 0


def test_ctrl_c_at_the_prompt_leaves(open_chat):
    open_chat.type("half a que")
    open_chat.wait_for("half a que")
    open_chat.press_ctrl_c(open_chat.process.wait)
    assert open_chat.process.returncode == 0
