"""benchmarks/bench.py and what it uses: published shapes, a step's bytes, replayed accepted lengths, whole runs."""
import json

import pytest
import torch

from copy_branch import CopyBranch
from draft_tree import DynamicTree, StaticTree
from decoder import setup_caches
from checkpoint import read_json
from model import Transformer
from reference import tiny
from benchmarks import bench, shapes, simulate, timing

PARAMETERS = {  # what the published weight files add up to
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496, "vicuna-33b": 32_528_943_616,
    "mixtral-8x7b": 46_702_792_704, "qwen3-30b-a3b": 30_532_122_624, "smollm2-135m": 134_515_008,
    "llama-3.1-8b": 8_030_261_248, "qwen3-8b": 8_190_735_360,
}
HEAD_PARAMETERS = {  # EAGLE's README rounds Vicuna-33B's to 0.56 B and LLaMA-3-70B's to 0.99 B
    "llama-2-7b": 235_937_792, "llama-2-13b": 369_633_280, "llama-2-70b": 989_872_128, "llama-3-8b": 251_662_336,
    "llama-3-70b": 989_863_936, "vicuna-33b": 557_200_384, "mixtral-8x7b": 276_832_256,
}
DESCRIPTION = {"date", "command", "commit", "device", "device_name", "threads", "torch", "python", "model",
               "random_weights", "dtype", "compiled", "repeats"}
TIMES = {"ms_median", "ms_min", "ms_max"}


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(bench, "LONG_PROMPT", 40)
    monkeypatch.setattr(bench, "ROUNDS", 2)
    monkeypatch.setitem(timing.BUFFER, "cpu", 1 << 24)


def run(*argv, file):
    status = bench.main(bench.parse_args([*map(str, argv), "--device", "cpu", "--repeats", "2", "--json", str(file)]))
    assert status == 0
    report = json.loads(file.read_text())
    assert DESCRIPTION <= report.keys()
    assert report["torch"] == torch.__version__ and report["command"].startswith("python benchmarks/")
    return report


def ordered(row):
    return 0 < row["ms_min"] <= row["ms_median"] <= row["ms_max"]


def test_shapes_have_the_published_parameter_counts():
    models = {name: bench.meta_model(config, torch.bfloat16) for name, config in bench.SHAPES.items()}
    assert {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()} == PARAMETERS


def test_heads_have_the_published_parameter_counts():
    counts = {}
    for name in HEAD_PARAMETERS:
        head = shapes.random_head(bench.meta_model(bench.SHAPES[name], torch.bfloat16), name)
        assert {(p.device.type, p.dtype) for p in head.parameters()} == {("meta", torch.bfloat16)}
        counts[name] = sum(p.numel() for p in head.parameters())
    assert counts == HEAD_PARAMETERS


def test_the_demo_models_shape_is_that_of_its_config(demo_folder):
    import dataclasses

    from config import ModelArgs
    assert dataclasses.asdict(ModelArgs.from_config(read_json(demo_folder / "config.json"))) \
        == dataclasses.asdict(bench.SHAPES["smollm2-135m"])


@pytest.mark.parametrize("kind", ["gqa", "llama2_tied", "qwen2", "qwen3"])
def test_step_reads_every_weight_once_and_the_embeddings_of_its_rows(tmp_path, kind):
    folder, _ = tiny(kind, tmp_path)
    model = Transformer.from_pretrained(folder, dtype=torch.bfloat16)
    model.setup_caches(1, 128)
    table = model.tok_embeddings.weight
    weights = 2 * sum(p.numel() for p in model.parameters())  # a tied matrix, which is the LM head, counts once
    if not model.config.tie_word_embeddings:
        weights -= 2 * table.numel()
    for n_row, n_slot in (1, 128), (26, 64):
        cache = 2 * model.kv_cache[..., :n_slot, :].numel()
        assert bench.step_bytes(model, n_row, n_slot) == weights + 2 * table[:n_row].numel() + cache


@pytest.mark.parametrize("kind, n_active", [("mixtral", 2), ("qwen3_moe", 3), ("qwen3_moe_mixed", 4)])    # of 8
def test_step_reads_the_experts_its_rows_can_be_routed_to(tmp_path, kind, n_active):
    folder, _ = tiny(kind, tmp_path)
    model = Transformer.from_pretrained(folder, dtype=torch.float32)
    c = model.config
    experts = 4 * sum(weights.weight.numel() for i, layer in enumerate(model.layers) if i not in c.dense_layers
                      for weights in (layer.feed_forward.w13, layer.feed_forward.w2))
    rest = 4 * sum(p.numel() for p in model.parameters()) - experts - 4 * model.tok_embeddings.weight.numel()
    for n_row, share in (1, n_active / 8), (2, 2 * n_active / 8), (4, 1), (26, 1):
        assert bench.step_bytes(model, n_row, 0) == rest + share * experts + 4 * n_row * c.dim


def test_what_is_compared_takes_turns():
    order = []
    times = timing.interleave({name: lambda name=name: order.append(name) for name in "ab"}, 3, torch.device("cpu"))
    assert "".join(order) == "ab" + 3 * "ab"  # a round that is not kept first
    assert [len(values) for values in times.values()] == [3, 3]


def test_bench_of_a_checkpoint_writes_its_report(tmp_path, short):
    folder, _ = tiny("gqa", tmp_path / "model", max_position_embeddings=256)
    report = run("--checkpoint", folder, "--rows", 1, 4, "--slots", 128, 250, "--new-tokens", 4,
                 file=tmp_path / "report.json")
    assert {"parameters", "bandwidth", "load_seconds", "first_step_seconds", "compile_seconds", "steps", "prefill",
            "decode", "plain"} <= report.keys()
    for part in "target pass", "attention alone":
        assert [(row["rows"], row["used_slots"]) for row in report["steps"] if row["part"] == part] \
            == [(1, 128), (4, 128), (1, 250), (4, 250)]
    assert [(row["rows"], row["used_slots"], row["bytes"]) for row in report["steps"] if row["part"] == "LM head"] \
        == [(1, None, 2 * 96 * 64), (4, None, 2 * 96 * 64)]
    assert report["steps"][1]["bytes"] == 2 * 2 * 2 * 2 * 8 * 128     # bf16, layers, keys and values, heads, dim, slots
    bandwidth = report["bandwidth"]
    assert bandwidth["yardstick"] == "read"
    assert bandwidth["bytes_per_second"] == bandwidth["read_bytes_per_second"] > 1e8
    for row in report["steps"]:
        assert ordered(row)
        assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["ms_median"] * 1e3)
        assert row["bandwidth_share"] == pytest.approx(row["bytes_per_second"] / bandwidth["bytes_per_second"])
    assert report["steps"][0]["relative_to_one_row"] == 1
    assert report["prefill"]["tokens"] == 40 and ordered(report["prefill"])
    assert report["decode"]["new_tokens"] == 4 and report["decode"]["tokens_per_second_median"] > 0
    weights = report["steps"][0]["bytes"] - report["steps"][1]["bytes"]     # a pass without its cache
    assert report["decode"]["tokens_per_sweep"] == pytest.approx(
        report["decode"]["tokens_per_second_median"] * weights / bandwidth["bytes_per_second"])
    assert report["plain"]["ms_host_gap"] == report["plain"]["ms_wall_per_step"] - report["plain"]["ms_whole_step"]


def test_the_eagle_step_is_timed_by_parts_and_as_a_whole(tmp_path, short, monkeypatch):
    folder, _ = tiny("gqa", tmp_path / "model", max_position_embeddings=256)
    for module in bench, timing:
        monkeypatch.setattr(module, "elapsed", lambda run, device: (run(), 0.25)[1])     # seconds
    report = run("--checkpoint", folder, "--rows", 1, "--slots", 64, "--trees", "chain:2", "static",
                 "--draft-vocab", 32, "--new-tokens", 4, file=tmp_path / "report.json")
    parts = ["grow", "verify", "ingest", "accept + commit + ingest", "draft LM head", "one draft level", "whole step"]
    assert [row["part"] for row in report["steps"]] == ["target pass", "attention alone", "LM head", *(
        f"{tree}: {part}" for tree in ("chain:2", "static") for part in parts)]
    for row in report["eagle"]:
        assert row["ms_whole_step"] == 250 and row["relative_to_plain_step"] == 1
        assert row["ms_host_gap"] == row["ms_wall_per_step"] - 250 and row["ms_wall_per_step"] > 0
    # ingest, the first LM head, the further levels and the verification are the models'; each took 250 ms here
    assert [row["outside_models_share"] * row["ms_wall_per_step"] for row in report["eagle"]] == pytest.approx(
        [row["ms_wall_per_step"] - 250 * (3 + depth - 1) for row, depth in zip(report["eagle"], (2, 5))])
    by_part = {row["part"]: row["bytes"] for row in report["steps"]}
    assert by_part["chain:2: draft LM head"] == 2 * 32 * 64
    assert by_part["chain:2: whole step"] == sum(by_part[f"chain:2: {part}"] for part in ("ingest", "grow", "verify"))


def test_a_copied_branch_is_timed_beside_the_step_without_it(tmp_path, short, monkeypatch, capsys):
    folder, _ = tiny("gqa", tmp_path / "model", max_position_embeddings=256)
    seconds, longest = iter(range(1, 1000)), []
    for module in bench, timing:
        monkeypatch.setattr(module, "elapsed", lambda run, device: (run(), next(seconds))[1])
    look_up = CopyBranch.look_up
    monkeypatch.setattr(CopyBranch, "look_up", lambda self, pos, n_slot: longest.append((int(pos), n_slot))
                        or look_up(self, pos, n_slot))
    (tmp_path / "tree.json").write_text(json.dumps({"paths": [[0], [0, 0], [1]], "copy": 3}))
    tree = str(tmp_path / "tree.json")
    options = "--checkpoint", folder, "--rows", 1, "--slots", 64, 128, "--trees", "chain:2", tree, "--new-tokens", 4
    for copy, copied in (((), {tree: 3}), (("--copy", 5), {"chain:2": 5, tree: 5}), (("--copy", "off"), {})):
        report = run(*options, *copy, file=tmp_path / "report.json")
        rows = {(row["part"], row["used_slots"]): row for row in report["steps"]}
        assert {name.partition(":")[0] for name, _ in rows if "lookup" in name} == ({"lookup"} if copied else set())
        keys = "tree", "n_copy", "used_slots", "step_used_slots"
        assert [tuple(row[key] for key in keys) for row in report["copying"]] == [
            (name, n, used, min(used, 128)) for name, n in copied.items() for used in (64, 128, 4096)]
        for row in report["copying"]:
            lookup = rows["lookup", row["used_slots"]]
            steps = {part: rows[f"{row['tree']}: {part}", row["step_used_slots"]]
                     for part in ("whole step", "whole step, nothing found", "whole step, copying")}
            assert row["ms_lookup"] == lookup["ms_median"] and lookup["rows"] == max(copied.values())
            assert [row[key] for key in ("ms_whole_step", "ms_no_match", "ms_copying")] == [
                step["ms_median"] for step in steps.values()]
            assert row["lookup_share"] == row["ms_lookup"] / row["ms_no_match"]
            n_node = 3 if row["tree"] == "chain:2" else 4
            assert [step["rows"] for step in steps.values()] == [n_node, n_node, n_node + row["n_copy"]]
        assert ("tokens of history" in capsys.readouterr().out) == bool(copied)
    assert max(longest) == (4094, 4096)     # all of a history of that length


def test_quantised_random_weights_are_timed_and_counted_as_they_are_stored(tmp_path, short, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = "--shape", "tiny", "--rows", 1, "--slots", 64, "--new-tokens", 4
    plain = run(*options, file=tmp_path / "plain.json")
    linears = 2 * (3 * 64 * 64 + 64 * 64 + 3 * 64 * 128)        # of two layers: wqkv, wo, w13 and w2
    for mode, bits, group_bytes in (("int8", 8, 2), ("int4", 4, 4)):
        sizes = ["--group-size", 64] if mode == "int4" else []
        report = run(*options, "--mode", mode, *sizes, file=tmp_path / "report.json")
        groups = 2 * (3 * 64 + 64 + 2 * 128 + 64 * (1 if mode == "int8" else 2))
        saved = linears * (2 - bits / 8) - groups * group_bytes
        assert report["mode"] == mode and report["parameters"] == plain["parameters"]
        assert plain["steps"][0]["bytes"] - report["steps"][0]["bytes"] == saved


def test_a_quantised_lm_head_is_counted_as_it_is_stored():
    model = bench.meta_model(bench.TINY, torch.bfloat16, {"mode": "int4", "group_size": 32, "lm_head": "int8"})
    c = model.config
    assert bench.lm_head_bytes(model) == c.vocab_size * (c.dim + 2)     # and a scale for each row
    assert bench.lm_head_bytes(bench.meta_model(c, torch.bfloat16)) == 2 * c.vocab_size * c.dim


def test_bench_of_a_shape_builds_random_weights(tmp_path, short, monkeypatch):
    tiny_moe = shapes.shape(32, 2, 4, 2, 56, 96, 128, model_type="mixtral", n_expert=8, n_expert_active=2)
    monkeypatch.setattr(bench, "TINY", tiny_moe)
    report = run("--shape", "tiny", "--rows", 1, 16, "--dtype", "float32", "--new-tokens", 4,
                 file=tmp_path / "report.json")
    assert report["random_weights"] and report["model"] == "tiny"
    passes = [row for row in report["steps"] if row["part"] == "target pass"]
    assert [row["used_slots"] for row in passes] == [128, 128]  # of the default ones, those in its context

    model = bench.random_model(tiny_moe, torch.device("cpu"), torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.inv_freq.dtype == torch.float32
    logits, _ = model(torch.tensor([[1, 2, 3]]), torch.arange(3))
    assert logits.isfinite().all() and logits.std() > 0


@pytest.mark.parametrize("argv, message", [
    (["--shape", "llama-9"], "invalid choice: 'llama-9'"),
    ([], "--checkpoint --shape"),
    (["--shape", "smollm2-135m", "--rows", "0"], "'0'"),
    (["--shape", "vicuna-33b", "--slots", "4096"], "beyond the model's context of 2048"),
    (["--shape", "smollm2-135m", "--slots", "32"], "60 rows do not fit in 32 used slots"),
    (["--shape", "smollm2-135m", "--trees", "static", "--slots", "27", "--rows", "1"], "static does not fit in 27"),
    (["--shape", "smollm2-135m", "--trees", "bush"], "bush"),
    (["--checkpoint", "no/such/folder"], "no such folder"),
    (["--shape", "tiny", "--new-tokens", "4096"], "beyond the model's context of 4096"),
    (["--shape", "tiny", "--trees", "static", "--simulate-accept", "7"], "7 is not within 1 and 6"),
    (["--shape", "tiny", "--trees", "static", "--simulate-accept", "x.json"], "x.json: neither a number nor a file"),
    (["--shape", "tiny", "--trees", "static", "--simulate-accept", "2", "3"], "one for each of them"),
    (["--shape", "tiny", "--simulate-accept", "2"], "needs --trees"),
    (["--shape", "tiny", "--copy", "8"], "--copy needs --trees"),
    (["--shape", "smollm2-135m", "--trees", "static", "--slots", "34", "--rows", "1", "--copy", "8"], "fit in 34"),
    (["--shape", "smollm2-135m", "--json", "/no/such/folder/x.json"], "not a file in an existing folder"),
    (["--shape", "smollm2-135m", "--device", "abacus"], "--device abacus"),
    (["--shape", "smollm2-135m", "--device", "meta"], "--device meta: it holds no values"),
])
def test_a_users_mistake_is_one_line_and_status_2(argv, message, capsys):
    try:
        status = bench.main(bench.parse_args(argv))
    except SystemExit as exit:
        status = exit.code
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and len(lines) == 1
    assert lines[0].startswith("error: ") and message in lines[0]


def test_a_model_too_large_for_the_device_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(bench.os, "sysconf", lambda name: 1 << 17)  # 2**34 bytes
    assert bench.main(bench.parse_args(["--shape", "llama-2-70b", "--device", "cpu"])) == 2
    assert "the weights take 138 GB; cpu has 17 GB" in capsys.readouterr().err


# Replayed accepted lengths


@pytest.mark.parametrize("spec, most", [("3.62", 6), ("4.7", 7), ("1", 2), ("6", 6), ("1.001", 6)])
def test_a_mean_becomes_lengths_with_that_mean_everywhere(spec, most):
    lengths = simulate.accept_lengths(spec, most)
    assert sum(lengths) / len(lengths) == pytest.approx(float(spec), abs=1e-9)
    assert set(lengths) <= set(range(1, most + 1)) and max(lengths) - min(lengths) <= 1
    for start in range(0, 970):     # evenly: a short generation has the mean too
        assert abs(sum(lengths[start:start + 30]) / 30 - float(spec)) < 0.1


def test_the_lengths_of_a_run_are_replayed_as_often_as_they_came(tmp_path):
    one, lines = tmp_path / "generate.json", tmp_path / "answers.jsonl"
    one.write_text(json.dumps({"new_tokens": [9], "accept_lengths": [[1, 5, 3], [2, 2]]}, indent=1))
    answers = [{"question_id": n, "choices": [{"accept_lengths": [[n], [4, 4]]}]} for n in (1, 2)]
    lines.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    assert sorted(simulate.accept_lengths(str(one), 5)) == [1, 2, 2, 3, 5]
    assert sorted(simulate.accept_lengths(str(lines), 5)) == [1, 2, 4, 4, 4, 4]


@pytest.mark.parametrize("text, message", [
    ("{", "neither JSON nor JSON lines"), ("{}", "no lists of positive integers"),
    ('{"accept_lengths": [[0]]}', "positive"), ('{"accept_lengths": [[1, 1]]}', "decoded plainly"),
    ('{"accept_lengths": [[2, 7]]}', "steps of 7 tokens"),
    ('{"accept_lengths": ["3"]}', "positive")])
def test_a_file_without_accepted_lengths_is_refused(tmp_path, text, message):
    file = tmp_path / "run.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        simulate.accept_lengths(str(file), 6)


@pytest.mark.parametrize("tree", [StaticTree.chain(4), StaticTree.paper(), DynamicTree(4, 4, 12)],
                         ids=["chain", "paper", "dynamic"])
def test_a_simulated_step_runs_in_full_and_produces_the_lengths_given(tree, monkeypatch):
    model = shapes.random_model(shapes.TINY, torch.device("cpu"), torch.float32)
    head = shapes.random_head(model)
    setup_caches(model, head, 1, 128)
    lengths = [3, 1, 5, 2]
    decoder = simulate.simulated_decoder(model, head, tree, lengths)
    passes, forward = [], Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda self, *args: passes.append(args[0].shape[1])
                        or forward(self, *args))
    first = decoder.generate([[1, 2, 3]], 14)
    assert first.accept_lengths == [[3, 1, 5, 2, 3]] and len(first.tokens[0]) == 14
    assert passes == [tree.n_node] * 6      # one to warm up, which took no turn
    assert decoder.eagle.pos.item() == 3 + 14 == 3 + sum(first.accept_lengths[0])
    second = decoder.generate([[1, 2, 3]], 9)
    assert second.accept_lengths == [[1, 5, 2]]     # goes on where the first ended


def test_simulated_generations_alternate_with_plain_ones_and_say_so(tmp_path, short, capsys):
    report = run("--shape", "tiny", "--rows", 1, "--slots", 128, "--trees", "chain:2", "static",
                 "--simulate-accept", "2.5", "--new-tokens", 24, file=tmp_path / "report.json")
    plain, *trees = report["simulated"]
    assert (plain["arm"], plain["simulated"]) == ("plain", False)
    assert [(row["arm"], row["simulated"], row["simulate_accept"]) for row in trees] \
        == [("chain:2", True, "2.5"), ("static", True, "2.5")]
    for row in trees:
        assert abs(row["mean_accept_length"] - 2.5) < 0.1
        assert row["speedup_min"] <= row["speedup_median"] <= row["speedup_max"]
        assert row["tokens_per_second_min"] <= row["tokens_per_second_median"] <= row["tokens_per_second_max"]
    assert "static, accepted lengths SIMULATED" in capsys.readouterr().out
