"""The source distribution of an installed package, for the test suites that its wheel leaves out."""

import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

FOLDER = Path(__file__).parents[2] / "runs" / "sdist"


def unpacked(package: str) -> Path:
    """Return the folder of the sdist of `package`, in the installed version; download it where it is missing.

    Call it inside a test or a fixture: without a package index, that test fails with a sentence that says what to do.
    """
    name = f"{package}-{version(package)}"
    folder = FOLDER / name
    if not folder.exists():
        archive = FOLDER / f"{name}.tar.gz"
        if not archive.exists():
            download(package)
        with TemporaryDirectory(dir=FOLDER) as unfinished:
            with tarfile.open(archive) as files:
                files.extractall(unfinished, filter="data")
            if not folder.exists():
                (Path(unfinished) / name).rename(folder)
    return folder


def download(package: str) -> None:
    """Let pip download the sdist of `package`, in the installed version, into FOLDER."""
    wanted = f"{package}=={version(package)}"
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--quiet", "--dest", str(FOLDER)]
    finished = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, wanted], capture_output=True, text=True
    )
    if finished.returncode != 0:
        pytest.fail(
            f"The sdist of {wanted}, whose tests are run here, could not be downloaded: connect to a package index, "
            f"or put the file into {FOLDER}.\n{finished.stderr}",
            pytrace=False,
        )
