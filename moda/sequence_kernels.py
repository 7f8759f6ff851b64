"""The menu: causal attention over a sequence from vendor kernels, each behind the same small interface.

In: queries [batch, time, query_heads, head_dim], keys and values [batch, key_time, kv_heads, head_dim], bf16 or fp16,
rows of head_dim contiguous and 16-byte aligned. Where time < key_time the queries are the last ones of the row. Out of
a forward: o, contiguous, and lse, fp32 [batch, time, query_heads] as a transposed view of contiguous [batch,
query_heads, time] memory. A backward is given (o, lse) in those layouts, of the sequence alone or joint with anything
else: dq, dk, dv are then the exact gradients of the sequence's part, since kernels use nothing but p = exp(s - lse) and
delta = rowsum(do * o). So any backward may follow any forward.

A kernel says itself which calls it cannot take. Optional packages are imported when a call is first given to them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moda.packages import Package

aten = torch.ops.aten


class Call(NamedTuple):
    """What a choice may depend on: cheap to read, hashable, without the tensors."""

    architecture: int  # compute capability, 90 for 9.0; 0 where there is no NVIDIA GPU
    dtype: torch.dtype
    head_dim: int
    group: int  # query heads a kv head
    time: int  # queries of a row
    key_time: int  # keys of a row
    documents: bool
    deterministic: bool  # torch.use_deterministic_algorithms

    @classmethod
    def of(cls, q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> Call:
        return cls(
            architecture(q.device),
            q.dtype,
            q.shape[3],
            q.shape[2] // k.shape[2],
            q.shape[1],
            k.shape[1],
            cu_seqlens is not None,
            torch.are_deterministic_algorithms_enabled(),
        )


@cache
def architecture(device: torch.device) -> int:
    """Compute capability of a device, major * 10 + minor; 0 for what is not an NVIDIA GPU."""
    if device.type != "cuda" or torch.version.cuda is None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


class SequenceKernel(ABC):
    """Forward and backward of one vendor's attention, and the calls it takes."""

    name = ""
    oldest = 80  # compute capability
    documents = True  # takes cu_seqlens
    fewer_queries = True  # takes queries that are the last ones of a row, exactly
    deterministic = True  # the backward, when that is asked for
    time_multiple = 1

    def unusable(self, call: Call) -> str | None:
        """Why this kernel cannot take a call, None when it can; imports its package, if it has one, last of all."""
        if call.architecture < self.oldest:
            return f"it needs an NVIDIA GPU of compute capability {self.oldest / 10:.1f} or later"
        if call.dtype not in (torch.bfloat16, torch.float16):
            return f"it needs bf16 or fp16, not {call.dtype}"
        if call.head_dim % 8 or not 8 <= call.head_dim <= 128:
            return f"it needs a head_dim that is a multiple of 8 up to 128, not {call.head_dim}"
        if call.time % self.time_multiple:
            return f"it needs a time that is a multiple of {self.time_multiple}, not {call.time}"
        if call.documents and not self.documents:
            return "it has no document masks"
        if call.time != call.key_time and not self.fewer_queries:
            return f"it needs as many queries as keys, not {call.time} and {call.key_time}"
        if call.deterministic and not self.deterministic:
            return "its backward is not deterministic, which is asked for"
        return self.missing()

    def missing(self) -> str | None:
        """Why the software is not there, None when it is."""
        return None

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """o [batch, time, query_heads, head_dim] and lse [batch, time, query_heads]."""

    @abstractmethod
    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        scale: float,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv from do (contiguous) and from o and lse in the layouts of a forward."""


class CuDNN(SequenceKernel):
    """cuDNN by way of PyTorch. A graph is built for each new shape (some 100 ms)."""

    name = "cudnn"
    documents = False
    fewer_queries = False  # its mask is aligned to the first key
    deterministic = False
    time_multiple = 128  # its backward is right for these only (pytorch/pytorch issue 196678)

    def missing(self) -> str | None:
        return _without_cudnn()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        o, lse, *_ = aten._scaled_dot_product_cudnn_attention(*heads_first, None, True, 0.0, True, False, scale=scale)
        return o.transpose(1, 2).contiguous(), lse.view(lse.shape[:3]).transpose(1, 2)

    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        scale: float,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        time = q.shape[1]
        heads_first = [x.transpose(1, 2) for x in (do, q, k, v, o)]
        state = [lse.new_empty(0, dtype=torch.int64)] * 2  # of the dropout's generator: not read without dropout
        dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
            *heads_first,
            lse.transpose(1, 2)[..., None],
            *state,
            None,
            None,
            None,
            time,
            time,
            0.0,
            True,
            scale=scale,
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class Documents(NamedTuple):
    """Document masks as kernels of the FlashAttention family take them."""

    ends: Tensor  # int32, cumulative lengths over the flattened tokens, rows' ends among them
    longest: int  # a bound on the length of a document

    @classmethod
    def of(cls, cu_seqlens: Tensor, batch: int, time: int) -> Documents:
        """No host synchronisation: where a row's end is a document's too, a document of no tokens lies between."""
        ends = cu_seqlens.to(torch.int32)
        if batch > 1:
            rows = torch.arange(0, batch * time + 1, time, dtype=torch.int32, device=ends.device)
            ends = torch.cat((ends, rows)).sort().values
        return cls(ends.contiguous(), time)


class FlashAttention(SequenceKernel):
    """The family's layouts: rows of equal length [batch, time, ...] with lse [batch, query_heads, time], or documents
    [tokens, ...] with lse [query_heads, tokens]."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch, time, query_heads, _ = q.shape
        if cu_seqlens is None:
            o, lse = self._forward(q, k, v, scale, None)
        else:
            documents = Documents.of(cu_seqlens, batch, time)
            o, lse = self._forward(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale, documents)
            o, lse = o.view(q.shape), lse.view(query_heads, batch, time).transpose(0, 1)
        return o.contiguous(), lse.contiguous().transpose(1, 2)

    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        scale: float,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, time, query_heads, _ = q.shape
        lse = lse.transpose(1, 2)
        if cu_seqlens is None:
            return self._backward(do, q, k, v, o, lse, scale, None)
        documents = Documents.of(cu_seqlens, batch, time)
        lse = lse.transpose(0, 1).reshape(query_heads, batch * time)
        dq, dk, dv = self._backward(
            do.flatten(0, 1),
            q.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            o.flatten(0, 1),
            lse,
            scale,
            documents,
        )
        return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)

    @abstractmethod
    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        """`forward`, of rows without documents or of flattened ones with."""

    @abstractmethod
    def _backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        scale: float,
        documents: Documents | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`backward`, likewise."""


class FlashOfPyTorch(FlashAttention):
    """FlashAttention-2 as PyTorch ships it. Its causal mask is aligned to the last key."""

    name = "flash"

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        ends, longest_q, longest_k = _lengths(q, k, documents)
        o, lse, *_ = aten._flash_attention_forward(
            q, k, v, ends, ends, longest_q, longest_k, 0.0, True, False, scale=scale
        )
        return o, lse

    def _backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        scale: float,
        documents: Documents | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ends, longest_q, longest_k = _lengths(q, k, documents)
        state = [lse.new_empty(0, dtype=torch.int64)] * 2  # of the dropout's generator: not read without dropout
        return aten._flash_attention_backward(
            do, q, k, v, o, lse, ends, ends, longest_q, longest_k, 0.0, True, *state, scale=scale
        )


def _lengths(q: Tensor, k: Tensor, documents: Documents | None) -> tuple[Tensor | None, int, int]:
    if documents is None:
        return None, q.shape[1], k.shape[1]
    return documents.ends, documents.longest, documents.longest


class FlashAttention4(FlashAttention):
    """The package flash-attn-4, for Hopper and Blackwell: kernels are built at the first call of a kind (4 to 8 s)."""

    name = "flash_attn_4"
    oldest = 90
    deterministic = False  # as it is called here
    package = Package(
        "flash_attn.cute.interface",
        {
            "_flash_attn_fwd": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k softmax_scale causal"
            " return_lse",
            "_flash_attn_bwd": "q k v out dout lse softmax_scale causal cu_seqlens_q cu_seqlens_k max_seqlen_q"
            " max_seqlen_k",
        },
    )

    def missing(self) -> str | None:
        return self.package.missing()

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        with torch.cuda.device_of(q):
            o, lse, *_ = self.package.call(
                "_flash_attn_fwd",
                q=q,
                k=k,
                v=v,
                softmax_scale=scale,
                causal=True,
                return_lse=True,
                **self._documents(documents),
            )
        return o, lse

    def _backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        scale: float,
        documents: Documents | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.cuda.device_of(q):
            dq, dk, dv, *_ = self.package.call(
                "_flash_attn_bwd",
                q=q,
                k=k,
                v=v,
                out=o,
                dout=do,
                lse=lse,
                softmax_scale=scale,
                causal=True,
                **self._documents(documents),
            )
        return dq, dk, dv

    def _documents(self, documents: Documents | None) -> dict[str, Any]:
        if documents is None:
            return {}
        return {
            "cu_seqlens_q": documents.ends,
            "cu_seqlens_k": documents.ends,
            "max_seqlen_q": documents.longest,
            "max_seqlen_k": documents.longest,
        }


class FlashAttention2(FlashAttention):
    """The package flash-attn, 2.7 or later."""

    name = "flash_attn_2"
    _common = "dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes"
    _varlen = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
    _gradients = "dout q k v out softmax_lse dq dk dv"
    package = Package(
        "flash_attn.flash_attn_interface",
        {
            "_flash_attn_forward": f"q k v {_common} return_softmax",
            "_flash_attn_varlen_forward": f"q k v {_varlen} {_common} return_softmax",
            "_flash_attn_backward": f"{_gradients} {_common} deterministic",
            "_flash_attn_varlen_backward": f"{_gradients} {_varlen} {_common} deterministic",
        },
    )

    def missing(self) -> str | None:
        return self.package.missing()

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        name = "_flash_attn_forward" if documents is None else "_flash_attn_varlen_forward"
        o, lse, *_ = self.package.call(name, q=q, k=k, v=v, return_softmax=False, **self._options(scale, documents))
        return o, lse

    def _backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        scale: float,
        documents: Documents | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        name = "_flash_attn_backward" if documents is None else "_flash_attn_varlen_backward"
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        self.package.call(
            name,
            dout=do,
            q=q,
            k=k,
            v=v,
            out=o,
            softmax_lse=lse,
            dq=dq,
            dk=dk,
            dv=dv,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **self._options(scale, documents),
        )
        return dq, dk, dv

    def _options(self, scale: float, documents: Documents | None) -> dict[str, Any]:
        options: dict[str, Any] = {
            "dropout_p": 0.0,
            "softmax_scale": scale,
            "causal": True,
            "window_size_left": -1,
            "window_size_right": -1,
            "softcap": 0.0,
            "alibi_slopes": None,
        }
        if documents is not None:
            options |= {
                "cu_seqlens_q": documents.ends,
                "cu_seqlens_k": documents.ends,
                "max_seqlen_q": documents.longest,
                "max_seqlen_k": documents.longest,
            }
        return options


@cache
def _without_cudnn() -> str | None:
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if version is None or version < 90501:  # before, a gradient had to have the strides of its output
        return "PyTorch has no cuDNN 9.5.1 or later"
    return None


# In the order in which they are tried where nothing was measured: what comes with PyTorch first.
MENU: dict[str, SequenceKernel] = {
    kernel.name: kernel for kernel in (CuDNN(), FlashOfPyTorch(), FlashAttention2(), FlashAttention4())
}
