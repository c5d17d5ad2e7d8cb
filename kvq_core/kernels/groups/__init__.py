"""Decoding MLA on Hopper, where groups of four warps have tasks of their own.

Triton proper gives all warps the same task, so tensor cores and memory wait while codes are decoded and exponentials
taken. In Gluon, Triton's lower level, a program has a producer, which brings tiles of 64 keys into shared memory, and
two consumers, which take them in turns. Two kernels differ in how tiles lie:

- `attend_mla_rows`: bfloat16, more than 32 heads. Queries are the rows of scores, both operands lie in shared memory.
- `attend_mla_columns`: 8 bits. Queries are columns. Codes stay as they are in shared memory; keys and values are left
  operands, decoded in registers on their way into a dot.

Sums are scaled where a maximum has grown by 2^LAZY and more, not in every tile, as FlashAttention-4 does it.
Arithmetic, masks and segments are those of `kvq_core.kernels.latent` and `kvq_core.kernels.mla`.
"""

from kvq_core.kernels.groups.columns.kernel import attend_mla_columns as attend_mla_columns
from kvq_core.kernels.groups.rows.kernel import attend_mla_rows as attend_mla_rows
