"""Prints requirements out of pyproject.toml, so that they are written down once.

``python tools/requirements.py dependencies test`` prints the project's dependencies and those of the extra ``test``.
"""

import sys
import tomllib
from pathlib import Path


def main() -> None:
    """Prints the requirements of the lists named on the command line, one a line."""
    project = tomllib.loads(Path(__file__).resolve().parents[1].joinpath("pyproject.toml").read_text())["project"]
    for name in sys.argv[1:]:
        requirements = project["dependencies"] if name == "dependencies" else project["optional-dependencies"][name]
        sys.stdout.writelines(requirement + "\n" for requirement in requirements)


if __name__ == "__main__":
    main()
