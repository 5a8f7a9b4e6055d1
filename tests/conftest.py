"""What holds for every test."""

import signal

# A runner started in the background ignores Ctrl-C and hands that on to every process it starts;
# the tests of interruptions need the disposition that a person's terminal gives.
signal.signal(signal.SIGINT, signal.default_int_handler)
