"""Processes that do not outlive what started them."""

from __future__ import annotations

import os
import threading
from multiprocessing import parent_process


def end_with_parent() -> None:
    """End this process when its parent is gone, by a kill, say. For the start of a pool's processes.

    They would wait for work for ever, or work on unseen. Does nothing in a process that multiprocessing did not start.
    """
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
