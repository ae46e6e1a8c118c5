"""One vLLM engine over the tiny model of a folder: writes each prompt's next tokens and all log-probabilities of each step.

Run by `test_vllm.py`: `vllm_run.py CHECKPOINT OUTPUT TENSOR_PARALLEL_SIZE DTYPE [ADDITIONAL_CONFIG]`, without the last one
with TSA_CONFIG set. On a CPU without vLLM's compilation, which takes a minute there; on a GPU with it, and with CUDA graphs.
"""

import json
import os
import sys
from pathlib import Path

VOCAB = 64
BATCH = 64
CALLS = (
    [([50], 3)],
    [([20], 1), ([24], 4), ([30], 3), ([3], 2)],
    [([64, 34], 3)],
    [([20], 6), ([44, 63, 43], 3)],
)
"""Of each prompt the chunks that it is run in, and how many tokens to generate. Two prompts run at a time, in batches of at
most `BATCH` tokens, so that a prompt or a chunk comes into a batch with another's decode step. A batch takes decode
steps first, and of the next prompt what there is room for. 3 tokens are too few to be sparse."""


def prompts():
    """The token ids of each call's prompts."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return [[torch.randint(1, VOCAB, (sum(chunks),), generator=generator).tolist() for chunks, _ in call] for call in CALLS]


def main(checkpoint, output, tensor_parallel_size, dtype, additional="{}"):
    import torch
    from vllm import LLM, SamplingParams

    engine = LLM(
        checkpoint, dtype=dtype, enforce_eager=not torch.cuda.is_available(), enable_prefix_caching=False,
        skip_tokenizer_init=True, max_model_len=192, max_num_batched_tokens=BATCH, max_num_seqs=2, block_size=32,
        max_logprobs=VOCAB, gpu_memory_utilization=0.5, tensor_parallel_size=int(tensor_parallel_size),
        additional_config=json.loads(additional),
    )  # fmt: skip
    found = []
    for call, ids in zip(CALLS, prompts(), strict=True):
        asked = [
            SamplingParams(max_tokens=steps, temperature=0, logprobs=VOCAB, detokenize=False, ignore_eos=True)
            for _, steps in call
        ]
        outputs = engine.generate([{"prompt_token_ids": each} for each in ids], asked)
        found.append([_plain(each.outputs[0]) for each in outputs])
    Path(output).write_text(json.dumps(found))


def _plain(completion):
    steps = [[step[token].logprob for token in range(VOCAB)] for step in completion.logprobs]
    return {"tokens": list(completion.token_ids), "logprobs": steps}


if __name__ == "__main__":
    # With the scheduler in a process of its own, a batch would hold what requests have arrived by then.
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ENABLE_V1_MULTIPROCESSING="0"
    )  # fmt: skip
    main(*sys.argv[1:])
