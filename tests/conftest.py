"""What holds for all tests: where they start from must not depend on who starts them."""

from __future__ import annotations

import os
import signal

from hypothesis import settings

# A suite that was started in the background inherits ignored signals, and so would every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for ignored in (signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.SIG_DFL)

# The same examples in every run, or a change is blamed for what chance found. EXPLORE=1 looks for new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("explore")
settings.load_profile("explore" if os.environ.get("EXPLORE") else "same")
