"""``python -m benchmarks COMMAND``: each command is a module with ``main(argv)``, loaded on use."""

import sys
from importlib import import_module

COMMANDS = {"codegen": "benchmarks.codegen"}


def main(argv: list[str]) -> int:
    """Hand the arguments after the command to its module."""
    if not argv or argv[0] not in COMMANDS:
        print(f"usage: python -m benchmarks {{{','.join(COMMANDS)}}} [--help] ...", file=sys.stderr)
        return 2
    return import_module(COMMANDS[argv[0]]).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
