"""Queries as columns: see `kvq_core.kernels.groups.columns.kernel`."""
