"""What tests/gpu.sh runs: run.py starts one process a step, a step gives rows of one table."""
