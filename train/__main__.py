"""``python -m train``: sets the environment up and hands over to :mod:`train.cli`."""

import os
import sys
import traceback

# Spawned children import this file again; the guard keeps Lightning out of those that only time one
# layer.
if __name__ == "__main__":
    # Read once, when torch loads its OpenMP: waiting threads sleep instead of spinning, which is
    # worth several times the speed on a machine that does something else as well.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A killed rank leaves a semaphore behind. Python's resource tracker removes it, and its warning
    # would follow our error message.
    sys.warnoptions.append("ignore:resource_tracker")
    import torch

    # Triton reads this when it is first imported (by Lightning): without a GPU its kernels are
    # interpreted.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")

    from train.cli import main

    try:
        status = main()
    except Exception:
        # Python's exit status for an exception, 1, is ours for a failed verdict.
        traceback.print_exc()
        status = 3
    sys.exit(status)
