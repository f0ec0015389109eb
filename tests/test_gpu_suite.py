"""benchmarks/gpu_suite.sh: a dry run on the CPU, and what it does when parts fail or time is up."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.gpu_suite import Part
from model import Transformer
from reference import write_checkpoint
from test_eagle import head_config, head_weights, write_head

REPO = Path(gpu_suite.__file__).resolve().parent.parent


def suite(tmp_path, monkeypatch, parts, *argv):
    """Status and rows of the report of these parts instead of the real ones."""
    monkeypatch.setattr(gpu_suite, "all_parts", lambda args: iter(parts))
    file = tmp_path / "suite.json"
    status = gpu_suite.main(gpu_suite.parse_args(["--device", "cpu", "--json", str(file), *argv]))
    return status, {row["part"]: row for row in json.loads(file.read_text())["parts"]}


def python(name, code, limit=60):
    return Part(name, "tests", ["-c", code], limit)


def test_a_dry_run_measures_everything_on_the_cpu(tmp_path):
    file, model, head = tmp_path / "suite.json", tmp_path / "model", tmp_path / "head"
    write_checkpoint(model, ascii_only=True, context=4096)
    target = Transformer.from_pretrained(model, dtype=torch.float32)
    write_head(head, head_config(target), head_weights(head_config(target), target.tok_embeddings.weight))
    run = subprocess.run(
        ["bash", REPO / "benchmarks/gpu_suite.sh", "--device", "cpu", "--shapes", "tiny", "--repeats", "1",
         "--parts", "bench", "cold", "eager", "exact", "copying", "--checkpoint", model, "--eagle", head,
         "--json", file],
        capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert run.returncode == 0, run.stderr
    report = json.loads(file.read_text())
    assert [row["part"] for row in report["parts"]] == ["tiny", "tiny, cold start", "tiny, second start",
                                                        "demo, copying", "tiny, exact", "tiny, eager"]
    assert all(row["status"] == "passed" and row["seconds"] > 0 for row in report["parts"])
    bench, cold, _, copying, exact = (row["report"] for row in report["parts"][:5])
    assert {row["tree"] for row in bench["eagle"]} == {"static", "dynamic"} and bench["random_weights"]
    assert 0 < cold["import_seconds"] < cold["first_token_seconds"] < cold["whole_answer_seconds"]
    assert cold["ms_per_step"] > 0 and cold["compiled_graphs"] == 0
    assert len(exact["apart"]) == 14 and not any(exact["apart"].values()) and exact["offer"] is False
    assert list(copying["overall"]) == ["plain", "eagle-tuned+8", "eagle-tuned+off", "copy+8"]
    for text in ("static: outside the models", "first token", "compiled graphs", "a step at temperature 0",
                 "plain decoding", "goal", "copy+8, accepted length",
                 "static: nothing to copy / without a branch", "dynamic: lookup in 4096 tokens / step"):
        assert text in run.stdout


def test_a_part_that_fails_is_said_and_the_others_run(tmp_path, monkeypatch, capsys):
    status, rows = suite(tmp_path, monkeypatch, [python("bad", "raise SystemExit(3)"), python("good", "pass")])
    assert status == 1
    assert {name: row["status"] for name, row in rows.items()} == {"bad": "failed", "good": "passed"}
    assert rows["bad"]["exit_status"] == 3
    assert "bad: failed" in capsys.readouterr().err
    assert suite(tmp_path, monkeypatch, [python("good", "pass")])[0] == 0


def test_a_part_that_takes_too_long_is_stopped_with_all_it_started(tmp_path, monkeypatch):
    child = tmp_path / "child"
    code = ("import subprocess, time; p = subprocess.Popen(['sleep', '60']); "
            f"open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(60)")
    status, rows = suite(tmp_path, monkeypatch, [python("slow", code, limit=1), python("good", "pass")])
    assert status == 1 and rows["slow"]["status"] == "stopped" and rows["good"]["status"] == "passed"
    state = Path(f"/proc/{child.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_what_does_not_fit_in_the_budget_is_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite, "SHORTEST", 20.9)
    parts = [python("long", "import time; time.sleep(0.2)"), python("late", "pass")]
    status, rows = suite(tmp_path, monkeypatch, parts, "--budget", "21")
    assert status == 0 and [row["status"] for row in rows.values()] == ["passed", "skipped"]
    assert "late: skipped, the 21 seconds are used up" in capsys.readouterr().err


def test_the_tests_of_the_kernels_are_among_the_tests_and_both_group_sizes_are_measured():
    parts = {part.name: part.argv for part in gpu_suite.all_parts(gpu_suite.parse_args([]))}
    command = [sys.executable, *parts["tests"], "--collect-only", "-qq"]
    collected = subprocess.run(command, capture_output=True, text=True, cwd=REPO).stdout
    for name in ("test_gpu.py::test_captured_steps_decode", "test_gpu.py::test_a_simulated_step",
                 "test_quantize.py::test_the_triton_kernel_equals_float64_for_every_number_of_rows[cuda]",
                 "test_exact_triton.py::test_exact_products_give_a_row_the_same_bits_in_any_block[cuda]"):
        assert f"tests/{name}" in collected
    assert "test_quantize.py::test_rounding" not in collected
    for size in ("128", "32"):
        assert parts[f"llama-2-7b, int4 of {size}"][-4:] == ["--mode", "int4", "--group-size", size]


def test_figures_are_set_against_their_goals():
    def step(part, rows, times, share=0.9, bytes=100):
        return {"part": part, "rows": rows, "used_slots": 256, "relative_to_one_row": times, "bandwidth_share": share,
                "bytes": bytes}

    def copying(used, step_used, lookup, no_match):
        return {"tree": "static", "used_slots": used, "step_used_slots": step_used, "ms_whole_step": 10.0,
                "ms_no_match": no_match, "ms_copying": 12.0, "lookup_share": lookup}

    report = {
        "decode": {"tokens_per_second_median": 50.0}, "plain": {"used_slots": 256},
        "steps": [step("target pass", 1, 1.0), step("target pass", 26, 1.1), step("target pass", 60, 1.4),
                  step("static: one draft level", 4, 0.10, bytes=10)],
        "eagle": [{"tree": "static", "outside_models_share": 0.06}],
        "copying": [copying(256, 256, 0.001, 10.5), copying(4096, 2048, 0.019, 10.0)],
        "simulated": [{"arm": "plain"}, {"arm": "static", "mean_accept_length": 3.6, "tokens_per_second_median": 99.0,
                                         "speedup_median": 1.98}],
    }
    verdicts = {name: verdict for name, *_, verdict in gpu_suite.figures("bench", report)}
    assert verdicts == {
        "plain decoding": "", "one row, of the copy's speed": "met", "26 rows / one": "met", "60 rows / one": "MISSED",
        "static: draft level / plain step": "met", "static: outside the models": "MISSED",
        "static: nothing to copy / without a branch": "MISSED", "static: copying / without a branch": "",
        "static: lookup in 4096 tokens / step": "met",
        "static: SIMULATED at 3.60 tokens/pass": "", "static: SIMULATED at 3.60 tokens/pass, speedup": ""}


@pytest.mark.skipif(torch.cuda.is_available() or "FORGED_GPU" not in os.environ,
                    reason="takes a minute and a half: FORGED_GPU=1 runs it, where there is no GPU")
def test_the_tests_for_a_gpu_can_pass():
    """With forged graphs, on the CPU."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "forged_gpu", "tests/test_gpu.py"], cwd=REPO,
                          capture_output=True, text=True, env=os.environ | {"PYTHONPATH": f"{REPO}:{REPO}/tests"})
    assert done.returncode == 0 and " 1 skipped" in done.stdout, done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line_and_status_2(capsys):
    assert gpu_suite.main(gpu_suite.parse_args([])) == 2
    assert capsys.readouterr().err == "error: there is no CUDA device here (--device cpu --shapes tiny is a dry run)\n"


@pytest.mark.parametrize("argv, message", [
    (["--eagle", "heads"], "--eagle needs --checkpoint"),
    (["--checkpoint", "no/such"], "--checkpoint no/such: no such folder"),
    (["--json", "/no/such/x.json"], "not a file in an existing folder"), (["--device", "abacus"], "--device abacus"),
    (["--shapes", "llama-9"], "llama-9"), (["--parts", "all"], "all"), (["--budget", "0"], "'0'")])
def test_a_users_mistake_is_one_line_and_status_2(argv, message, capsys):
    try:
        status = gpu_suite.main(gpu_suite.parse_args(["--device", "cpu", *argv]))
    except SystemExit as exit:
        status = exit.code
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and len(lines) == 1 and message in lines[0]
