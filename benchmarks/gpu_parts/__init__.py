"""The parts of gpu_suite.py: each a script of its own, in a process of its own, within a time of its own."""
