"""copy_branch.py: the lookup against a slow one, and decoding with a copied branch against decoding without."""
import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

import test_eagle_lossless as lossless
from copy_branch import N_GRAM, CopyBranch
from decoder import Decoder, generate, setup_caches
from draft_tree import DynamicTree, StaticTree
from eagle_head import EagleHead
from eagle_step import EagleStep
from model import Transformer
from reference import naive_decode, tiny, tokens_of
from test_eagle_lossless import CUT, T1, V, chi_square_p, exact, randomise

TREES = {"chain": StaticTree.chain(3), "chain of one": StaticTree.chain(1), "paper": StaticTree.paper(),
         "wide": StaticTree.from_paths([[0], [1], [2], [0, 0], [2, 0]]), "dynamic": DynamicTree(3, 3, 8)}


# The lookup


def slow_lookup(tokens, length):
    """What followed the last tokens of a list the last time: the longest match, then the latest; None without one."""
    end = len(tokens)
    for n in range(N_GRAM, 1, -1):
        for place in range(end - 1, n - 1, -1):
            if end > n - 1 and tokens[place - n:place] == tokens[end - n:]:
                text = list(tokens)
                for k in range(length):
                    text.append(text[place + k])
                return text[end:]
    return None


@pytest.mark.parametrize("n_token", [2, 3, 5])
def test_the_lookup_on_the_device_equals_a_slow_one_row_by_row_and_over_turns(n_token):
    rng, found = random.Random(n_token), 0
    branch = CopyBranch(length=6, n_node=4, batch_size=3, n_slot=64, device=torch.device("cpu"), dtype=torch.float32)
    for _ in range(60):
        rows = [[rng.randrange(n_token) for _ in range(rng.randrange(1, 30))] for _ in range(3)]
        branch.begin(rows)
        for _ in range(4):
            pos = torch.tensor([[len(row) - 1] for row in rows])
            branch.look_up(pos, rng.choice([40, 64]) if max(map(len, rows)) < 40 else 64)
            for row, copied, is_there in zip(rows, branch.tokens.tolist(), branch.found[:, 0].tolist()):
                wanted = slow_lookup(row, 6)
                assert is_there == (wanted is not None) and (not is_there or copied == wanted), row
                found += is_there
            new = [[rng.randrange(n_token) for _ in range(5)] for _ in rows]
            kept = [rng.randrange(1, 6) for _ in rows]
            branch.extend(pos, torch.tensor(new))
            rows = [row + more[:n] for row, more, n in zip(rows, new, kept)]
    assert found > 200


# Greedy decoding


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A target over twelve tokens, which repeats itself now and then."""
    folder, _ = tiny("gqa", tmp_path_factory.mktemp("narrow"), vocab_size=12)
    return Transformer.from_pretrained(folder, dtype=torch.float32)


def head_of(target, seed):
    torch.manual_seed(seed)
    head = EagleHead(replace(target.config, n_layer=1), target)
    randomise(head, 0.3)
    return head


@pytest.mark.parametrize("seed", range(8))
def test_greedy_decoding_with_a_copied_branch_equals_plain_decoding(narrow, seed):
    """To the last slot of the cache, in batches and alone: 8 seeds x 6 trees x 3 lengths x 4 ways."""
    head = head_of(narrow, seed)
    prompts = [tokens_of(n, seed=10 * seed + n, vocab=12) for n in (1, 9, 5 + seed)]
    wanted = [naive_decode(narrow, prompt, 30) for prompt in prompts]
    longest, lengths, looked_up = max(map(len, prompts)) + 22, set(), []
    for tree, n_copy in itertools.product((None, *TREES.values()), (1, 3, 9)):
        for rows, n_slot in (([1], None), ([0, 1, 2], None), ([2], longest), ([0, 1, 2], longest)):
            result = generate(narrow, [prompts[row] for row in rows], 30, head=tree and head, tree=tree or "static",
                              copy=n_copy, max_seq_length=n_slot)
            for row, tokens in zip(rows, result.tokens):
                assert tokens == wanted[row][:30 if n_slot is None else n_slot - len(prompts[row])]
            lengths.update(n for row in result.accept_lengths for n in row)
            assert all(n in (0, length - 1) for copied, row in zip(result.copied, result.accept_lengths)
                       for n, length in zip(copied, row))
            looked_up += [n for row in result.copied for n in row if tree is None]
    assert 1 in lengths and max(lengths) > 2 and max(looked_up) > 1


def test_steps_are_as_long_as_the_slow_lookup_foretells(narrow):
    """With a head that drafts one token which never comes."""
    head, prompt = head_of(narrow, 0), tokens_of(6, seed=3, vocab=12)
    prompt = prompt + naive_decode(narrow, prompt, 40) + prompt
    wanted = naive_decode(narrow, prompt, 90)
    head.set_draft_vocab([next(token for token in range(12) if token not in wanted)])
    result = generate(narrow, [prompt], 80, head=head, tree="chain:1", copy=6)
    foretold, text = [], prompt + wanted[:1]
    while len(text) < len(prompt) + 80:
        copied, rest = slow_lookup(text, 6) or [], wanted[len(text) - len(prompt):]
        n = next((n for n, (ours, theirs) in enumerate(zip(copied, rest)) if ours != theirs), len(copied))
        foretold.append(n + 1)
        text += rest[:n + 1]
    assert result.tokens == [wanted[:80]] and result.accept_lengths == [foretold]
    assert max(foretold) > 3 and foretold.count(1) > 2


def test_a_kept_decoder_forgets_the_last_text_and_traces_the_branch(narrow):
    head = head_of(narrow, 1)
    setup_caches(narrow, head, 1, 160)
    decoder = Decoder(narrow, 1, head=head, tree=replace(TREES["wide"], n_copy=4))
    prompts = [tokens_of(9, seed=n, vocab=12) for n in range(3)]
    for prompt in prompts + prompts[:1]:
        result = decoder.generate([prompt], 100)
        assert decoder.traces.keys() == {"tree", "copy"}
        fresh = generate(narrow, [prompt], 100, head=head, tree=TREES["wide"], copy=4, max_seq_length=160)
        assert result.tokens == fresh.tokens and result.accept_lengths == fresh.accept_lengths


def test_a_second_turn_looks_up_the_whole_conversation(narrow):
    head = head_of(narrow, 2)
    setup_caches(narrow, head, 1, 200)
    decoder = Decoder(narrow, 1, head=head, tree=replace(TREES["wide"], n_copy=5))
    prompt = tokens_of(20, seed=5, vocab=12)
    answer = decoder.generate([prompt], 30).tokens[0]
    again = prompt + answer + prompt[:15]
    result = decoder.generate([again], 40, n_cached=len(prompt + answer) - 1)
    fresh = generate(narrow, [again], 40, head=head, tree=TREES["wide"], copy=5, max_seq_length=200)
    assert result.tokens == fresh.tokens and result.accept_lengths == fresh.accept_lengths


# Sampling: the joint distribution of the first three tokens against the exact one


@pytest.fixture(scope="module")
def small():
    with torch.no_grad():
        torch.manual_seed(5)
        target = Transformer(lossless.ModelArgs(
            model_type="llama", dim=8, n_layer=1, n_head=1, n_kv_head=1, head_dim=8, vocab_size=V,
            intermediate_size=8, block_size=64, norm_eps=1e-5, rope_theta=100.0))
        randomise(target, 0.5)
        head = EagleHead(target.config, target)
        randomise(head, 0.5)
        return target, head


def first_three(target, head, tree, sampling, draw_drafts, prompt, rows, runs):
    """As in test_eagle_lossless, with a copied branch. Also in how many steps of rows the branch was right beyond the
    tree, and began with a token of the head's, and with another one."""
    n_slot = len(prompt) + 3 + tree.n_room
    setup_caches(target, head, rows, n_slot)
    step = EagleStep(target, head, tree, rows, sampling, draw_drafts)
    seen, graft = Counter(), step.branch.graft

    def counted(draft):
        draft = graft(draft)
        has_twin = draft.copied.twin.any(1)
        seen.update(twin=int(has_twin.sum()), other=int((~has_twin & step.branch.found[:, 0]).sum()))
        return draft
    step.branch.graft = counted

    def run():
        step(n_slot, copies=True)
        seen["deep"] += int(((step.produced >= 0).sum(1) > tree.depth + 1).sum())
    return lossless.count_triples(step, run, prompt, runs), seen


def prompt_with_every_pair(seed):
    """It ends with 11. Whatever token comes next, it has followed an 11 before."""
    follows = [random.Random(seed).randrange(V) for _ in range(V)]
    return [token for first in range(V) for token in (11, first, follows[first])] + [3, 11]


@pytest.mark.parametrize("tree", [StaticTree.root(), StaticTree.chain(1), TREES["wide"], DynamicTree(2, 2, 4)],
                         ids=["no head", "chain", "wide", "dynamic"])
@pytest.mark.parametrize("sampling", [T1, CUT], ids=["T 1", "top-k, top-p"])
@pytest.mark.parametrize("draw_drafts", [False, True], ids=["likeliest", "drawn"])
@torch.inference_mode()
def test_sampling_with_a_copied_branch_has_the_distribution_of_plain_sampling(small, monkeypatch, tree, sampling,
                                                                             draw_drafts):
    """The copied token is one that the head drafts too, or one that it does not."""
    if draw_drafts and (isinstance(tree, DynamicTree) or tree.depth == 0):
        pytest.skip("drafts of a dynamic tree are not drawn")
    target, head = small
    all_seen = Counter()
    for seed in range(2):
        prompt = prompt_with_every_pair(seed)
        monkeypatch.setattr(lossless, "PROMPT", prompt)
        counts, seen = first_three(target, head if tree.depth else None, replace(tree, n_copy=3), sampling, draw_drafts,
                                   prompt, rows=4000, runs=2)
        assert chi_square_p(counts, exact(target, sampling)) > 1e-4, seed
        all_seen += seen
    assert all_seen["deep"] > 2 and all_seen["other"] > 1000 and (tree.depth == 0 or all_seen["twin"] > 20)


@pytest.mark.parametrize("tree", [None, *TREES.values()], ids=["no head", *TREES])
def test_without_a_match_a_step_at_a_temperature_is_the_one_without_a_branch(narrow, tree):
    """The same draws: until something matches, the texts are equal."""
    head, prompt = head_of(narrow, 3), tokens_of(1, seed=1, vocab=12)
    for draw_drafts in (None, False):
        found = [generate(narrow, [prompt], 40, head=tree and head, tree=tree or "static", copy=copy, temperature=1.0,
                          seed=seed, draw_drafts=draw_drafts) for seed in range(5) for copy in (4, 0)]
        for branch, bare in zip(found[::2], found[1::2]):
            n = branch.kinds.index("copy")
            assert 0 < n and branch.accept_lengths[0][:n] == bare.accept_lengths[0][:n]
            same = 1 + sum(bare.accept_lengths[0][:n])
            assert branch.tokens[0][:same] == bare.tokens[0][:same]


@torch.inference_mode()
def test_a_token_that_head_and_copy_both_draft_leads_into_the_copied_branch(small):
    target, head = small
    setup_caches(target, head, 1, 32)
    for draw_drafts, tree in ((False, StaticTree.chain(1)), (True, StaticTree.from_paths([[r] for r in range(V)]))):
        used = 0
        for x in range(V) if not draw_drafts else (0, 5):
            step = EagleStep(target, head, replace(tree, n_copy=3), 1, T1, draw_drafts)
            step.prefill([[3, 11, x, 6, 3, 11]])
            step.branch.tokens.copy_(torch.tensor([[x, 6, 3]]))     # whatever the prefill's token has found
            step.branch.found.fill_(True)
            draft = step.branch.graft(step.grow(32))
            has_twin = bool((draft.tokens[0, 1:tree.n_node] == x).any())
            assert bool(draft.copied.twin.any()) == has_twin == bool(draft.copied.is_idle.any())
            if not has_twin:
                continue
            used += 1
            logits = torch.full((1, tree.n_node + 3, V), -20.0)
            for node, token in ((0, x), (tree.n_node, 6), (tree.n_node + 1, 3), (tree.n_node + 2, 0)):
                logits[0, node, token] = 20.0       # the target goes where the copy went
            accepted = step.accept(logits, draft)
            assert accepted.n_accepted.item() == 3 and accepted.bonus.item() == 0
            assert accepted.path[0, 1:4].tolist() == [tree.n_node, tree.n_node + 1, tree.n_node + 2]
        assert used
