"""Queries as rows: see `kvq_core.kernels.groups.rows.kernel`."""
