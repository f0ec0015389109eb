"""Checkpoints on disk and on the hub: folders, shards, and strict loading. Knows no architecture.

    folder = resolve_checkpoint("lmsys/vicuna-7b-v1.3")         # a local folder, or the hub's copy of it
    config = read_json(folder / "config.json")
    load_weights({"model.norm.weight": tensor, ...}, folder)    # every key, every shape, nothing left over
"""
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import hub_formats
from grid import Format

REPOSITORY = Path(__file__).resolve().parent
DEMO_FOLDER = REPOSITORY / "checkpoints" / "SmolLM2-135M-Instruct"


def resolve_checkpoint(checkpoint: str | Path, weights: bool = True) -> Path:
    """The local folder of a checkpoint. A hub id is fetched into huggingface-hub's cache, with or without its weights.

    A GGUF file, or a folder that holds one and no config.json, gets a folder in the user's cache (gguf_format.py).

    Raises FileNotFoundError or ValueError in one line for a repository that is missing, gated or out of reach.
    """
    try:
        folder = Path(checkpoint).expanduser()
    except RuntimeError:
        raise ValueError(f"{checkpoint}: ~ stands for a home directory, and this user has none") from None
    if (folder / "config.json").exists():
        return folder
    if folder.is_file() or any(folder.glob("*.gguf")):
        from gguf_format import as_folder
        from gguf_header import find_gguf
        return as_folder(find_gguf(folder))
    if folder.is_dir():
        return folder
    name = str(checkpoint)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise FileNotFoundError(f"{checkpoint}: no such folder or GGUF file (a hub id has the form owner/name)")
    # Set to an empty string, these would put the cache into the working directory.
    for variable in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        if not os.environ.get(variable, "unset"):
            del os.environ[variable]
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    patterns = ["*.json", "tokenizer.model", "merges.txt", "*.jinja"]
    try:
        wanted = [*patterns, "model*.safetensors", "gptq_model*.safetensors"] if weights else patterns
        # Of the subfolders only additional_chat_templates/ is wanted.
        local = snapshot_download(name, allow_patterns=wanted, ignore_patterns=["[!a]*/*"])
        if weights and find_weights(Path(local)) is None:
            local = snapshot_download(name, allow_patterns=["pytorch_model*.bin"], ignore_patterns=["*/*"])
    except GatedRepoError:
        raise ValueError(f"{name} is gated: accept its licence on its hub page, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(f"{name}: neither a folder here nor a repository on the hub") from None
    except LocalEntryNotFoundError:
        raise FileNotFoundError(f"{name}: not a folder here, not in the hub's cache, and the hub cannot be reached; "
                                "give a local folder or restore the network") from None
    except OSError as error:  # httpx and requests failures are both OSError or wrapped in it by huggingface-hub
        raise ValueError(f"{name}: fetching from the hub failed: {_one_line(error)}") from None
    return Path(local)


def demo_checkpoint() -> Path:
    """The folder of the demo model, which scripts/download.py fetches on first use.

    Raises FileNotFoundError if that script is missing, and ValueError with the script's error line if it fails.
    """
    script = REPOSITORY / "scripts" / "download.py"
    if (DEMO_FOLDER / "model.safetensors").is_file():
        return DEMO_FOLDER
    if not script.exists():
        raise FileNotFoundError("name a --checkpoint: scripts/download.py, which fetches the demo model, is not here")
    command = [sys.executable, str(script), "--demo"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        failure = f"{script} failed"
        for line in child.stderr or ():
            if line.startswith("error: "):
                failure = line.removeprefix("error: ").strip()
            else:
                print(line, end="", file=sys.stderr, flush=True)
    if child.returncode != 0:
        raise ValueError(failure)
    return DEMO_FOLDER


def quantize_settings(folder: Path) -> dict:
    """The content of quantize.json; mode, group_size and `tool` of a checkpoint that another tool quantised; {} for one
    in 16 bits. Raises ValueError for a tool or a layout that is not read."""
    if settings := read_json(folder / "quantize.json", absent={}):
        return settings
    found = foreign_settings(folder)
    return hub_formats.summary(found) if found else {}


def foreign_settings(folder: Path) -> hub_formats.Settings | None:
    """What config.json, or GPTQ's file beside it, says of a checkpoint that another tool quantised."""
    beside = read_json(folder / "quantize_config.json", absent={})
    return hub_formats.settings(read_json(folder / "config.json", absent={}), beside)


def refuse_parts(folder: Path) -> None:
    """Raise ValueError for a checkpoint whose tensors cannot be read in slices: one that another tool quantised."""
    if found := foreign_settings(folder):
        raise ValueError(f"{folder}: weights quantised by {found.method} are not split over processes: run one, or "
                         "quantise the 16-bit checkpoint with quantize.py")


def foreign_parts(folder: Path) -> dict[str, hub_formats.Part]:
    """The linears of a checkpoint that another tool quantised, by name; {} for any other checkpoint."""
    found = foreign_settings(folder)
    if found is None:
        return {}

    def read(wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
        return ((key, tensor) for key, tensor, _ in iterate_stored(folder, wanted))
    with torch.device("cpu"):   # models are built with "meta"
        return hub_formats.find_parts(list_shapes(folder), found, read, folder)


def foreign_formats(folder: Path) -> tuple[dict[str, Format], str]:
    """The format of each linear that stays on the grid of another tool, by name, and a line about those that do not."""
    file = find_weights(folder)
    if file is not None and file.suffix == ".gguf":
        from gguf_format import kept_formats
        return kept_formats(file)
    parts = foreign_parts(folder)
    widened = [name for name, part in parts.items() if not part.is_kept]
    line = (f"{len(widened)} of {len(parts)} quantised weights take 16 bits here, as their groups are not of 32, 64 or "
            "128 columns or other than in the weights beside them: "
            f"{', '.join(widened[:3])}{', ...' * (len(widened) > 3)}") if widened else ""
    return {name: part.format for name, part in parts.items() if part.is_kept and part.format}, line


# A key and the shape stored under it -> the slice to read.
Part = Callable[[str, list[int]], tuple[slice, ...]]


@torch.no_grad()
def load_weights(targets: dict[str, Tensor], folder: Path, optional: dict[str, Tensor] | None = None,
                 part: Part | None = None, rename: Callable[[str], str] = str) -> None:
    """Copy every tensor of a checkpoint to its place. Strict: every key once, every shape, nothing left over.

    targets   key -> the tensor to fill
    optional  key -> a tensor of the shape that a file may also hold under this key; it is not filled
    part      the slice of each stored tensor to read (default: all of it)
    rename    the file's key -> the key used here
    """
    optional, missing, is_foreign = optional or {}, set(targets), foreign_settings(folder) is not None
    renamed_part = part and (lambda key, shape: part(rename(key), shape))
    for key, tensor, file in iterate_weights(folder, part=renamed_part):
        key = rename(key)
        if key.endswith("rotary_emb.inv_freq"):  # RoPE's constants, which old converters stored
            continue
        target = targets.get(key, optional.get(key))
        if target is None and is_foreign and key.endswith(".bias") and not tensor.any():    # GPTQ's tools store such
            continue
        if target is None:
            raise ValueError(f"{file}: unexpected key {key!r}: config.json describes no such weight")
        if tensor.shape != target.shape:
            raise ValueError(f"{file}: {key} has shape {list(tensor.shape)}, config.json makes it {list(target.shape)}")
        if key in targets:
            if key not in missing:
                raise ValueError(f"{file}: {key} is there a second time, under another name or in another shard")
            target.copy_(tensor)
            missing.remove(key)
    if missing:
        raise ValueError(f"{folder}: {len(missing)} of {len(targets)} weights are missing, first {min(missing)!r}")


def iterate_weights(folder: Path, wanted: Callable[[str], bool] = lambda key: True,
                    part: Part | None = None) -> Iterator[tuple[str, Tensor, Path]]:
    """Yield (key, tensor, file) over all shards of a folder, quantised weights as grid.py stores them.

    Only tensors whose key is `wanted` are read; with `part`, only that slice of each.
    """
    parts = foreign_parts(folder)
    if not parts:
        yield from iterate_stored(folder, wanted, part)
        return
    if part is not None:
        refuse_parts(folder)

    def is_read(key: str) -> bool:
        name, _, kind = key.rpartition(".")
        if name in parts and kind in parts[name].keys:
            return any(wanted(f"{name}.{kind}") for kind in ("weight", "scales", "zeros", "order", "bias"))
        return wanted(key)
    for key, tensor, file in hub_formats.convert(iterate_stored(folder, is_read), parts):
        if wanted(key):
            yield key, tensor, file


def iterate_stored(folder: Path, wanted: Callable[[str], bool] = lambda key: True,
                   part: Part | None = None) -> Iterator[tuple[str, Tensor, Path]]:
    """`iterate_weights` of the tensors as they lie in the files, safetensors preferred, one shard open at a time."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter (adapter_config.json): merge it into its base model")
    file = find_weights(folder)
    if file is None:
        raise FileNotFoundError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin, "
                                "nor an index of shards of them (a GGUF file is given by its own name)")
    if file.suffix == ".gguf":
        from gguf_format import read_weights
        yield from read_weights(file, wanted, part)
        return
    if file.suffix != ".json":
        yield from _read_shard(file, wanted, part)
        return
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or {type(name) for name in weight_map.values()} != {str}:
        raise ValueError(f"{file} has no weight_map: it does not say which shard holds which weight")
    for name in sorted(set(weight_map.values())):
        yield from _read_shard(folder / name, wanted, part)


def list_shapes(folder: Path) -> dict[str, list[int]]:
    """The shape of every tensor by its key. Reads no values."""
    shapes: dict[str, list[int]] = {}

    def nothing(key: str, shape: list[int]) -> tuple[slice, ...]:
        shapes[key] = shape
        return (slice(0, 0),) if shape else ()

    for _ in iterate_stored(folder, part=nothing):
        pass
    return shapes


def find_weights(folder: Path) -> Path | None:
    """The file of weights, or the index of its shards. If there are several, the one that transformers takes; then a
    GGUF file; then what GPTQ's older tools wrote, gptq_model-4bit-128g.safetensors. Raises ValueError for two of those.
    """
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    found = [folder / name for name in names if (folder / name).exists()]
    found += [*folder.glob("model.gguf"), *folder.glob("model-00001-of-*.gguf")]
    if not found:
        old = "gptq_model*.safetensors"
        found = [*folder.glob(f"{old}.index.json")] or sorted(folder.glob(old))
        if len(found) > 1:
            raise ValueError(f"{folder} holds {len(found)} models, {', '.join(file.name for file in found)}: keep one")
    return next(iter(found), None)


def _read_shard(file: Path, wanted: Callable[[str], bool], part: Part | None) -> Iterator[tuple[str, Tensor, Path]]:
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: the checkpoint is incomplete, fetch it again")
    refuse_lfs_pointer(file)
    from safetensors import SafetensorError, safe_open
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as shard:
                for key in filter(wanted, shard.keys()):
                    if part is None:
                        yield key, shard.get_tensor(key), file
                    else:
                        whole = shard.get_slice(key)
                        yield key, whole[part(key, whole.get_shape())], file
        else:
            mmap = zipfile.is_zipfile(file)  # files older than PyTorch 1.6 are read whole
            content = torch.load(file, map_location="cpu", mmap=mmap, weights_only=True)
            if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
                raise RuntimeError("it does not hold a dictionary of tensors")
            for key in filter(wanted, content):
                yield key, content[key] if part is None else content[key][part(key, list(content[key].shape))], file
    except pickle.UnpicklingError:  # torch's message advises to let the file run code
        raise ValueError(f"{file} is corrupt, or holds more than tensors, which could run code: not read") from None
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{file} is corrupt, truncated or not a weights file: {_one_line(error)}") from None


def read_json(file: Path, absent: dict | None = None) -> dict:
    """Parse a JSON object, with one-line errors. A missing file gives `absent`, or FileNotFoundError without it."""
    if not file.exists():
        if absent is not None:
            return absent
        raise FileNotFoundError(f"{file} is missing")
    refuse_lfs_pointer(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} does not hold a JSON object")
    return content


def read_ids(file: Path) -> list:
    """Token ids from a file: JSON (a list or {"ids": list}), or a list or tensor saved by torch, as SGLang does.

    Whole floats become integers; the entries are not checked further. Raises FileNotFoundError or ValueError.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    refuse_lfs_pointer(file)
    with open(file, "rb") as content:
        is_torch = content.read(2) in (b"PK", b"\x80\x02")  # a zip archive, or a pickle, as before PyTorch 1.6
    try:
        if is_torch:
            content = torch.load(file, map_location="cpu", weights_only=True)
        else:
            content = json.loads(file.read_text(encoding="utf-8-sig"))
    except pickle.UnpicklingError:
        raise ValueError(f"{file} is corrupt, or holds more than ids, which could run code: it is not read") from None
    except (ValueError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is neither valid JSON nor a file that torch saved: {_one_line(error)}") from None
    ids = content.get("ids") if isinstance(content, dict) else content
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    if not isinstance(ids, list):
        raise ValueError(f"{file}: a draft vocabulary is a list of token ids, or a JSON object with one under \"ids\"")
    return [int(i) if isinstance(i, float) and i.is_integer() else i for i in ids]


def refuse_lfs_pointer(file: Path) -> None:
    """Raise ValueError for a Git LFS pointer: three lines of text that git puts in place of a large file."""
    with open(file, "rb") as content:
        if content.read(64).startswith(b"version https://git-lfs.github.com/spec/"):
            raise ValueError(f"{file} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")


def _one_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
