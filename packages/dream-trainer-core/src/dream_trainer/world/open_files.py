"""The limit of open files, of which each process group on the CPU takes one per rank."""

from __future__ import annotations

import logging
import resource

logger = logging.getLogger(__name__)

_SOCKETS_PER_RANK = 5
"""gloo connects each pair of ranks, per group: the default one, `control`, `requests`,
`checkpoint-background`, and about one for all axes of the mesh."""

_OTHER_FILES = 256
"""Data files, loader workers, libraries."""


def allow_open_files(world_size: int) -> None:
    """Raise the soft limit to what a number of ranks takes; warn if the hard limit is lower.

    The usual soft limit, 1024, is too low for 200 ranks.
    """
    needed = _SOCKETS_PER_RANK * world_size + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        logger.warning(
            "%d ranks take about %d open files each, and the hard limit is %d; raise it "
            "(LimitNOFILE= of systemd, /etc/security/limits.conf), or ranks may fail to connect",
            world_size,
            needed,
            hard,
        )
