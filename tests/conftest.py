"""One thread for every test and every process that a test starts: small tensors gain nothing from more."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
