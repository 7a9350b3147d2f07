"""Gets the Debian packages of the collections: those that are installed, or else downloaded and unpacked beside it all.

Neither root nor an installation is needed; nothing of a package is run. apt checks what it downloads.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from muco.errors import DataError

PACKAGES = (
    "openclipart-png",
    "openclipart-svg",
    "fonts-noto-color-emoji",
    "unicode-data",
    "unicode-cldr-core",
    "tuxpaint-stamps-default",
)
DONE = "unpacked.txt"


def root(folder: Path, packages: Sequence[str] = PACKAGES) -> Path:
    """The folder under which the packages' files are: ``/`` if all are installed, else ``folder``.

    Raises:
        DataError: If this is no Debian or Ubuntu, or apt cannot download a package.
    """
    if all(installed(package) for package in packages):
        return Path("/")
    done = folder / DONE
    if done.is_file() and done.read_text(encoding="utf-8").split() == list(packages):
        return folder
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise DataError(f"there is no {tool} here; on Debian or Ubuntu: apt install {' '.join(packages)}")
    downloads = folder / "packages"
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was killed
    downloads.mkdir(parents=True)
    run("apt-get", "download", *packages, folder=downloads, instead=f"apt install {' '.join(packages)}")
    for file in sorted(downloads.glob("*.deb")):
        run("dpkg", "-x", str(file.resolve()), str(folder.resolve()), folder=downloads, instead=f"dpkg -x {file}")
    shutil.rmtree(downloads)
    done.write_text("\n".join(packages), encoding="utf-8")  # last
    return folder


def installed(package: str) -> bool:
    if shutil.which("dpkg-query") is None:
        return False
    found = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${db:Status-Status}", package],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    return found.returncode == 0 and found.stdout == "installed"


def run(*command: str, folder: Path, instead: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise DataError(f"{' '.join(command[:2])}: {said}; perhaps `apt update` first, or by hand: {instead}")
