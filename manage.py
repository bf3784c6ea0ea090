#!/usr/bin/env python
"""Django's command line, with this project's settings and the database of this checkout."""

import os
import sys
from pathlib import Path

VENV = Path(__file__).resolve().parent / ".venv"


def main() -> None:
    try:
        from core.__main__ import manage
    except ModuleNotFoundError as exc:
        if (exc.name or "").startswith("core"):
            raise
        python = VENV / "bin" / "python"
        if Path(sys.prefix) == VENV or not python.exists():
            sys.exit(f"{sys.executable} has no {exc.name}. `make up` makes an environment that has it, in .venv.")
        os.execv(python, [str(python), *sys.argv])  # noqa: S606
    manage(sys.argv)


if __name__ == "__main__":
    main()
