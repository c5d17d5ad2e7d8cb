"""Decoding MLA with many heads on Hopper, where groups of four warps have tasks of their own.

Triton proper gives all warps the same task, so tensor cores wait while codes are decoded and exponentials taken. In
Gluon, Triton's lower level, a program here is

- a producer, which brings tiles of 64 keys into shared memory, 8-bit codes decoded to 16 bits;
- two consumers. Consumer 0 takes the even tiles: scores, softmax, probabilities; consumer 1 the odd ones. Each adds up
  its half of the output's columns, over all tiles in their order: its own tile with probabilities from registers, the
  other's with those that the other published in shared memory, next to the maximum of the rows so far and what that
  scales older sums by.

While one consumer is at its exponentials, the other keeps the tensor cores busy. A stage of shared memory belongs to
the tiles of one consumer. Its halves, the columns below 256 and those above, are filled and freed one by one: consumer
0 is the last that reads the lower half, consumer 1 the upper. That two groups share out the columns and alternate tiles
is the "seesaw" schedule of FlashMLA.

Sums are scaled where a maximum has grown by 2^8 and more, not in every tile, as FlashAttention-4 does it.

Arithmetic, masks and segments are those of `kvq_core.kernels.latent` and `kvq_core.kernels.mla`.
"""

from kvq_core.kernels.groups.kernel import attend_mla_groups as attend_mla_groups
