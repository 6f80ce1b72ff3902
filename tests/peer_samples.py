"""Results of other engines' benchmarks, as their tools write them."""

from __future__ import annotations

import json

# llama.cpp, tools/llama-bench/README.md at 08d0baac, sections Markdown, "Different prefilled context", CSV and JSON.
LLAMA_MD = """\
| model                          |       size |     params | backend    | ngl | test       |              t/s |
| ------------------------------ | ---------: | ---------: | ---------- | --: | ---------- | ---------------: |
| llama 7B mostly Q4_0           |   3.56 GiB |     6.74 B | CUDA       |  -1 | pp 512     |  2368.80 ± 93.24 |
| llama 7B mostly Q4_0           |   3.56 GiB |     6.74 B | CUDA       |  -1 | tg 128     |    131.42 ± 0.59 |

build: 3469684 (1275)
"""
LLAMA_DEPTH_MD = """\
ggml_cuda_init: found 1 CUDA devices:
| model                          |       size |     params | backend    | ngl |            test |                  t/s |
| ------------------------------ | ---------: | ---------: | ---------- | --: | --------------: | -------------------: |
| qwen2 7B Q4_K - Medium         |   4.36 GiB |     7.62 B | CUDA       |  -1 |           pp512 |      7340.20 ± 23.45 |
| qwen2 7B Q4_K - Medium         |   4.36 GiB |     7.62 B | CUDA       |  -1 |           tg128 |        120.60 ± 0.59 |
| qwen2 7B Q4_K - Medium         |   4.36 GiB |     7.62 B | CUDA       |  -1 |    pp512 @ d512 |      6425.91 ± 18.88 |
| qwen2 7B Q4_K - Medium         |   4.36 GiB |     7.62 B | CUDA       |  -1 |    tg128 @ d512 |        116.71 ± 0.60 |
"""
LLAMA_THREADS_MD = """\
| model                          |       size |     params | backend    |    threads | test       |              t/s |
| ------------------------------ | ---------: | ---------: | ---------- | ---------: | ---------- | ---------------: |
| llama 7B mostly Q4_0           |   3.56 GiB |     6.74 B | CPU        |          1 | pp 64      |      6.17 ± 0.07 |
| llama 7B mostly Q4_0           |   3.56 GiB |     6.74 B | CPU        |          1 | tg 16      |      4.05 ± 0.02 |
| llama 7B mostly Q4_0           |   3.56 GiB |     6.74 B | CPU        |          8 | pp 64      |     32.29 ± 1.21 |
| llama 7B mostly Q4_0           |   3.56 GiB |     6.74 B | CPU        |          8 | tg 16      |     16.71 ± 0.66 |
"""
LLAMA_CSV_AS_PRINTED = """\
build_commit,build_number,cpu_info,gpu_info,backends,model_filename,model_type,model_size,model_n_params,n_batch,\
n_ubatch,n_threads,cpu_mask,cpu_strict,poll,type_k,type_v,n_gpu_layers,n_cpu_moe,split_mode,main_gpu,no_kv_offload,\
flash_attn,devices,tensor_split,tensor_buft_overrides,use_mmap,use_direct_io,embeddings,no_op_offload,no_host,repack,\
fit_target,fit_min_ctx,n_prompt,n_gen,n_depth,test_time,avg_ns,stddev_ns,avg_ts,stddev_ts
"8cf427ff","5163","AMD Ryzen 7 7800X3D 8-Core Processor","NVIDIA GeForce RTX 4080","CUDA",\
"models/Qwen2.5-7B-Instruct-Q4_K_M.gguf","qwen2 7B Q4_K - Medium","4677120000","7615616512","2048","512","8","0x0","0",\
"50","f16","f16","-1","0","layer","0","0","-1","auto","0.00","none","1","0","0","0","0","0","0","512","0","0",\
"2025-04-24T11:57:09Z","70285660","982040","7285.676949","100.064434"
"8cf427ff","5163","AMD Ryzen 7 7800X3D 8-Core Processor","NVIDIA GeForce RTX 4080","CUDA",\
"models/Qwen2.5-7B-Instruct-Q4_K_M.gguf","qwen2 7B Q4_K - Medium","4677120000","7615616512","2048","512","8","0x0","0",\
"50","f16","f16","-1","0","layer","0","0","-1","auto","0.00","none","1","0","0","0","0","0","0","0","128","0",\
"2025-04-24T11:57:10Z","1067431600","3834831","119.915244","0.430617"
"""
# Its rows lack a field of its heading, so it is refused as printed; here it is whole.
LLAMA_CSV = LLAMA_CSV_AS_PRINTED.replace('"none","1",', '"none","1","0",')
_COMMON = {
    "build_commit": "8cf427ff",
    "build_number": 5163,
    "cpu_info": "AMD Ryzen 7 7800X3D 8-Core Processor",
    "gpu_info": "NVIDIA GeForce RTX 4080",
    "backends": "CUDA",
    "model_filename": "models/Qwen2.5-7B-Instruct-Q4_K_M.gguf",
    "model_type": "qwen2 7B Q4_K - Medium",
    "model_size": 4677120000,
    "model_n_params": 7615616512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_threads": 8,
    "flash_attn": -1,
    "use_mmap": True,
}
LLAMA_TESTS = [
    _COMMON
    | {"n_prompt": 512, "n_gen": 0, "n_depth": 0, "test_time": "2025-04-24T11:58:50Z", "avg_ns": 72135640}
    | {"stddev_ns": 1453752, "avg_ts": 7100.002165, "stddev_ts": 140.341520}
    | {"samples_ts": [6863.1, 7147.55, 7136.37, 7115.79, 7237.21]},
    _COMMON
    | {"n_prompt": 0, "n_gen": 128, "n_depth": 0, "test_time": "2025-04-24T11:58:51Z", "avg_ns": 1076767880}
    | {"stddev_ns": 9449585, "avg_ts": 118.881588, "stddev_ts": 1.041811}
    | {"samples_ts": [119.03, 120.178, 119.43, 118.307, 117.464]},
]
LLAMA_JSON = json.dumps(LLAMA_TESTS, indent=2)
LLAMA_JSONL = "".join(json.dumps(test) + "\n" for test in LLAMA_TESTS)

# OpenBMB/CPM.cu, README.md at fe5ea38e, "Quick Start".
CPM_STREAM = """\
Generated text (streaming output):
--------------------------------------------------
Prefilling: 100.0% (106850/106850 tokens) @ 6565.3 tokens/s - Complete!

<Generated Output HERE>
==================================================
Stream Generation Summary:
==================================================
Prefill length: 106850
Prefill time: 16.36 s
Prefill tokens/s: 6530.77
Mean accept length: 2.50
Decode length: 118
Decode time: 0.76 s
Decode tokens/s: 154.59
"""
# The same figures as cpmcu/common/display.py (jk3456a/CPM.cu at 1968d292) prints them with --plain-output.
CPM_PLAIN = """\
--- System Information ---
GPU: NVIDIA GeForce RTX 4090 (23GB)

--- Performance Summary ---
Prefill Length: 106850 tokens
Prefill Time: 16.36 s
Prefill Speed: 6530.8 tokens/s
Mean Accept Length: 2.50 tokens
Decode Length: 118 tokens
Decode Time: 0.76 s
Decode Speed: 154.6 tokens/s
"""
# And in rich's frame, with its colours.
CPM_FRAME = """\
\x1b[32m╭─\x1b[0m\x1b[32m──────────────────\x1b[0m \x1b[1;32mPerformance Summary\x1b[0m \x1b[32m───────────────────\x1b[0m\x1b[32m─╮\x1b[0m
\x1b[32m│\x1b[0m \x1b[1;37m \x1b[0m\x1b[1;37mPrefill Length:    \x1b[0m\x1b[1;37m \x1b[0m\x1b[32m \x1b[0m\x1b[32m106850\x1b[0m\x1b[32m \x1b[0m\x1b[2;37m \x1b[0m\x1b[2;37mtokens  \x1b[0m \x1b[32m│\x1b[0m
\x1b[32m│\x1b[0m \x1b[1;37m \x1b[0m\x1b[1;37mPrefill Speed:     \x1b[0m\x1b[1;37m \x1b[0m\x1b[32m \x1b[0m\x1b[32m6530.8\x1b[0m\x1b[32m \x1b[0m\x1b[2;37m \x1b[0m\x1b[2;37mtokens/s\x1b[0m \x1b[32m│\x1b[0m
\x1b[32m│\x1b[0m \x1b[1;37m \x1b[0m\x1b[1;37mDecode Speed:      \x1b[0m\x1b[1;37m \x1b[0m\x1b[32m \x1b[0m\x1b[32m 154.6\x1b[0m\x1b[32m \x1b[0m\x1b[2;37m \x1b[0m\x1b[2;37mtokens/s\x1b[0m \x1b[32m│\x1b[0m
"""  # noqa: E501

# NVIDIA publishes no results of these: written as examples/utils/benchLogger.cpp and profileFormatter.cpp write them.
EDGE_PREFILL_CSV = """\
mode,batch_size,osl,e2e_time_ms,per_token_ms,throughput_tps,input_len
prefill,2,1,108.3600,0.0529,18900.0000,2048
"""
EDGE_DECODE_CSV = """\
mode,batch_size,osl,e2e_time_ms,per_token_ms,throughput_tps,past_kv_len
decode,2,1,27.4000,27.4000,36.4964,2048
"""
EDGE_VERIFY_CSV = """\
mode,batch_size,osl,e2e_time_ms,per_token_ms,throughput_tps,verify_tree_size,past_kv_len
eagle_verify,1,1,30.0000,30.0000,33.3333,60,2048
"""
EDGE_LOG = """\
[INFO] === Results Summary ===
[INFO] Mode: prefill
[INFO] Batch Size: 1
[INFO] Iterations: 10
[INFO]
[INFO] E2E Time (actual performance): 108.3600 ms
[INFO] InputLen: 2048, ReuseKVLen: 0, ContextLen: 2048
[INFO] Tokens/sec (E2E): 18900.0
[INFO] === Results Summary ===
[INFO] Mode: prefill
[INFO] Batch Size: 1
[INFO] Iterations: 10
[INFO]
[INFO] E2E Time (actual performance): 50.0000 ms
[INFO] InputLen: 1024, ReuseKVLen: 1024, ContextLen: 2048
[INFO] Tokens/sec (E2E): 20480.0
[INFO] === Results Summary ===
[INFO] Mode: decode
[INFO] Batch Size: 1
[INFO] Iterations: 10
[INFO]
[INFO] E2E Time (actual performance): 27.4000 ms
[INFO] PastKVLen: 2048, OSL: 1
[INFO] Tokens/sec (E2E): 36.5
"""
EDGE_PROFILE = {
    "prefill": {
        "total_runs": 4,
        "reused_tokens": 64,
        "computed_tokens": 256,
        "average_tokens_per_run": 80.0,
        "average_time_per_run_ms": 50.0,
        "tokens_per_second": 1600.0,
        "average_time_per_token_ms": 0.625,
    },
    "generation": {
        "total_runs": 4,
        "generated_tokens": 400,
        "average_tokens_per_run": 100.0,
        "tokens_per_second": 32.2,
        "average_time_per_token_ms": 31.06,
    },
    "stages": [{"stage_id": "llm_prefill", "total_runs": 4, "total_gpu_time_ms": 200.0}],
    "peak_unified_memory_bytes": 7548698624,
}
EDGE_EAGLE = {
    **{key: EDGE_PROFILE[key] for key in ("prefill", "stages")},
    "eagle_generation": {
        "total_runs": 4,
        "total_iterations": 95,
        "total_generated_tokens": 401,
        "average_acceptance_rate": 4.22,
        "overall_tokens_per_second_excluding_base_prefill": 59.3,
    },
}
