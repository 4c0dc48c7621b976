"""entrypoint: runs a script's main on one rank per visible GPU."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from dream_trainer.world.torchrun import record_error

P = ParamSpec("P")
R = TypeVar("R")


def entrypoint(main: Callable[P, R]) -> Callable[P, R]:
    """Decorate a script's main so that `python train.py` uses every visible GPU.

    Under torchrun, or with at most one GPU, main runs in this process. Otherwise this process
    becomes torchrun, which starts the script on one rank per GPU with the same arguments. Ctrl-C
    ends the process with exit status 130 and one line instead of a traceback. torchrun's report
    of failures shows an error with its traceback.

    Call the decorated function under `if __name__ == "__main__"`.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        num_devices = torch.cuda.device_count()
        if "RANK" not in os.environ and num_devices > 1:
            _become_torchrun(num_devices)
        try:
            return main(*args, **kwargs)
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            sys.exit(130)
        except Exception as error:
            record_error(error, f"{type(error).__name__}: {error}", time.time())
            raise

    return run


def _become_torchrun(num_ranks: int) -> None:
    """Replace this process by torchrun, running this script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    script = ["-m", spec.name] if spec is not None else [sys.argv[0]]
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", *torchrun, *script, *sys.argv[1:]])
