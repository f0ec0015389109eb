"""The features that a head learns from: the frozen target run over dialogues, or read from a cache on disk.

    model = load_target(folder, device, torch.bfloat16)
    batch = Features(model, dialogues).batch([3, 1, 4])                 # the target runs at each call
    write_features(model, dialogues, cache, n_token=8192, origin={})    # or once: what the cache has is not made again
    batch = Features(model, dialogues, cache).batch([3, 1, 4])
    batch = Features(model, dialogues, capture=(2, 15, 27)).batch([3])  # hidden states, for EAGLE-3

A cache is a folder of safetensors shards, each with the features of SHARD dialogues under their numbers, and of
features.json, which says what the features come from. A cache of something else is refused.

Shapes: B dialogues, T tokens, n captured hidden states.
"""
import hashlib
import json
import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

import tp
from checkpoint import read_json
from console import say, whole_or_nothing, write_atomically
from model import Transformer
from runtime import pack_for_cpu
from train_data import Dialogue, make_batches

SHARD = 256     # dialogues in a file of the cache


class Batch(NamedTuple):
    tokens: Tensor      # [B, T] int64, padded on the right
    features: Tensor    # [B, T, dim] of the target, or [B, T, n * dim]: what the head is given
    loss_mask: Tensor   # [B, T] bool
    final: Tensor       # [B, T, dim] what the target's LM head is given; without captured states these are the features


class Features:
    """Batches of dialogues with the target's features: computed, or read from the cache `folder`.

    capture  the hidden states that an EAGLE-3 head reads, as in `Transformer.forward`; () for the final one alone
    """

    def __init__(self, model: Transformer, dialogues: list[Dialogue], folder: Path | None = None,
                 capture: tuple[int, ...] = ()):
        self.model, self.dialogues, self.folder = model, dialogues, folder
        self.capture = (*capture, model.config.n_layer) if capture else ()
        self.shard_of = {i: n for n, shard in enumerate(shards_of(dialogues)) for i in shard}
        self.open_shards: dict[int, safe_open] = {}

    def batch(self, indices: list[int]) -> Batch:
        tokens = self._padded([self.dialogues[i].tokens.long() for i in indices])
        loss_mask = self._padded([self.dialogues[i].loss_mask for i in indices])
        states = self.states(indices)
        if not self.capture:
            return Batch(tokens, states, loss_mask, states)
        dim = self.model.config.dim
        return Batch(tokens, states[..., :-dim], loss_mask, states[..., -dim:])

    def states(self, indices: list[int]) -> Tensor:
        """[B, T, dim], or [B, T, (n + 1) * dim] with the final state last: what a cache holds."""
        if self.folder is not None:
            return self._padded(self._read(self.folder, indices))
        rows = [self.dialogues[i].tokens.long() for i in indices]
        return self._compute(self._padded(rows), torch.tensor([[len(row)] for row in rows]))

    def _padded(self, rows: list[Tensor]) -> Tensor:
        return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.model.inv_freq.device)

    def _compute(self, tokens: Tensor, length: Tensor) -> Tensor:
        """[B, T], the rows' lengths [B, 1] -> [B, T, ...]"""
        with torch.inference_mode():
            features = self.model.features(tokens, torch.arange(tokens.shape[1], device=tokens.device),
                                           capture=self.capture, rope_length=length.to(tokens.device))
        return features.clone()     # outside of inference mode, so that a backward pass may keep it

    def _read(self, folder: Path, indices: list[int]) -> list[Tensor]:
        """[T, ...] of each dialogue."""
        for n in {self.shard_of[i] for i in indices} - self.open_shards.keys():
            self.open_shards[n] = safe_open(shard_file(folder, n), framework="pt")
        return [self.open_shards[self.shard_of[i]].get_tensor(str(i)) for i in indices]


def shards_of(dialogues: list[Dialogue]) -> list[list[int]]:
    """Numbers of the dialogues in each file of a cache: dialogues of like length together."""
    order = sorted(range(len(dialogues)), key=lambda i: len(dialogues[i].tokens))
    return [order[begin:begin + SHARD] for begin in range(0, len(order), SHARD)]


def shard_file(folder: Path, n: int) -> Path:
    return folder / f"{n:05}.safetensors"


def write_features(model: Transformer, dialogues: list[Dialogue], folder: Path, n_token: int,
                   origin: dict[str, str], capture: tuple[int, ...] = (), computed: Features | None = None) -> None:
    """Fill the cache `folder`: those shards that are not there yet, n_token tokens at a time.

    `origin` is what the features come from beside the states captured, the dtype and the tokens. `computed` has them
    (default: the target runs).
    Raises ValueError where the cache is of other features, or where features are not finite.
    """
    dtype = model.norm.weight.dtype
    stamp = origin | {"states": states_stamp(capture), "dtype": str(dtype).removeprefix("torch."),
                      "tokens": tokens_digest(dialogues)}
    check_cache(folder, stamp)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "features.json").exists():
        write_atomically(folder / "features.json", json.dumps(stamp, indent=1) + "\n")
    total = sum(len(dialogue.tokens) for dialogue in dialogues)
    computed = computed or Features(model, dialogues, capture=capture)
    width = max(1, len(computed.capture)) * model.config.dim
    say(f"features: {total} tokens, {total * width * dtype.itemsize / 1e9:.2f} GB in {folder}")
    with tqdm(total=total, desc="features", unit=" tokens", disable=None) as bar:
        for n, shard in enumerate(shards_of(dialogues)):
            if not shard_file(folder, n).exists():
                rows = shard_rows(computed, shard, n_token)
                with whole_or_nothing(shard_file(folder, n), ".part") as part:
                    save_file(rows, part)
            bar.update(sum(len(dialogues[i].tokens) for i in shard))


def shard_rows(features: Features, shard: list[int], n_token: int) -> dict[str, Tensor]:
    """[T, ...] of each dialogue of a shard, by its number."""
    rows: dict[str, Tensor] = {}
    lengths = [len(features.dialogues[i].tokens) for i in shard]
    for batch in make_batches(lengths, n_token, random.Random(0)):
        for j, row in zip(batch, features.states([shard[j] for j in batch]).cpu()):
            rows[str(shard[j])] = row[:lengths[j]].clone()
            if not row[:lengths[j]].isfinite().all():
                line = features.dialogues[shard[j]].line
                raise ValueError(f"the target's features of the dialogue in line {line} are not finite")
    return rows


# What a cache, a training or a data file was made with

DIFFERS = {
    "target": "{where} was made with another target than {mine[checkpoint]}: weights, config.json or quantize.json are "
              "not those of {kept[checkpoint]}",
    "template": "{where} was made with another chat template",
    "states": "{where} was made with the target's hidden states {was}, and this kind of head learns from {now}",
    "tokens": "{where} was made with other tokens: data, --max-length, tokenizer or version of this program differ",
}


def check_same(kept: Mapping[str, object], mine: Mapping[str, object], where: str, remedy: str = "",
               differs: Mapping[str, str] = DIFFERS) -> None:
    """Raise ValueError, one line, for the first key of `mine` that has another value in `kept`. An empty `kept` is new.

    differs   what to say of a key, with {where}, {was}, {now}, {kept} and {mine} to fill in
    "checkpoint", the user's name for the target, is there for the messages and is not compared.
    """
    for key, now in mine.items() if kept else ():
        if key not in kept:
            raise ValueError(f"{where} does not say its {key}: an earlier version of this program wrote it")
        if kept[key] != now and key != "checkpoint":
            text = differs.get(key, "{where} was made with {key} {was!r}, not {now!r}")
            raise ValueError(text.format(where=where, key=key, was=kept[key], now=now, kept=kept, mine=mine) + remedy)


def check_cache(folder: Path, origin: dict[str, str]) -> None:
    check_same(cache_origin(folder), origin, str(folder), "; give --cache-features another folder")


def cache_origin(folder: Path) -> dict[str, str]:
    """What the features in a folder come from; empty where there are none."""
    stamp = read_json(folder / "features.json", absent={})
    return {"states": states_stamp(())} | stamp if stamp else {}    # without the key they are of an earlier version


def states_stamp(capture: tuple[int, ...]) -> str:
    """The hidden states that are cached, as one text."""
    return " ".join([*map(str, capture), "final"])


def tokens_digest(dialogues: list[Dialogue], masks: bool = False) -> str:
    """sha256 of the token ids and, on demand, of the loss masks."""
    digest = hashlib.sha256()
    for dialogue in dialogues:
        digest.update(len(dialogue.tokens).to_bytes(8) + dialogue.tokens.numpy().tobytes())
        if masks:
            digest.update(dialogue.loss_mask.numpy().tobytes())
    return digest.hexdigest()


def target_stamp(folder: Path) -> str:
    """A digest of what makes a target: config.json, quantize.json, quantize_config.json, every byte of the weights.

    Nothing less than the content tells targets apart: a merged LoRA keeps names and sizes, and a copy has other times.
    Eight files are read at a time, at about 2 GB/s each.
    """
    kinds = ("model*.safetensors", "pytorch_model*.bin", "model*.gguf", "gptq_model*.safetensors")
    files = next(filter(None, (sorted(folder.glob(kind)) for kind in kinds)), [])
    digest = hashlib.sha256()
    for file in (folder / "config.json", folder / "quantize.json", folder / "quantize_config.json"):
        if file.exists():
            digest.update(json.dumps(read_json(file), sort_keys=True).encode())
    with ThreadPoolExecutor(8) as pool:     # hashing releases the interpreter
        for file, content in zip(files, pool.map(file_digest, files)):
            digest.update(f"{file.name} {content}".encode())
    return digest.hexdigest()


def file_digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


# Several processes


def load_target(folder: Path, device: torch.device, dtype: torch.dtype, rank: int = 0, world: int = 1) -> Transformer:
    """The whole target or, for a world of several, a part of each layer (`shard_layers`)."""
    if world == 1:
        model = Transformer.from_pretrained(folder, device, dtype)
        if dtype == torch.bfloat16:     # in fp32 packing gains nothing over as many rows as a batch has
            pack_for_cpu(model.layers)
        return model

    def load() -> Transformer:
        model = Transformer.from_pretrained(folder, "cpu", dtype, choose_kernels=False)
        shard_layers(model, device, rank, world)
        return model.to(device)

    # One after the other: the host's memory then holds one whole target at a time.
    turns: list[Any] = [tp.in_turn(turn == rank, load) for turn in range(world)]
    return turns[rank]


def shard_layers(model: Transformer, device: torch.device, rank: int, world: int) -> list["Piece"]:
    """Keep 1/world of every layer here. The ranks gather a layer for the time it runs, as ZeRO-3 does
    (arXiv 1910.02054), so all of them must run the target equally often."""
    return [Piece(layer, device, rank, world) for layer in model.layers]


class Piece:
    """1/world of a layer's tensors. Before the layer runs `gather` makes them whole, afterwards `drop` frees them."""

    def __init__(self, layer: nn.Module, device: torch.device, rank: int, world: int):
        from linears import QuantLinear
        self.tensors = [*layer.parameters(), *layer.buffers()]      # of a quantised layer too
        self.shapes = [tensor.shape for tensor in self.tensors]
        self.linears = [module for module in layer.modules() if isinstance(module, QuantLinear)]
        # As bytes, so that dtypes mix. A view in any dtype must begin at a multiple of its size, hence the padding.
        parts = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in self.tensors]
        self.sizes = [len(part) for part in parts]
        self.padded_sizes = [size + -size % 16 for size in self.sizes]
        flat = torch.cat([F.pad(part, (0, padded - len(part))) for part, padded in zip(parts, self.padded_sizes)])
        self.mine = F.pad(flat, (0, -len(flat) % world)).view(world, -1)[rank].to(device, copy=True)     # [bytes]
        self.world = world
        self.drop()
        layer.register_forward_pre_hook(self.gather)
        layer.register_forward_hook(self.drop)

    def gather(self, *_) -> None:
        whole = self.mine.new_empty(self.world * len(self.mine))
        dist.all_gather_into_tensor(whole, self.mine)
        parts = whole[:sum(self.padded_sizes)].split(self.padded_sizes)
        for tensor, shape, size, part in zip(self.tensors, self.shapes, self.sizes, parts):
            tensor.data = part[:size].view(tensor.dtype).view(shape)

    def drop(self, *_) -> None:
        for tensor in self.tensors:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=self.mine.device)
        for linear in self.linears:
            linear.lay_out(set())   # a CPU kernel's copy of the weight is as large as the weight
