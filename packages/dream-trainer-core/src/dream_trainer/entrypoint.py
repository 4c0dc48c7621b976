"""entrypoint: runs a script's main on as many ranks as its trainer's layout wants."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from dream_trainer.world import torchrun

P = ParamSpec("P")
R = TypeVar("R")


def entrypoint(main: Callable[P, R]) -> Callable[P, R]:
    """Decorate a script's main so that `python train.py` uses the GPUs of this machine.

    main runs in this process until it makes a trainer. If the trainer's `device_parameters` are for
    several ranks, and there are that many visible GPUs, this process becomes torchrun then, which
    starts the script with the same arguments on each rank: one per GPU if a degree is "auto",
    otherwise as many as the degrees multiply to. With `SINGLE_DEVICE()`, with `device="cpu"`, with
    at most one GPU, or under torchrun, main continues. So make the trainer early: what comes before
    it runs once more, on each rank.

    Ctrl-C ends the process with exit status 130 and one line instead of a traceback. torchrun's
    report of failures shows an error with its traceback.

    Call the decorated function under `if __name__ == "__main__"`.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with torchrun.starting_ranks_of(_this_script()):
                return main(*args, **kwargs)
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            sys.exit(130)
        except Exception as error:
            torchrun.record_error(error, f"{type(error).__name__}: {error}", time.time())
            raise

    return run


def _this_script() -> list[str]:
    """Command line of the running script, without the interpreter."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    script = ["-m", spec.name] if spec is not None else [sys.argv[0]]
    return [*script, *sys.argv[1:]]
