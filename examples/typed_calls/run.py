"""Runs the typed calls: a worker on a broker in a temporary folder, and each way to call it.

Everything it started has ended when it returns, also after Ctrl-C.
"""

import asyncio
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from embedded import Interrupts, started, use_folder_as_broker  # noqa: E402  # it lies beside this example


def main() -> int:
    interrupts = Interrupts()
    with tempfile.TemporaryDirectory(prefix="spakky-celery-") as name, ExitStack() as stack:
        folder = Path(name)
        use_folder_as_broker(folder, HERE)
        from app import Counter, create_app  # noqa: PLC0415  # it reads the environment that was just set

        print("Starting a worker on a broker in a temporary folder ...")
        stack.enter_context(started(folder, "worker", "app:create_app", "-l", "INFO"))
        app = create_app().start()
        stack.callback(app.stop)
        stack.enter_context(interrupts.raised())
        counter = app.container.get(Counter)
        print(f"  dispatch              -> {counter.one()!r}")
        print(f"  dispatch_async        -> {asyncio.run(counter.one_async())!r}")
        print(f"  dispatch_many         -> {counter.many()!r}")
        print(f"  configure             -> {counter.soon()!r}")
        print(f"  chain                 -> {counter.chained()!r}")
        print(f"  group, chord          -> {counter.gathered()!r}")
    print("The worker has stopped.")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nInterrupted; the worker has stopped.")
        sys.exit(130)
