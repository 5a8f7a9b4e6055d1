"""How a process ends that was interrupted."""

import signal

# 130 is what moekit exits with. Where the signal came within an `exec` of text, as a dataclass is
# made by one, CPython ends `python -m` by that signal after all; a shell calls both 130.
INTERRUPTED = (130, -signal.SIGINT)
