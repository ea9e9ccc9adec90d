"""Python environments of the libraries that a benchmark compares with, which do not agree with this project's."""

import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path


def environment(name: str, packages: Sequence[str], cache: Path) -> Path:
    """The Python of an environment with these pinned packages below `cache`, which is made if it is not there.

    Without packages it is the project's own.
    """
    if not packages:
        return Path(sys.executable)
    folder = cache / f"environment-{name}"
    python, done = folder / "bin" / "python", folder / "packages.txt"
    if not done.exists() or done.read_text() != "\n".join(packages):
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True, stdout=sys.stderr)
        done.write_text("\n".join(packages))
    return python
