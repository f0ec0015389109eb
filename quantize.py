"""Quantises a checkpoint to int8 or int4 weights, layer by layer, and measures size and perplexity.

    python quantize.py --checkpoint C --mode int8 --out C-int8
    python quantize.py --checkpoint C --mode int4 --group-size 32 --out C-int4 --eval benchmarks/text.txt
    python quantize.py --checkpoint C --mode int4 --method gptq --data dialogues.jsonl --out C-gptq
    python quantize.py --checkpoint heads/mine --mode int8 --out heads/mine-int8            # an EAGLE head
    python quantize.py --checkpoint C-int4 --eval benchmarks/text.txt                       # perplexity only

The result is a folder like any other, with `quantize.json` beside the weights. grid.py describes the format. One
layer is in memory at a time. Shards are written to OUT.part, which cannot be loaded and is renamed to OUT at the end.
After a kill, the same command continues behind the last finished layer.

Round to nearest (rtn) needs no data. GPTQ (arXiv 2210.17323) rounds one column after the other. After each, it corrects
the columns still to come for the error made, weighted by the activations of calibration dialogues.

Shapes: N rows and K columns of a weight, G groups of a row, T tokens.
"""
import argparse
import datetime
import functools
import json
import math
import re
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import iterate_weights, list_shapes, quantize_settings, read_json, resolve_checkpoint
from config import ModelArgs
from console import Parser, add_chat_options, command, number, pick_device, read_text, write_atomically
from grid import GROUP_SIZES, Format, fit_grid, pack, round_to_nearest, to_grid
from head_config import head_kind, official_key
from linears import Experts, install
from model import (MoEFeedForward, Transformer, TransformerBlock, attention_bias, block_targets, causal_mask,
                   rope_cos_sin, rope_inv_freq)
from tokenizer import Tokenizer
from train_data import read_dialogues
from train_features import file_digest, target_stamp, tokens_digest

# The keys of weights that are quantised, and the linear of model.py that each is a part of. Its parts share an input.
LINEAR = re.compile(r"(?:self_attn\.([qkvo])_proj|mlp\.(gate|up|down)_proj"
                    r"|experts\.(\d+)\.(w[123]|gate|up|down)(?:_proj)?|^(fc))\.weight$")
INPUT = {"q": "wqkv", "k": "wqkv", "v": "wqkv", "o": "wo", "gate": "w13", "up": "w13", "down": "w2",
         "w1": "w13", "w3": "w13", "w2": "w2", "fc": "fc"}
LAYER = re.compile(r"(?:model\.)?layers\.\d+\.")
LARGEST = torch.finfo(torch.float32).max ** 0.5     # a weight: squares of larger ones overflow in a norm


@command(stopped="stopped; the same command goes on from here")
def main(args: argparse.Namespace) -> None:
    check(args)
    folders = [resolve_checkpoint(args.checkpoint)]
    if args.out:
        quantize_folder(folders[0], args.out, args)
        folders.append(args.out)
    for folder in folders if args.eval else folders[1:]:
        report(folder, args)


def check(args: argparse.Namespace) -> None:
    """Refuse at the start what would fail later, and fill in what the options leave open."""
    if (args.mode is None) != (args.out is None):
        raise ValueError("--mode and --out go together")
    if args.out is None and not args.eval:
        raise ValueError("nothing to do: give --mode and --out, or --eval")
    if args.mode == "int8" and args.group_size:
        raise ValueError("int8 has one scale a row: --group-size is for int4")
    if args.method == "gptq" and args.data is None:
        raise ValueError("--method gptq needs --data, dialogues as train_head.py reads them: a few dozen are enough, "
                         "scripts/generate_data.py --dialogues 128 makes them")
    if args.method != "gptq" and (args.data or args.act_order is not None or args.chat_template or args.template_args):
        raise ValueError("--data, --chat-template, --template-args and --act-order are for --method gptq")
    for name, file in (("--data", args.data), ("--eval", args.eval)):
        if file and not file.is_file():
            raise ValueError(f"{name} {file}: no such file")
    args.text = read_text(args.eval) if args.eval else None
    if args.mode == "int4":
        args.group_size = args.group_size or 32
    if args.method == "gptq":
        args.act_order = args.act_order is not False
    args.device = pick_device(args.device)


# A folder


def quantize_folder(folder: Path, out: Path, args: argparse.Namespace) -> None:
    """Write the quantised checkpoint `out` of `folder`, through out.part.

    Raises ValueError if `folder` is quantised already or holds values that are not finite, if `out` exists, or if the
    group size does not divide a row.
    """
    shapes, format, part = list_shapes(folder), Format(args.mode, args.group_size), out.with_name(out.name + ".part")
    check_folder(folder, out, shapes, format, args)
    settings, calibration = begin(folder, part, args)

    units = sorted(set(map(unit_of, shapes)), key=lambda unit: (not unit, len(unit), unit))     # layers by number
    weight_map = {}
    for unit in tqdm(units, "quantising", unit=" layers", disable=None):
        file = part / (f"model-layer-{int(unit.split('.')[-2]):03}.safetensors" if unit else "model-other.safetensors")
        if not file.exists():
            whole = file.with_suffix(".part")
            save_file(quantize_unit(folder, unit, format, calibration, args), whole, metadata={"format": "pt"})
            whole.replace(file)
        with safe_open(file, framework="pt") as shard:
            weight_map |= {key: file.name for key in shard.keys()}
            if calibration and unit:
                calibration.advance(unit, {key: shard.get_tensor(key) for key in shard.keys()})

    total_size = sum(file.stat().st_size for file in part.glob("*.safetensors"))
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_atomically(part / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
    weights = re.compile(r"\.(safetensors|bin|pt|pth|gguf|part)$|\.index\.json$|^config\.json$")
    for file in folder.iterdir():
        if file.is_file() and not weights.search(file.name):
            shutil.copyfile(file, part / file.name)
    # Names that make a folder loadable come last.
    write_atomically(part / "quantize.json", json.dumps(settings, indent=1) + "\n")
    shutil.copyfile(folder / "config.json", part / "config.json")
    part.rename(out)
    (out / "settings.json").unlink()    # after the renaming: a .part without it could not be continued


def check_folder(folder: Path, out: Path, shapes: dict[str, list[int]], format: Format,
                 args: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be quantised. Reads no values."""
    if settings := quantize_settings(folder):
        raise ValueError(f"{folder} is quantised already{' by ' * ('tool' in settings)}{settings.get('tool', '')}: "
                         "start from its 16-bit checkpoint")
    if out.exists():
        raise ValueError(f"{out} exists: give --out another folder")
    config = read_json(folder / "config.json")
    kind = head_kind(config, map(official_key, shapes)) if is_head(shapes) else None
    if kind is None:
        ModelArgs.from_config(config)
    elif kind == "eagle1" and (args.lm_head or args.method == "gptq"):
        raise ValueError(f"{folder} is an EAGLE head, which has no LM head and no calibration: "
                         "no --lm-head, --method rtn")
    elif args.method == "gptq":
        raise ValueError(f"{folder} is an EAGLE-3 head, which has no calibration: --method rtn")
    for key, shape in shapes.items():
        if linear_of(key):
            format.n_group(shape[-1])
        elif args.lm_head and official_key(key) in ("lm_head.weight", "embed_tokens.weight"):   # of the same width
            format.of_lm_head(args.lm_head).n_group(shape[-1])


def begin(folder: Path, part: Path, args: argparse.Namespace) -> tuple[dict, "Calibration | None"]:
    """What quantize.json will say, and the calibration if there is one. Creates `part`, or checks that it was begun in
    the same way."""
    stamp = part / "settings.json"
    begun = any(part.glob("*.safetensors"))
    settings = {"mode": args.mode, "group_size": args.group_size, "method": args.method, "act_order": args.act_order,
                "lm_head": args.lm_head, "source": str(args.checkpoint)}
    if not begun:
        check_values(folder)
    calibration = None
    if args.method == "gptq":
        date = read_json(stamp).get("calibration", {}).get("date") if begun else None
        calibration = Calibration(folder, settings, args, date)
        settings["calibration"] = calibration.described
    stamped = settings | {"target": target_stamp(folder)}
    if begun and read_json(stamp) != stamped:
        raise ValueError(f"{part} was begun with other settings, other weights or other calibration tokens: "
                         "finish it with those, or delete it")
    part.mkdir(parents=True, exist_ok=True)
    if not begun:
        write_atomically(stamp, json.dumps(stamped) + "\n")
    return settings, calibration


def quantize_unit(folder: Path, unit: str, format: Format, calibration: "Calibration | None",
                  args: argparse.Namespace) -> dict[str, Tensor]:
    """The tensors of one layer, or of all that is in no layer, as they are stored."""
    tensors = {key: tensor for key, tensor, _ in iterate_weights(folder, lambda key: unit_of(key) == unit)
               if not key.endswith("rotary_emb.inv_freq")}
    hessians = calibration.hessians(unit, tensors) if calibration and unit else {}
    if calibration and (idle := sorted({name for name in map(linear_of, tensors) if name} - hessians.keys())):
        tqdm.write(f"{unit}: no token reached {', '.join(idle)} with anything but zeros: rounded to nearest",
                   file=sys.stderr)
    done = {}
    for key in list(tensors):
        done |= quantize_weight(key, tensors.pop(key), format, hessians, args.act_order)
    if args.lm_head and not unit:
        own = [key for key in done if official_key(key) == "lm_head.weight"]
        weight = done.pop(own[0]) if own else done["model.embed_tokens.weight"]     # tied
        stored = round_to_nearest(weight, format.of_lm_head(args.lm_head))
        done |= {f"lm_head.{kind}": tensor for kind, tensor in stored.items()}
    return done


def check_values(folder: Path) -> None:
    """Raises ValueError naming the first tensor that holds NaN, infinity or a number beyond LARGEST."""
    for key, tensor, _ in tqdm(iterate_weights(folder), "checking", unit=" tensors", leave=False, disable=None):
        if not tensor.is_floating_point() or tensor.numel() == 0 or key.endswith("rotary_emb.inv_freq"):
            continue
        low, high = (bound.item() for bound in tensor.aminmax())    # NaN where there is one
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{key} holds values that are not finite")
        if max(-low, high) > LARGEST:
            raise ValueError(f"{key} holds {max(-low, high):.3g}, of which products in float32 are not finite")


def is_head(shapes: dict[str, list[int]]) -> bool:
    """Whether these are an EAGLE head's weights, in any of the dialects of head_config.py."""
    return any(official_key(key) == "fc.weight" for key in shapes)


def unit_of(key: str) -> str:
    """The unit of work that a key belongs to: the prefix of a layer's keys, or "" for all that is in no layer."""
    layer = LAYER.match(key)
    return layer.group() if layer else ""


def quantize_weight(key: str, weight: Tensor, format: Format, hessians: dict[str, Tensor],
                    act_order: bool) -> dict[str, Tensor]:
    """One tensor of a checkpoint -> the tensors that replace it. Only linears of a layer are quantised."""
    name = linear_of(key)
    if name is None:
        return {key: weight}
    hessian = hessians.get(name)    # None without calibration, or if all inputs were zero
    if hessian is None:
        stored = round_to_nearest(weight, format)
    else:
        try:
            stored = gptq(weight.to(hessian.device), hessian, format, act_order)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return {key.removesuffix("weight") + kind: tensor.cpu() for kind, tensor in stored.items()}


def linear_of(key: str) -> str | None:
    """The linear of model.py that a key is part of: "wqkv", "w2.5" (expert 5). None if it is not quantised."""
    match = LINEAR.search(official_key(key))
    if match is None:
        return None
    *names, expert = match.group(1, 2, 4, 5, 3)
    return INPUT[next(filter(None, names))] + ("" if expert is None else f".{expert}")


# GPTQ


def gptq(weight: Tensor, hessian: Tensor, format: Format, act_order: bool = False, damping: float = 0.01,
         block: int = 128) -> dict[str, Tensor]:
    """weight [N, K], hessian [K, K] of its inputs -> what a checkpoint stores of it [GPTQ, algorithm 1].

    Computed in the dtype of the hessian. act_order takes the columns with the strongest activations first. The columns
    of a group are then far apart, so the grids of all groups are fitted beforehand. Raises ValueError for a hessian
    that cannot be inverted even when damped.
    """
    weight, hessian = weight.to(hessian.dtype), hessian.clone()
    n_group, K = format.n_group(weight.shape[1]), weight.shape[1]
    size = K // n_group
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = diagonal.mean()       # the column is never active: any value will do
    scale, zero = fit_grid(weight.float().unflatten(1, (n_group, size)), format.mode)   # [N, G]
    order = diagonal.argsort(descending=True) if act_order else torch.arange(K, device=weight.device)
    w = weight[:, order]
    upper = inverse_factor(hessian[order][:, order], damping)
    q = torch.empty_like(weight)
    for begin in range(0, K, block):
        end = min(begin + block, K)
        errors = torch.empty_like(w[:, begin:end])
        for j, column in enumerate(order[begin:end].tolist(), start=begin):
            if not act_order and j % size == 0:     # fit the grid to the weights as corrected so far
                scale[:, j // size], zero[:, j // size] = fit_grid(w[:, j:j + size].float(), format.mode)
            s, z = scale[:, column // size], zero[:, column // size]
            q[:, column] = to_grid(w[:, j], s, z, format.mode)
            errors[:, j - begin] = (w[:, j] - (q[:, column] * s + z)) / upper[j, j]
            w[:, j + 1:end] -= errors[:, j - begin, None] * upper[j, j + 1:end]
        w[:, end:] -= errors @ upper[begin:end, end:]
    return pack(q, scale, zero, format.mode)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of a damped hessian: `damping` times its mean diagonal is added to the
    diagonal, and more where that is not enough."""
    if not hessian.isfinite().all():
        raise ValueError("GPTQ cannot invert the second moments of the inputs, which are not finite: a weight of this "
                         "layer or of one before it is far too large")
    mean = hessian.diagonal().mean()
    for share in (damping, 0.1, 1.0):
        damped = hessian.clone()
        damped.diagonal().add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and upper.isfinite().all():
            return upper
    raise ValueError("GPTQ cannot invert the second moments of the inputs, however damped; --method rtn needs none")


class Calibration:
    """Calibration dialogues on their way through the layers. `states` are the inputs of the next layer, as the
    quantised layers before it compute them."""

    def __init__(self, folder: Path, settings: dict, args: argparse.Namespace, date: str | None = None):
        """date: what the chat template is told, from `described` of an interrupted run; None means now."""
        self.config = config = ModelArgs.from_config(read_json(folder / "config.json"))
        self.settings, self.device = settings, args.device
        self.dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
        now = datetime.datetime.now() if date is None else datetime.datetime.fromisoformat(date)
        tokenizer = Tokenizer.from_pretrained(folder, chat_template=args.chat_template,
                                              template_args=args.template_args, date=now)
        dialogues = read_dialogues(args.data, tokenizer, config.vocab_size, args.max_length)[:args.dialogues]
        self.described = {"dialogues": len(dialogues), "max_length": args.max_length, "sha256": file_digest(args.data),
                          "tokens_sha256": tokens_digest(dialogues), "device": args.device.type}
        if tokenizer.uses_date:
            self.described["date"] = now.isoformat()
        *_, (_, embedding, _) = iterate_weights(folder, lambda key: key.endswith("embed_tokens.weight"))
        self.states = [embedding[dialogue.tokens.long()][None].to(self.device, self.dtype)      # each [1, T, dim]
                       for dialogue in dialogues]
        self.inv_freq = rope_inv_freq(config, self.device)

    @torch.no_grad()
    def hessians(self, unit: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sum of x x^T over all inputs x of each linear of a 16-bit layer, fp32 [K, K]. Left out if it is zero."""
        block, sums = self._block(unit, tensors), {}

        def add(name: str, module: nn.Module, inputs: tuple) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            name = ".".join([name, *map(str, inputs[1:])])      # Experts are called with the number of one
            if len(x):
                sums[name] = sums[name].addmm_(x.T, x) if name in sums else x.T @ x

        for name, module in block.named_modules():
            if isinstance(module, (nn.Linear, Experts)):
                module.register_forward_pre_hook(functools.partial(add, name.split(".")[-1]))
            if isinstance(module, MoEFeedForward):      # an expert must see only the rows that the router sends to it
                module.w13.routes_on_host, module.PREFILL_ROWS = True, 0
        for x in self.states:
            self._run(block, x)
        return {name: hessian for name, hessian in sums.items() if hessian.any()}

    @torch.no_grad()
    def advance(self, unit: str, tensors: dict[str, Tensor]) -> None:
        """Pass the dialogues through a quantised layer."""
        block = self._block(unit, tensors)
        self.states = [self._run(block, x) for x in self.states]

    def _block(self, unit: str, tensors: dict[str, Tensor]) -> TransformerBlock:
        with torch.device("meta"):
            block = TransformerBlock(self.config.layer(int(unit.split(".")[-2])))
            if any(key.endswith(".scales") for key in tensors):
                install(block, self.settings)
        block.to(self.dtype).to_empty(device=self.device)
        for key, target in block_targets(block, self.config).items():
            if unit + key not in tensors:
                raise ValueError(f"the checkpoint has no {unit + key}")
            target.copy_(tensors[unit + key])
        return block

    def _run(self, block: TransformerBlock, x: Tensor) -> Tensor:
        pos = torch.arange(x.shape[1], device=x.device)[None]
        bias = attention_bias(causal_mask(pos, None), self.config.n_head // self.config.n_kv_head, x.dtype)
        return block(x, rope_cos_sin(pos, self.inv_freq, x.dtype), bias, pos, None)


# Size and perplexity


def report(folder: Path, args: argparse.Namespace) -> None:
    """Print size and bits per weight of a checkpoint or a head and, with --eval, the perplexity of a checkpoint."""
    n_byte = layer_bytes = layer_weights = 0
    for key, tensor, _ in iterate_weights(folder):
        # Scales of other tools come in fp32 and are held in 16 bits.
        size = 2 * tensor.numel() if key.endswith((".scales", ".zeros")) else tensor.nbytes
        n_byte += size
        if unit_of(official_key(key)) or official_key(key).startswith("fc."):
            layer_bytes += size
            if not key.endswith((".scales", ".zeros", ".order")):
                layer_weights += tensor.numel() * (2 if tensor.dtype == torch.uint8 else 1)
    line = f"{folder}: {n_byte / 1e6:.1f} MB, {8 * layer_bytes / layer_weights:.2f} bits per weight in the layers"
    if args.eval and not is_head(list_shapes(folder)):
        model = Transformer.from_pretrained(folder, args.device, getattr(torch, args.dtype))
        tokenizer = Tokenizer.from_pretrained(folder)
        tokens = tokenizer.encode(args.text, bos=tokenizer.adds_bos)
        if max(tokens, default=0) >= model.config.vocab_size:
            raise ValueError(f"the tokenizer gives token {max(tokens)}, "
                             f"the model's vocabulary has {model.config.vocab_size}")
        line += f", perplexity {perplexity(model, tokens):.4f} over {len(tokens) - 1} tokens of {args.eval}"
    print(line, flush=True)


@torch.inference_mode()
def perplexity(model: Transformer, tokens: list[int], window: int = 1024) -> float:
    """exp of the mean negative log likelihood of all tokens but the first. The window moves on by half its length, so
    that each token is predicted from at least half a window, or from the whole text before it. Raises ValueError if the
    result is not finite."""
    if len(tokens) < 2:
        raise ValueError("a perplexity needs a text of two tokens or more")
    window = min(window, model.config.block_size)
    ids = torch.tensor([tokens], device=model.norm.weight.device)
    total, n_scored = 0.0, 1    # the first token has nothing before it
    while n_scored < len(tokens):
        begin = n_scored - window // 2 if n_scored > 1 else 0
        end = min(begin + window, len(tokens))
        features = model.features(ids[:, begin:end - 1], torch.arange(end - 1 - begin, device=ids.device))
        logits = model.output(features[:, n_scored - 1 - begin:]).float()
        total += F.cross_entropy(logits[0], ids[0, n_scored:end], reduction="sum").item()
        n_scored = end
    mean = total / (len(tokens) - 1)
    if not mean < math.log(sys.float_info.max):     # also true of NaN
        dtype = str(model.norm.weight.dtype).removeprefix("torch.")
        wider = " or ".join(other for other in ("bfloat16", "float32") if other != dtype)
        raise ValueError(f"the perplexity is not finite in {dtype}: "
                         + ("its weights are broken" if dtype == "float32" else f"try --dtype {wider}"))
    return math.exp(mean)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Quantise a checkpoint or an EAGLE head to int8 or int4 weights.")
    parser.add_argument("--checkpoint", required=True, help="Hugging Face folder or hub id, of a target or a head")
    parser.add_argument("--mode", choices=("int8", "int4"))
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES,
                        help="columns that share a scale; int4 only (default: 32)")
    parser.add_argument("--lm-head", choices=("int8", "int4"), help="quantise the LM head too, by rounding to nearest; "
                        "a tied one is untied: more bytes on disk, fewer to read a step")
    parser.add_argument("--method", choices=("rtn", "gptq"), default="rtn")
    parser.add_argument("--data", type=Path, metavar="FILE", help="calibration dialogues of gptq, JSON lines")
    add_chat_options(parser)
    parser.add_argument("--dialogues", type=number(int, 1), default=128, metavar="N", help="use at most N of them")
    parser.add_argument("--max-length", type=number(int, 2), default=512, metavar="T",
                        help="use at most T tokens of a dialogue")
    parser.add_argument("--act-order", action=argparse.BooleanOptionalAction,
                        help="gptq: columns with the strongest activations first (default), at no cost afterwards")
    parser.add_argument("--eval", type=Path, metavar="FILE", help="perplexity of this text, before and after")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of --eval")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
