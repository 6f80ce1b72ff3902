"""Sampling on the device: one token a row of float32 logits, by parameters that lie on the device too.

| input | shape | |
|---|---|---|
| logits | [R, vocabulary] float32 | vocabulary up to 2^18 |
| temperature | [R] float32 | 0 is greedy |
| top_k | [R] int32 | 0 keeps every token |
| top_p, min_p | [R] float32 | from 0 to 1; 1 and 0 keep every token |
| seed | [R] uint64 | of the request |
| step | [R] int32 | the position in the request that the token will take: no two draws of a seed share one |
| penalty, seen | [R] float32, [R, ceil(vocabulary / 32)] uint32 | optional: repetition penalty of the bits set |

Output: token [R] int32, whose bit is set in `seen`; -1 if the largest logit is not finite, where edge/sampler.py would
raise an error (NaN is never the largest). A token depends on nothing but its own row and parameters, so neither
batching nor a replayed CUDA graph changes it.

After it `advance` makes the next step's inputs of the tokens, without the host: input_ids, positions, switch_length and
step of every row, and a line of `history`, which the host reads every few steps.
"""
