"""Triton's interpreter with ``triton.language`` patched once a launch, not at every helper call."""

from __future__ import annotations

import functools
from typing import Any

from triton.runtime import interpreter


def patch_language_once_per_launch() -> None:
    """Patch for a launch what each module sees of ``triton.language`` once, and restore it all.

    The interpreter runs a kernel as Python, with the functions of ``triton.language`` replaced by
    NumPy ones. ``GridExecutor.__call__`` replaces them before a launch and restores them after it;
    ``InterpretedFunction.__call__`` does the same again at each call of a helper jit function, and
    restores nothing. Listing the members of these modules and classes took 45 % of the time of a
    kernel. What is replaced follows from the globals of the function alone, so the first call from
    a module does all that later ones would; results are bitwise the same.
    """
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    launches: list[dict[int, Any]] = []  # of each running launch: id of globals -> scope

    @functools.wraps(patch)
    def patch_once(function: Any) -> Any:
        if not launches:
            return patch(function)
        scopes, module = launches[-1], id(function.__globals__)
        if module not in scopes:
            scopes[module] = patch(function)
        return interpreter._LangPatchScope()  # the launch restores, not the caller

    @functools.wraps(launch)
    def launch_and_restore(self: Any, *args: Any, **kwargs: Any) -> None:
        launches.append({})
        try:
            launch(self, *args, **kwargs)
        finally:
            # Each scope recorded what the one before it had set.
            for scope in reversed(launches.pop().values()):
                scope.restore()

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_and_restore
