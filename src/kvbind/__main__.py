"""The command `kvbind`, and `python -m kvbind`.

A Ctrl-C while modules are imported, which takes the most of a short command's time, ends it as any other does.
"""

from __future__ import annotations

import gc
import sys

from kvbind.interrupt import CODE, EndingAtOnce, is_interrupt, say_interrupted


def main() -> None:
    """Run the command, and leave with its exit code."""
    sys.meta_path.insert(0, EndingAtOnce("torch"))
    try:
        from kvbind.cli import main as run

        run()
    except BaseException as error:
        if not is_interrupt(error):
            raise
        say_interrupted()
        sys.exit(CODE)
    finally:
        # the interpreter looks for garbage once more before it ends: a second among what PyTorch has loaded
        gc.freeze()


if __name__ == "__main__":
    main()
