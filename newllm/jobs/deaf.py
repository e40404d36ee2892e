"""Makes the process that imports it deaf to Ctrl-C: a terminal sends it to all processes of a sweep, and the sweep ends them itself."""

import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)
