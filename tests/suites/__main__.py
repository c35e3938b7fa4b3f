"""``python -m tests.suites NAME``: fetch a suite, and become the process that runs it.

Ends with the counts, and with pytest's status: 1 if a test failed.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from tests.suites.child import SUITES, load
from tests.suites.source import fetch
from train import UsageError

ROOT = Path(__file__).parent.parent.parent


def main(argv: list[str]) -> NoReturn:
    """Run one suite; what follows ``--`` is pytest's."""
    split = argv.index("--") if "--" in argv else len(argv)
    ours, pytests = argv[:split], argv[split + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m tests.suites",
        description="Run a published test suite against flashlayer.",
        usage="%(prog)s [-h] [--source FOLDER] [--cases N] NAME [-- PYTEST_ARGUMENT ...]",
    )
    parser.add_argument("name", choices=SUITES, metavar="NAME", help=", ".join(SUITES))
    parser.add_argument("--source", type=Path, help="folder that holds the suite, unpacked")
    parser.add_argument(
        "--cases", type=int, default=10, help="most cases of one test function; 0 for all of them"
    )
    args = parser.parse_args(ours)
    suite = load(args.name)
    try:
        folder = fetch(suite.source) if args.source is None else args.source.resolve()
        missing = [file for file in suite.files if not (folder / file).exists()]
        if missing:
            raise UsageError(f"{folder} does not hold {suite.source.folder}: no {missing[0]}")
    except UsageError as error:
        parser.error(str(error))
    # -P keeps the suite's own packages, which may be called "tests", from hiding ours.
    command = [sys.executable, "-P", "-m", "tests.suites.child", args.name, str(args.cases)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    os.chdir(folder)
    os.execve(command[0], [*command, *pytests], environment)


if __name__ == "__main__":
    # Read once, when torch loads its OpenMP: waiting threads sleep instead of spinning.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main(sys.argv[1:])
