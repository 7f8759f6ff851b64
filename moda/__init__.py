"""Mixture-of-Depths Attention (arXiv 2603.15619): one softmax over a layer's sequence and over the depth of a token.

Public names: `attention`, the stand-alone operator; `explain`, which kernels a call of it takes; `DepthStream`, keys
and values that layers leave for later ones; `slot_memory`, where a kernel that makes these can put them.

Axis names in shape comments, here and in every module of the package:
    batch, time     rows of the batch, positions of a row
    query_heads     H, heads of the queries
    kv_heads        Hk, heads of keys and values; query head h reads kv head h // G, with G = H // Hk
    head_dim        d, width of one head
    slots           depth slots: one key and one value of each token, left by an earlier layer

Letters of the mathematics: q, k, v as usual; o the output and lse the log-sum-exp (natural logarithm) of the joint
softmax; p its probabilities; do the gradient of o; delta = rowsum(do * o); ds the gradient of a scaled score.
"""

from moda.attention import attention, explain
from moda.depth_stream import DepthStream
from moda.lease import slot_memory

__all__ = ["DepthStream", "attention", "explain", "slot_memory"]
