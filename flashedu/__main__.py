"""`python -m flashedu`: the command line, without an installed script."""

import sys

try:
    from flashedu.cli import main
except ModuleNotFoundError as error:
    if error.name not in ("typer", "rich", "click"):
        raise
    sys.exit(f"flashedu needs {error.name}: pip install {error.name}")

if __name__ == "__main__":
    sys.exit(main())
