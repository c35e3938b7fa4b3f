"""``python -m benchmarks COMMAND``: each command is a module with ``main(argv)``, loaded on use."""

import os
import sys
from importlib import import_module

COMMANDS = {
    name: f"benchmarks.{name}"
    for name in (
        "attention",
        "codegen",
        "context",
        "gpu",
        "gpu_compile",
        "scaling",
        "schedule",
        "training",
    )
}


def main(argv: list[str]) -> int:
    """Hand the arguments after the command to its module."""
    if not argv or argv[0] not in COMMANDS:
        print(f"usage: python -m benchmarks {{{','.join(COMMANDS)}}} [--help] ...", file=sys.stderr)
        return 2
    return import_module(COMMANDS[argv[0]]).main(argv[1:])


# Spawned children import this file again.
if __name__ == "__main__":
    # Read once, when torch loads its OpenMP: waiting threads sleep instead of spinning.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main(sys.argv[1:]))
