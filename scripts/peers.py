"""Other decoders on the same prompts: transformers, its prompt lookup, and llama.cpp where they are installed.

    peers, absent = find_peers(folder, torch.device("cpu"), torch.bfloat16, n_slot=512, gguf=None)
    answer = peers["transformers"](prompt, 64)

A peer is a function (prompt ids, n) -> `Answer` of exactly n new tokens. It decodes greedily and past stop tokens, so
that it does the work that plain decoding did. The clock runs from its first token to its last, without the prefill.
"""
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.timing import clock
from console import say
from decoder import Generation, Kind


class Answer(NamedTuple):
    tokens: list[int]               # new tokens
    timed_tokens: int               # tokens that decode_seconds covers
    prefill_seconds: float
    decode_seconds: float
    accept_lengths: list[int]       # tokens produced by each target pass; empty where that is not known
    copied: list[int] = []          # drafts of each pass that came from a copied branch
    kinds: list[Kind] = []          # of our own passes
    recorded: Generation | None = None  # of our own, where the steps were recorded


Peer = Callable[[list[int], int], Answer]
DRAFTING_PEERS = {"transformers-lookup"}


def find_peers(folder: Path, device: torch.device, dtype: torch.dtype, n_slot: int,
               gguf: Path | None) -> tuple[dict[str, Peer], list[str]]:
    """The peers that can run, by name and warm, and a line for each that cannot, which is said too."""
    peers, absent = {}, []
    try:
        peers |= transformers_peers(folder, device, dtype, n_slot)
    except ImportError:
        absent.append("transformers is not installed: pip install transformers")
    try:
        if gguf is None:
            absent.append("llama.cpp did not run: it reads a GGUF file, --gguf FILE")
        else:
            peers[f"llama.cpp-{gguf.stem.rsplit('.', 1)[-1]}"] = llama_cpp_peer(gguf, n_slot)
    except ImportError:
        absent.append("llama-cpp-python is not installed: pip install llama-cpp-python")
    for line in absent:
        say(line)
    for peer in peers.values():
        peer([1, 2, 3, 4], 4)   # warm up
    return peers, absent


def transformers_peers(folder: Path, device: torch.device, dtype: torch.dtype, n_slot: int) -> dict[str, Peer]:
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    file = {"gguf_file": "model.gguf"} if (folder / "model.gguf").exists() else {}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **file)
    model.to(device).eval()
    # The checkpoint's own could name penalties, forced tokens, beams or stop tokens, which would make it another task.
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)

    class Watch(transformers.StoppingCriteria):
        """Notes after each pass how many tokens there are, and when."""

        def __init__(self):
            self.seen: list[tuple[int, float]] = []

        def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
            self.seen.append((input_ids.shape[1], clock(device)))
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    class Finite(transformers.LogitsProcessor):
        """Changes nothing; keeps on the device whether all logits were finite."""

        def __init__(self):
            self.holds = torch.ones((), dtype=torch.bool, device=device)

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.holds &= scores.isfinite().all()
            return scores

    def generate(prompt: list[int], n: int, **options) -> Answer:
        ids, watch, finite, start = torch.tensor([prompt], device=device), Watch(), Finite(), clock(device)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, stopping_criteria=[watch],
                                logits_processor=[finite], **options)
        if not finite.holds:
            raise ValueError(f"transformers' logits are not finite in {str(dtype).removeprefix('torch.')}: "
                             "leave --peers out, or try another --dtype")
        lengths = [len(prompt), *(length for length, _ in watch.seen)]
        return Answer(output[0, len(prompt):].tolist(), len(output[0]) - lengths[1], watch.seen[0][1] - start,
                      watch.seen[-1][1] - watch.seen[0][1], [b - a for a, b in zip(lengths, lengths[1:])])

    return {"transformers": lambda prompt, n: generate(prompt, n),
            "transformers-static": lambda prompt, n: generate(prompt, n, cache_implementation="static"),
            "transformers-lookup": lambda prompt, n: generate(prompt, n, prompt_lookup_num_tokens=10)}


def llama_cpp_peer(gguf: Path, n_slot: int) -> Peer:
    import llama_cpp
    llama = llama_cpp.Llama(str(gguf), n_ctx=n_slot, n_threads=torch.get_num_threads(), verbose=False)

    def generate(prompt: list[int], n: int) -> Answer:
        start, tokens, times = time.perf_counter(), [], []
        for token in llama.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
            tokens.append(token)
            times.append(time.perf_counter())
            if len(tokens) == n:
                break
        return Answer(tokens, n - 1, times[0] - start, times[-1] - times[0], [1] * n)

    return generate
