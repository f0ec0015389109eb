"""recorder.py: what is recorded of each step agrees with the answer, the target and the head, and changes neither."""
from dataclasses import replace

import pytest
import torch

from decoder import Decoder, setup_caches
from draft_tree import DynamicTree, StaticTree
from eagle_head import EagleHead
from eagle_step import EagleStep
from model import Transformer
from recorder import PARTS
from reference import naive_decode, tiny, tokens_of
from sampling import Sampling
from test_eagle_lossless import randomise

WIDE = StaticTree.from_paths([[0], [1], [2], [0, 0], [2, 0]])
TREES = {"chain": StaticTree.chain(3), "wide": WIDE, "wide and copies": replace(WIDE, n_copy=4),
         "dynamic": DynamicTree(3, 3, 8), "dynamic and copies": replace(DynamicTree(3, 3, 8), n_copy=4),
         "copies alone": replace(StaticTree.root(), n_copy=5)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A target over twelve tokens, which repeats itself now and then, and a random head."""
    folder, _ = tiny("gqa", tmp_path_factory.mktemp("narrow"), vocab_size=12)
    target = Transformer.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    head = EagleHead(replace(target.config, n_layer=1), target)
    randomise(head, 0.3)
    return target, head


def decode(pair, tree, *, record, traced, sampling=Sampling(), rows=1, n=90):
    """Decode `rows` prompts; a cache that is too short for the last trees ends in plain steps."""
    target, head = pair
    prompts = [tokens_of(9 + row, seed=row, vocab=12) for row in range(rows)]
    setup_caches(target, head, rows, 96)
    decoder = Decoder(target, rows, sampling, head=head if tree.depth else None, tree=tree, record=record)
    decoder.can_trace = traced and decoder.can_trace
    return prompts, decoder.generate(prompts, n, seed=3)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_recorded_steps_make_the_answer_and_do_not_change_it(pair, tree, temperature, traced):
    sampling = Sampling(temperature)
    _, plain = decode(pair, tree, record=False, traced=traced, sampling=sampling, rows=2)
    _, result = decode(pair, tree, record=True, traced=traced, sampling=sampling, rows=2)
    assert plain.steps == [[], []] and result.tokens == plain.tokens
    for row, steps in enumerate(result.steps):
        answer = result.tokens[row][:1] + [token for step in steps for token in step.tokens]
        assert answer[:len(result.tokens[row])] == result.tokens[row]
        assert [len(step.tokens) for step in steps] == result.accept_lengths[row]
        assert [step.n_copied for step in steps] == result.copied[row]
        assert [step.kind for step in steps] == result.kinds[:len(steps)]
        before = result.tokens[row][:1]
        for step in steps:
            if step.kind != "plain":
                assert step.nodes[0] == before[-1]                                  # the root was decided before
                assert [step.nodes[node] for node in step.accepted] == step.tokens[:-1]
                assert [step.parents[node] for node in step.accepted] == ([0, *step.accepted][:-1])
                assert (step.n_copied > 0) == any(node >= step.n_tree for node in step.accepted)
                assert step.n_tree == tree.n_node
                assert len(step.nodes) - step.n_tree in ((0, tree.n_copy) if step.kind == "copy" else (0,))
            before = step.tokens
    if tree.n_copy:     # a branch that found nothing is none, though the other row has one
        sizes = {(step.kind, len(step.nodes) - step.n_tree) for steps in result.steps for step in steps if step.nodes}
        assert sizes == {("tree", 0), ("copy", 0), ("copy", tree.n_copy)}
    kinds = {step.kind for steps in result.steps for step in steps}
    assert kinds == {"plain", "tree"} | ({"copy"} if tree.n_copy else set())


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_what_the_target_said_and_the_head_thought_is_what_they_compute(pair, tree, monkeypatch):
    """Said: by the naive decoder, after the whole path to a node. The head's probabilities: from its logits."""
    target, head = pair
    levels, drafted, grow = [], EagleHead.draft_logits, EagleStep.grow

    def watched_logits(head, hidden):
        logits = drafted(head, hidden)
        levels[-1].append(logits[0].softmax(-1))            # [n, V] of the n nodes that this level expands
        return logits

    monkeypatch.setattr(EagleHead, "draft_logits", watched_logits)
    monkeypatch.setattr(EagleStep, "grow", lambda step, n_slot: levels.append([]) or grow(step, n_slot))
    prompts, result = decode(pair, tree, record=True, traced=False, n=40)
    text = prompts[0] + result.tokens[0][:1]
    steps = [step for step in result.steps[0] if step.kind != "plain"]
    for step, of_step in list(zip(steps, levels[-len(steps):]))[:8]:    # before them: the warm-up's
        for node in range(len(step.nodes)):
            path, above = [], node
            while above:
                path, above = [step.nodes[above], *path], step.parents[above]
            assert step.said[node] == naive_decode(target, text + path, 1)[0]
            if node == 0 or node >= step.n_tree:
                assert step.probs[node] is None
            else:       # at depth 1 by the root's distribution, below it by one of its level's
                distributions = of_step[len(path) - 1]
                assert (distributions[:, step.nodes[node]] - step.probs[node]).abs().min() < 2e-4
        for parent in set(step.parents[1:step.n_tree]):
            siblings = [n for n in range(1, step.n_tree) if step.parents[n] == parent]
            assert len({step.nodes[n] for n in siblings}) == len(siblings)
            assert sum(step.probs[n] for n in siblings) < 1 + 1e-3
        text += step.tokens


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_the_parts_of_all_steps_make_up_the_decode_time(pair, traced):
    _, result = decode(pair, TREES["wide and copies"], record=True, traced=traced)
    total = sum(sum(step.seconds.values()) for step in result.steps[0])
    assert total == pytest.approx(result.timings["decode_seconds"], rel=0.05)
    steps = [step for step in result.steps[0] if step.kind != "plain"]
    assert all([*step.seconds] == [*PARTS, "host"] and min(step.seconds.values()) >= 0 for step in steps)
    assert len({step.seconds["verify"] for step in steps}) > len(steps) // 2        # not constants of a trace
    assert all([*step.seconds] == ["step"] for step in result.steps[0] if step.kind == "plain")
