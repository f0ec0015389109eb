"""Generate text: python generate.py --prompt "Why is the sky blue?"

    python generate.py                                                     # the demo model, fetched on first use
    python generate.py --checkpoint lmsys/vicuna-7b-v1.3 --prompt "Hi" "Name three birds."           # a batch of two
    python generate.py --checkpoint FOLDER --prompt-file question.txt --temperature 0.7 --top-p 0.9 --seed 1
    python generate.py --interactive                                       # chat; Ctrl-C ends an answer, Ctrl-D leaves

The answer streams to stdout, everything else goes to stderr. On a GPU each decode step is one captured CUDA graph
over compiled layers; on a CPU it runs eagerly over weights packed for oneDNN, which starts at once.

Shapes: B batch, T new tokens, S cache slots, V vocabulary.
"""
import argparse
import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model import Transformer, causal_mask, logits_to_probs, pack_linears, sample

DEFAULT_PROMPT = "Why is the sky blue?"
PREFILL_CHUNK = 512  # prompt tokens a pass


# Decoding


class Sampling(NamedTuple):
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


@dataclass
class Generation:
    """What `generate` returns. Row i of each list belongs to prompt i."""
    tokens: list[list[int]]             # new tokens only, the stop token among them
    accept_lengths: list[list[int]]     # tokens produced by each decode step of a row, before a stop cut any
    finish_reason: list[str]            # "stop" or "length"
    target_passes: int = 0              # decode steps
    timings: dict[str, float] = field(default_factory=dict)  # compile_seconds, prefill_seconds, decode_seconds

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows over decode seconds: warm, prefill and compilation outside."""
        return sum(map(len, self.tokens)) / self.timings["decode_seconds"]

    @property
    def mean_accept_length(self) -> float:
        """Tokens per target pass, bonus token included, as totals over totals."""
        lengths = [n for row in self.accept_lengths for n in row]
        return sum(lengths) / len(lengths)


def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, seed: int | None = None,
             stop_ids: Iterable[int] = (), compile: bool = False, max_seq_length: int | None = None,
             on_tokens: Callable[[int, list[int]], None] | None = None) -> Generation:
    """Continue a batch of prompts, given as token ids, by at most max_new_tokens each.

    Every row gets what it would get alone (in fp32, at temperature 0). `on_tokens(row, ids)` is called with new tokens
    as they come. Raises ValueError for an empty prompt or one that leaves no room in the context.
    To answer many prompts, make one Decoder and call its `generate`: what is compiled is then kept.
    """
    check_prompts(prompts, max_seq_length or model.config.block_size)
    if max_seq_length is None:
        max_seq_length = min(model.config.block_size, max(map(len, prompts)) + max_new_tokens)
    if model.kv_cache is None or model.kv_cache.shape[2] < len(prompts) or model.kv_cache.shape[4] < max_seq_length:
        model.setup_caches(len(prompts), max_seq_length)
    decoder = Decoder(model, len(prompts), Sampling(temperature, top_k, top_p), compile=compile)
    return decoder.generate(prompts, max_new_tokens, seed=seed, stop_ids=stop_ids, on_tokens=on_tokens)


def check_prompts(prompts: list[list[int]], n_slot: int) -> None:
    for prompt in prompts:
        if not prompt:
            raise ValueError("the prompt is empty")
        if len(prompt) >= n_slot:
            raise ValueError(f"the prompt has {len(prompt)} tokens, which leaves no room in a context of {n_slot}")


class Decoder:
    """Plain decoding over static tensors: the ground that EAGLE's step stands on.

    A step reads `tokens` [B, 1], the last token of each row, and `pos` [B, 1], its position; it writes the next ones
    into the same memory, so that a captured graph can be replayed as it is, and what it produced into `produced`.
    """

    def __init__(self, model: Transformer, batch_size: int, sampling: Sampling = Sampling(), *, compile: bool = False):
        device = model.inv_freq.device
        self.model, self.sampling, self.compile = model, sampling, compile
        self.tokens = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.pos = torch.zeros_like(self.tokens)
        self.produced = torch.zeros_like(self.tokens)  # [B, tokens a step can produce], -1 where it produced fewer
        self.generator = torch.Generator(device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if compile:
            compile_layers(model)

    @property
    def n_slot(self) -> int:
        return self.model.kv_cache.shape[4]

    def step(self, n_slot: int) -> None:
        """One pass of the target over one token a row, looking at the first n_slot cache slots."""
        mask = causal_mask(self.pos, n_slot)
        logits, _ = self.model(self.tokens, self.pos, mask=mask)
        self.tokens.copy_(next_tokens(logits, self.sampling, self.generator))
        self.produced.copy_(self.tokens)
        self.pos.add_(1).clamp_(max=self.n_slot - 1)  # a finished row may idle at the end of its cache

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, *, seed: int | None = None,
                 stop_ids: Iterable[int] = (), on_tokens: Callable[[int, list[int]], None] | None = None,
                 n_cached: int = 0) -> Generation:
        """As the function `generate`. The first n_cached tokens of every prompt are in the cache already."""
        check_prompts(prompts, self.n_slot)
        stop_ids = frozenset(stop_ids)
        limits = [min(max_new_tokens, self.n_slot - len(prompt)) for prompt in prompts]
        result = Generation([[] for _ in prompts], [[] for _ in prompts], ["length"] * len(prompts))

        start = time.perf_counter()
        self.prefill(prompts, n_cached)
        prefilled = self._clock()
        self.warm_up(max(map(len, prompts)), max_new_tokens)
        self.generator.manual_seed(torch.seed() if seed is None else seed)
        warm = self._clock()

        running = {row for row, limit in enumerate(limits) if limit > 0}
        while running:
            longest = max(len(prompts[row]) + len(result.tokens[row]) for row in running)
            self.run(bucket(longest, self.n_slot))
            result.target_passes += 1
            for row, ids in enumerate(self.produced.tolist()):  # sync: the step's one, to stream and to stop
                if row not in running:
                    continue
                ids = [i for i in ids if i >= 0]
                result.accept_lengths[row].append(len(ids))
                kept = ids[:limits[row] - len(result.tokens[row])]
                stop = next((n for n, i in enumerate(kept) if i in stop_ids), None)
                if stop is not None:
                    kept, result.finish_reason[row] = kept[:stop + 1], "stop"
                result.tokens[row] += kept
                if stop is not None or len(result.tokens[row]) == limits[row]:
                    running.discard(row)
                if on_tokens is not None:
                    on_tokens(row, kept)
        result.timings = {"prefill_seconds": prefilled - start, "compile_seconds": warm - prefilled,
                          "decode_seconds": self._clock() - warm}
        return result

    def prefill(self, prompts: list[list[int]], n_cached: int) -> None:
        """Fill the cache with all but the last token of each prompt, which is the first step's input.

        Rows are padded on the right. What padding leaves in the cache lies past the row's end: no token sees it
        before the row has grown over it.
        """
        device = self.tokens.device
        length = max(map(len, prompts)) - 1
        padded = torch.tensor([prompt[:-1] + [0] * (length + 1 - len(prompt)) for prompt in prompts], device=device)
        for begin in range(n_cached, length, PREFILL_CHUNK):
            pos = torch.arange(begin, min(begin + PREFILL_CHUNK, length), device=device).expand(len(prompts), -1)
            mask = causal_mask(pos, bucket(begin + pos.shape[1], self.n_slot))
            self.model.features(padded[:, begin:begin + PREFILL_CHUNK], pos, mask=mask)
        self.tokens.copy_(torch.tensor([[prompt[-1]] for prompt in prompts]))
        self.pos.copy_(torch.tensor([[len(prompt) - 1] for prompt in prompts]))

    def warm_up(self, length: int, max_new_tokens: int) -> None:
        """Compile and capture what the coming steps need, and leave no trace: their slots will be written again."""
        last = bucket(min(length + max_new_tokens, self.n_slot), self.n_slot)
        n_slot = bucket(length, self.n_slot)
        while True:
            if n_slot not in self.graphs:
                state = self.tokens.clone(), self.pos.clone()
                self._capture(n_slot)
                self.tokens.copy_(state[0]), self.pos.copy_(state[1])
            if n_slot >= last or not self.compile:
                return
            n_slot = bucket(n_slot + 1, self.n_slot)

    def _capture(self, n_slot: int) -> None:
        if not (self.compile and self.tokens.is_cuda):
            self.step(n_slot)
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles, then lets cuBLAS and SDPA choose their kernels
                self.step(n_slot)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        with torch.cuda.graph(graph, pool=pool):
            self.step(n_slot)
        self.graphs[n_slot] = graph

    def run(self, n_slot: int) -> None:
        """One step: replayed where it was captured, else called."""
        if n_slot in self.graphs:
            self.graphs[n_slot].replay()
        else:
            self.step(n_slot)

    def _clock(self) -> float:
        if self.tokens.is_cuda:
            torch.cuda.synchronize()  # sync: between phases, to time them
        return time.perf_counter()


def next_tokens(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """[..., V] -> [...]: the largest logit at temperature 0, else a draw."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return sample(logits_to_probs(logits, *sampling), generator)


def bucket(length: int, n_slot: int) -> int:
    """Cache slots to look at for `length` used ones: 128, 192, 256, 384, 512, 768, ... up to n_slot.

    Few enough for one captured graph each, near enough that attention follows the used length.
    """
    size = 128
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return min(size, n_slot)


def compile_layers(model: Transformer) -> None:
    """Compile one layer; all share its code. Cold it takes seconds, where the whole graph takes a minute."""
    on_gpu = model.inv_freq.is_cuda
    for layer in model.layers:
        # Coordinate descent lets inductor write one-row products as fused reductions, which reach full bandwidth.
        layer.compile(dynamic=False, options={"coordinate_descent_tuning": True} if on_gpu else None)


# Command line


def main(args: argparse.Namespace) -> int:
    """Exit status: 0; 2 with one line for what the user can mend; 130 on Ctrl-C."""
    try:
        check_outputs(args)
        model, tokenizer, report = load(args)
        chat(args, model, tokenizer) if args.interactive else answer(args, model, tokenizer, report)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        say(f"error: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        say("")
        return 130
    return 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse at the start what would fail after the work is done."""
    for name, file in (("--json", args.json), ("--profile", args.profile)):
        if file is not None and args.interactive:
            raise ValueError(f"{name} does not go with --interactive")
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise ValueError(f"{name} {file}: not a file in an existing folder")
    if args.interactive and (args.prompt or args.prompt_file or args.raw):
        raise ValueError("--interactive reads chat turns from the terminal: no --prompt, --prompt-file or --raw")


def load(args: argparse.Namespace) -> tuple[Transformer, "Tokenizer", dict]:
    """Model, tokenizer, and the first fields of the JSON report."""
    from tokenizer import Tokenizer
    start = time.perf_counter()
    device = pick_device(args.device)
    if args.checkpoint is None:
        from scripts.download import download_demo
        args.checkpoint = str(download_demo(log=say))
    tokenizer = Tokenizer.from_pretrained(args.checkpoint, chat_template=args.chat_template)
    model = Transformer.from_pretrained(args.checkpoint, device, getattr(torch, args.dtype))
    args.compile = model.inv_freq.is_cuda if args.compile is None else args.compile
    if not args.compile:  # the compiler brings kernels of its own
        pack_linears(model)
    seconds = time.perf_counter() - start
    say(f"loaded {args.checkpoint} in {seconds:.1f} s ({device}, {args.dtype})")
    return model, tokenizer, {
        "checkpoint": args.checkpoint, "eagle": None, "device": str(device), "device_name": device_name(device),
        "dtype": args.dtype, "torch": torch.__version__, "compiled": args.compile, "tree": None,
        "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed,
        "load_seconds": seconds,
    }


def pick_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def answer(args: argparse.Namespace, model: Transformer, tokenizer: "Tokenizer", report: dict) -> None:
    """Answer the prompts of the command line, all in one batch."""
    prompts = [encode(text, tokenizer, args.raw) for text in read_prompts(args)]
    n_slot = args.max_seq_length or min(model.config.block_size, max(map(len, prompts)) + args.max_new_tokens)
    check_prompts(prompts, n_slot)
    model.setup_caches(len(prompts), n_slot)
    decoder = Decoder(model, len(prompts), Sampling(args.temperature, args.top_k, args.top_p), compile=args.compile)

    printer = Printer(tokenizer, len(prompts))
    with profiler(args.profile):
        result = decoder.generate(prompts, args.max_new_tokens, seed=args.seed, stop_ids=tokenizer.stop_ids,
                                  on_tokens=printer)
    printer.close()

    times, n_new = result.timings, sum(map(len, result.tokens))
    say(f"{n_new} tokens in {times['decode_seconds']:.2f} s: {result.tokens_per_second:.1f} tokens/s "
        f"(prompt {sum(map(len, prompts))} tokens in {times['prefill_seconds']:.2f} s, "
        f"warm-up {times['compile_seconds']:.2f} s)")
    if args.json:
        write_atomically(args.json, json.dumps(report | {
            "prompt_tokens": [len(prompt) for prompt in prompts], "new_tokens": [len(ids) for ids in result.tokens],
            "tokens": result.tokens, "text": [tokenizer.decode(ids) for ids in result.tokens],
            "finish_reason": result.finish_reason, "target_passes": result.target_passes,
            "accept_lengths": result.accept_lengths, "mean_accept_length": result.mean_accept_length,
            **times, "tokens_per_second": result.tokens_per_second, "peak_memory_bytes": peak_memory(model),
        }, indent=1) + "\n")


def read_prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt and args.prompt_file:
        raise ValueError("give --prompt or --prompt-file, not both")
    texts = args.prompt or [DEFAULT_PROMPT]
    if args.prompt_file:
        try:
            texts = [args.prompt_file.read_text(encoding="utf-8").rstrip("\n")]
        except UnicodeDecodeError as error:
            raise ValueError(f"{args.prompt_file} is not UTF-8 text: byte {error.start} does not fit") from None
    for text in texts:
        if not text.strip():
            raise ValueError("the prompt is empty")
    return texts


def encode(text: str, tokenizer: "Tokenizer", raw: bool) -> list[int]:
    if raw:
        return tokenizer.encode(text, bos=tokenizer.adds_bos)
    return tokenizer.apply_chat_template([{"role": "user", "content": text}])


class Printer:
    """Streams one answer as it comes; of several, each is printed whole once all are there."""

    def __init__(self, tokenizer: "Tokenizer", n_rows: int):
        self.streams = [tokenizer.stream() for _ in range(n_rows)]
        self.texts = [""] * n_rows

    def __call__(self, row: int, ids: list[int]) -> None:
        self._put(row, self.streams[row].push(ids))

    def close(self) -> None:
        for row, stream in enumerate(self.streams):
            self._put(row, stream.flush())
        if len(self.texts) == 1:
            print(flush=True)
        else:
            for row, text in enumerate(self.texts):
                print(f"[{row + 1}] {text}", flush=True)

    def _put(self, row: int, text: str) -> None:
        self.texts[row] += text
        if len(self.texts) == 1:
            print(text, end="", flush=True)


def chat(args: argparse.Namespace, model: Transformer, tokenizer: "Tokenizer") -> None:
    """Chat on the terminal. The cache is kept between turns: only what is new in the conversation is prefilled."""
    n_slot = args.max_seq_length or min(model.config.block_size, model.config.sliding_window or 1 << 30, 8192)
    model.setup_caches(1, n_slot)
    decoder = Decoder(model, 1, Sampling(args.temperature, args.top_k, args.top_p), compile=args.compile)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing in input())
    say("Ctrl-C ends an answer, Ctrl-D leaves.")
    messages, cached = [], []
    while True:
        try:
            print("> ", end="", file=sys.stderr, flush=True)
            text = input()
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("\nCtrl-D leaves.")
            continue
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.apply_chat_template(messages)
        if len(prompt) >= n_slot:
            say(f"The conversation has filled its {n_slot} tokens; this begins a new one.")
            messages = messages[-1:]
            prompt = tokenizer.apply_chat_template(messages)
            if len(prompt) >= n_slot:
                say(f"This message alone has {len(prompt)} tokens: too long.")
                messages = []
                continue
        n_cached = common_prefix(prompt[:-1], cached)
        cached, new_ids, printer = prompt[:n_cached], [], Printer(tokenizer, 1)

        def on_tokens(row: int, ids: list[int]) -> None:
            new_ids.extend(ids)
            printer(row, ids)

        try:
            decoder.generate([prompt], args.max_new_tokens, seed=args.seed, stop_ids=tokenizer.stop_ids,
                             on_tokens=on_tokens, n_cached=n_cached)
        except KeyboardInterrupt:
            pass  # what was said so far stays part of the conversation
        printer.close()
        if new_ids:  # else interrupted in the prefill: of the cache only the old part is known to be written
            cached = prompt + new_ids[:-1]  # the last token was produced, but has not been an input
        messages.append({"role": "assistant", "content": tokenizer.decode(new_ids)})


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


@contextlib.contextmanager
def profiler(file: Path | None):
    """A torch profiler trace of what runs inside, for chrome://tracing or Perfetto."""
    if file is None:
        yield
        return
    with torch.profiler.profile() as profile:
        yield
    part = file.with_name(file.name + ".part.json")
    profile.export_chrome_trace(str(part))
    part.replace(file)
    say(f"wrote {file}")


def write_atomically(file: Path, text: str) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def peak_memory(model: Transformer) -> int:
    """Bytes: the GPU allocator's peak, or the process's peak resident memory on a CPU."""
    if model.inv_freq.is_cuda:
        return torch.cuda.max_memory_allocated()
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        say(f"error: {message}")
        sys.exit(2)


def number(kind: type, low: float, high: float = float("inf"), open_low: bool = False) -> Callable[[str], float]:
    """An argparse type that names the range it accepts."""
    def parse(text: str):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if (low < value if open_low else low <= value) and value <= high:
                return value
        above = f"above {low}" if open_low else f"of {low} or more"
        raise argparse.ArgumentTypeError(f"{text!r} is not a number {above}"
                                         + ("" if high == float("inf") else f", up to {high}"))
    return parse


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Generate text with a LLaMA, Vicuna, Mistral, Mixtral or Qwen checkpoint.")
    parser.add_argument("--checkpoint", help="Hugging Face folder or hub id (default: the demo model)")
    parser.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help="several make a batch")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="a text file that is one prompt")
    parser.add_argument("--interactive", action="store_true", help="chat on the terminal")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is: no chat template")
    parser.add_argument("--chat-template", help="vicuna, llama2, mixtral or a jinja file, instead of the checkpoint's")
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=256, metavar="N")
    parser.add_argument("--temperature", type=number(float, 0), default=0.0, metavar="X", help="0 is greedy")
    parser.add_argument("--top-k", type=number(int, 1), metavar="N")
    parser.add_argument("--top-p", type=number(float, 0, 1, open_low=True), metavar="X")
    parser.add_argument("--seed", type=number(int, 0), metavar="N", help="same seed, same text (default: a new one)")
    parser.add_argument("--max-seq-length", type=number(int, 2), metavar="N", help="cache slots a sequence")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what happened as one JSON object")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write a torch profiler trace")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
