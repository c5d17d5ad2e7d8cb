"""Benchmarks of kvq against its peers and the bandwidth of the machine: `python -m bench` on a GPU host."""
