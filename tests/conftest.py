"""What holds for every test."""

import os
import signal

import torch

# A runner started in the background ignores Ctrl-C and hands that on to every process it starts;
# the tests of interruptions need the disposition that a person's terminal gives.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Read when triton is first imported. Without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
