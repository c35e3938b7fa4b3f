"""The process a suite runs in: ``python -m tests.suites.child NAME CASES [PYTEST_ARGUMENT]``."""

import os
import sys
from importlib import import_module

import pytest

from tests.suites.suite import Plugin, Suite

SUITES = ("flash_attn",)


def load(name: str) -> Suite:
    """The suite of the module ``name``."""
    return import_module(f"tests.suites.{name}").SUITE


def main(argv: list[str]) -> int:
    """Put flashlayer in its place and run pytest in the current folder, which is the suite's."""
    name, cases, *arguments = argv
    suite = load(name)
    suite.replace()
    # The suite may have a package "tests" of its own, and imports it by that name.
    for module in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[module]
    options = ["-q", "-c", os.devnull, "--rootdir=.", "-p", "no:cacheprovider", "--tb=short"]
    # Files that the user names take the place of all the suite's.
    named = any(argument.split("::")[0] in suite.files for argument in arguments)
    files = () if named else suite.files
    return pytest.main([*options, *files, *arguments], plugins=[Plugin(suite, int(cases))])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
