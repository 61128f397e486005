"""Causal attention over packed sequences in plain torch, with context parallelism.

A pack has many short sequences or a few long ones; a [T, T] mask would cost T^2 in both cases. Instead the
sequences are grouped into buckets of similar length (within a factor of two). Each bucket is padded to its
longest sequence and runs as one batched `scaled_dot_product_attention`. Indices and masks are computed once
per micro-batch and shared by all layers.

Context parallelism is Megatron's zigzag: each sequence is cut into 2·cp chunks, and rank r holds chunks r and
2·cp-1-r. Keys and values are gathered from all ranks. Each query attends to the keys up to its own position.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All but cuDNN's, which builds a plan for every new shape (tens of milliseconds). Nearly every pack has new
shapes."""


@dataclass(frozen=True)
class AttentionBucket:
    """Some sequences of a pack as a batch of B rows.

    Lq query positions are of this rank, Lk key positions of all ranks.
    """

    size: tuple[int, int, int]
    """B, Lq, Lk."""
    query_tokens: torch.Tensor
    """int64 [tokens]: indices of this bucket's tokens among this rank's tokens, sequence by sequence."""
    query_slots: torch.Tensor
    """int64 [tokens]: index of each in the flattened [B, Lq] batch."""
    key_tokens: torch.Tensor
    """int64 [tokens · cp]: indices of this bucket's keys among the gathered keys (rank by rank), in order of
    position."""
    key_slots: torch.Tensor
    """int64 [tokens · cp]: index of each in the flattened [B, Lk] batch."""
    mask: torch.Tensor | None
    """bool [B, 1, Lq, Lk], true if the query attends to the key; None without context parallelism (plain
    causal)."""


@dataclass(frozen=True)
class AttentionPlan:
    """The buckets of one pack on one rank."""

    buckets: list[AttentionBucket]
    order: torch.Tensor
    """int64 [T]: index of each of this rank's tokens among the buckets' concatenated tokens."""


def attention_plan(
    packed: PackedSeqParams, cp_rank: int, cp_size: int, device: torch.device
) -> AttentionPlan:
    """The plan of a pack.

    Built at the first layer and stored on the `PackedSeqParams`, so both have the same lifetime.

    ValueError unless the pack is THD and each (padded) length is a multiple of 2·cp. Copies `cu_seqlens` to
    the host once per pack.
    """
    plan = getattr(packed, "_attention_plan", None)
    if plan is None:
        if packed.qkv_format != "thd":
            raise ValueError(
                f"attention needs packed sequences (qkv_format 'thd'), not {packed.qkv_format!r}"
            )
        cu_seqlens = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
        lengths = cu_seqlens.diff().cpu()
        if int(lengths.max()) > int(packed.max_seqlen_q):
            raise ValueError(
                f"a packed sequence has {int(lengths.max())} tokens, but max_seqlen_q is "
                f"{packed.max_seqlen_q}"
            )
        plan = build_plan(lengths, cp_rank, cp_size, device)
        packed._attention_plan = plan
    return plan


def build_plan(lengths: torch.Tensor, cp_rank: int, cp_size: int, device: torch.device) -> AttentionPlan:
    """The plan for sequences of the given global padded lengths (int [S], on the host).

    Pure, except for the copy to `device`.
    """
    lengths = lengths.long()
    if cp_size > 1 and (lengths % (2 * cp_size)).any():
        raise ValueError(
            f"packed sequences must be padded to multiples of {2 * cp_size} for {cp_size} "
            "context-parallel ranks"
        )
    local_starts = (lengths.cumsum(0) - lengths) // cp_size
    local_total = int(lengths.sum()) // cp_size
    magnitudes = torch.tensor([int(length).bit_length() for length in lengths])
    buckets = []
    for magnitude in magnitudes.unique().tolist():
        if magnitude == 0:
            continue
        members = (magnitudes == magnitude).nonzero().flatten()
        buckets.append(
            _build_bucket(lengths[members], local_starts[members], local_total, cp_rank, cp_size, device)
        )
    return AttentionPlan(buckets, torch.cat([bucket.query_tokens for bucket in buckets]).argsort())


def _build_bucket(
    lengths: torch.Tensor,
    local_starts: torch.Tensor,
    local_total: int,
    cp_rank: int,
    cp_size: int,
    device: torch.device,
) -> AttentionBucket:
    longest = int(lengths.max())
    batch, width = len(lengths), longest // cp_size
    rows, columns = _ragged(lengths // cp_size)
    query_tokens, query_slots = local_starts[rows] + columns, rows * width + columns
    if cp_size == 1:
        tokens, slots = query_tokens.to(device), query_slots.to(device)
        return AttentionBucket((batch, width, width), tokens, slots, tokens, slots, mask=None)
    key_rows, key_positions = _ragged(lengths)
    owner, offset = zigzag_owner(key_positions, lengths[key_rows], cp_size)
    key_tokens = owner * local_total + local_starts[key_rows] + offset
    # Padding queries keep position 0, so that every row of the mask has at least one key.
    query_positions = torch.zeros(batch * width, dtype=torch.long)
    mine = owner == cp_rank
    query_positions[key_rows[mine] * width + offset[mine]] = key_positions[mine]
    mask = torch.arange(longest, device=device) <= query_positions.view(batch, 1, width, 1).to(device)
    return AttentionBucket(
        (batch, width, longest),
        query_tokens.to(device),
        query_slots.to(device),
        key_tokens.to(device),
        (key_rows * longest + key_positions).to(device),
        mask,
    )


def _ragged(lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, column) of every element of rows with the given lengths, row by row."""
    rows = torch.arange(len(lengths)).repeat_interleave(lengths)
    columns = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths)[rows]
    return rows, columns


def zigzag_owner(
    positions: torch.Tensor, lengths: torch.Tensor, cp_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The context-parallel rank of a position of a sequence, and its offset within that rank's part.

    All int64 [T].
    """
    chunk_length = lengths // (2 * cp_size)
    chunk = positions // chunk_length
    second = chunk >= cp_size
    owner = torch.where(second, 2 * cp_size - 1 - chunk, chunk)
    return owner, positions - chunk * chunk_length + second * chunk_length


class PackedAttention(MegatronModule):
    """Core attention of a Megatron layer: packed (THD) input, grouped-query heads, context parallelism.

    Collectives per layer with context parallelism: one all-gather of keys and values forward and one
    reduce-scatter of their gradient backward, each of 2 · T · query_groups/tp · kv_channels elements per
    rank.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
        self.cp_group = groups.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """query [T, heads, d], key and value [T, groups, d] of this rank -> [T, heads · d]."""
        if packed_seq_params is None or attention_mask is not None or attention_bias is not None:
            raise ValueError(
                "attention needs packed sequences: pass packed_seq_params, and no attention_mask or bias"
            )
        cp_size = self.cp_group.size()
        plan = attention_plan(packed_seq_params, self.cp_group.rank(), cp_size, query.device)
        key_value = torch.cat((key, value), dim=-1)
        if cp_size > 1:
            key_value = gather_from_sequence_parallel_region(key_value, group=self.cp_group)
        return attend(plan, query, key_value, self.softmax_scale).flatten(1)


def attend(plan: AttentionPlan, query: torch.Tensor, key_value: torch.Tensor, scale: float) -> torch.Tensor:
    """query [T, heads, d] of this rank, key_value [T · cp, groups, 2d] in rank order -> [T, heads, d]."""
    attended = [_attend_bucket(bucket, query, key_value, scale) for bucket in plan.buckets]
    return torch.cat(attended).index_select(0, plan.order)


def _attend_bucket(
    bucket: AttentionBucket, query: torch.Tensor, key_value: torch.Tensor, scale: float
) -> torch.Tensor:
    """[tokens, heads, d]: attention of one bucket's queries over its keys."""
    batch, query_width, key_width = bucket.size
    queries = _pad(query.index_select(0, bucket.query_tokens), bucket.query_slots, batch, query_width)
    gathered = key_value.index_select(0, bucket.key_tokens)
    keys, values = _pad(gathered, bucket.key_slots, batch, key_width).chunk(2, dim=-1)
    with sdpa_kernel(BACKENDS):
        attended = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=bucket.mask,
            is_causal=bucket.mask is None,
            scale=scale,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
    return attended.transpose(1, 2).flatten(0, 1).index_select(0, bucket.query_slots)


def _pad(tokens: torch.Tensor, slots: torch.Tensor, batch: int, width: int) -> torch.Tensor:
    """[tokens, n, d] -> [batch, n, width, d], zero in slots without a token."""
    padded = tokens.new_zeros(batch * width, *tokens.shape[1:]).index_copy(0, slots, tokens)
    return padded.view(batch, width, *tokens.shape[1:]).transpose(1, 2)
