"""`edge.PagedAttention`: rotate q and k, append k and v to their pages, attend causally over a ragged batch.

Inputs, for T new tokens of B sequences, in the order of the operator (those of `edge.InfLLMv2Attention` are these and
more: plugins/infllmv2/__init__.py):

| input | shape | |
|---|---|---|
| qkv | [T, (Hq + 2 Hkv) d] | before rotation |
| cos, sin | [T, d/2] float32 | |
| kv_pool | [pages, 2, Hkv, 64, d] | rotated keys, values |
| kv_scales | [pages, 2, Hkv, 64] float32 | only of `edge.PagedAttentionInt8`, whose kv_pool holds int8 codes |
| positions | [T] int32 | of the tokens; siblings in a tree share one |
| slots | [T] int32 | where in its sequence's pages a token is kept; consecutive in each sequence. What the cache |
| | | held from there on is overwritten |
| query_start | [B + 1] int32 | |
| page_table | [B, P] int32 | |
| tree_start | [B] int32 | the slot at which the sequence's tree begins; NO_TREE where it has none |
| tree_mask | [T, 2] int32 | 64 bits, the low word first |

Row t of sequence b sees slot j of that sequence if j <= slots[t] and, from the tree's start on, bit j - tree_start[b]
of its mask is set; slots 64 or more after the start have no bit and are not seen. A row's own bit is always set. Rows
before the tree have slots[t] = positions[t]; the last of them is the tree's root. Bits may name slots that an earlier
step filled: a draft's tree grows level by level.

The attribute `window`, 0 or a number of blocks of 64, hides the slots of blocks up to positions[t] / 64 - window.

Outputs: output [T, Hq d], and the pools after the step.
"""

NO_TREE = 2147483647  # the start of a tree that is not there
