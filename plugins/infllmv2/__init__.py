"""`edge.InfLLMv2Attention`: InfLLM-V2's trainable block-sparse attention over a ragged batch (spec: infllmv2.md 3, 8).

Inputs, for T new tokens of B sequences, in the order of the operator:

| input | shape | |
|---|---|---|
| qkv | [T, (Hq + 2 Hkv) d] | before rotation |
| cos, sin | [T, d/2] float32 | |
| kv_pool | [pages, planes, Hkv, 64, d] | rotated keys, values; with use_nope also the keys before rotation |
| kv_scales | [pages, planes, Hkv, 64] float32 | only of `edge.InfLLMv2AttentionInt8`, whose kv_pool holds int8 codes: |
| | | a value is code x scale, and the largest magnitude of a token's key or value is code 127 or -127 |
| c1_pool | [pages, Hkv, 4, d] | keys averaged over 32 tokens, every 16; same type as kv_pool; 16 bits beside int8 |
| c2_pool | [pages, Hkv, 1, d] | keys averaged over 128 tokens, every 64 |
| positions | [T] int32 | for the choice of blocks: positions[t] / 64 is a row's own |
| slots | [T] int32 | consecutive in each sequence; what the cache held from there on is overwritten |
| query_start | [B + 1] int32 | |
| page_table | [B, P] int32 | |
| tree_start, tree_mask | [B], [T, 2] int32 | which slots a row sees: plugins/paged_attention/__init__.py |
| switch_length | [B] int32 | the length that decides dense or sparse: the whole prompt's, then the context's |
| sparse_settings | [4] int32 | dense_len (negative: always sparse), init, local and selected blocks |

Rows of a tree attend to every block from tree_start / 64 to slots[t] / 64, chosen or not; these are not counted as
selected. Blocks are chosen for them, up to their own, by the windows that end before both their position + 1 and the
tree's start: a tree's keys are averaged when they are kept (`keep_tokens` of meaning.py).

The attribute `max_blocks` is the most blocks that a row may select: kernels' lists are as long.

Outputs: output [T, Hq d], and the pools after the step (executors bind the same memory). The order of values inside a
page of kv_pool is the table's for the ONNX function; kernels have their own (tile.h and append.cu of
plugins/paged_attention), and some keep a code plus 128 as a byte: what wrote a pool is all that ever reads it.

A window's average is stored with the window's *last* token: window j of stride 16 (tokens 16j .. 16j+31) is slot
(j + 1) % 4 of the sequence's page (j + 1) // 4, window j of stride 64 (tokens 64j .. 64j+127) is on page j + 1. So a
page's compressed keys depend on that page and earlier ones only: truncating, sharing or evicting pages needs no
repair, and block b pools the five slots from its page's first to the next page's first. A step rewrites the windows
whose last token it appends before the tree's start.
"""

WINDOW = 32  # tokens averaged into one fine key (kernel_size); a coarse key averages four times as many
STRIDE = 16  # tokens between fine windows (kernel_stride); coarse ones are four times as far apart
