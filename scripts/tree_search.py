"""The draft tree and the copied branch that promise most along known answers, from what the parts of a step cost.

    answers = [Answer(ranks, right_copies(prompt, answer), loops(answer))]
    best, *others = search(accept, answers, costs, max_nodes=40)    # Candidate: rate, accept_length, paths, n_copy

scripts/tune_tree.py measures answers and costs. How many tokens of the branch (copy_branch.py) are right at a place
depends on the text before it alone, so that each answer is looked through once, for all trees and lengths.
"""
import heapq
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from copy_branch import N_GRAM
from train_loss import right_depths

COPY_LENGTHS = (0, 2, 3, 5, 8, 12, 16)      # of the copied branch; 0 is none
FINALISTS = 5   # pairs of tree and branch that answer the questions, and
ALONE = 2       # trees without a branch


class Answer(NamedTuple):
    """An answer of the target's, position by position from its first token on: that of the prefill."""
    ranks: list[tuple[int, ...]]    # of the tokens after this position, each among the head's guesses at its depth
    copied: list[int]               # right tokens of the longest branch: see `right_copies`
    is_looping: bool = False


class Candidate(NamedTuple):
    rate: float                 # tokens a millisecond, by the parts' costs
    accept_length: float
    paths: list[list[int]]
    n_copy: int                 # length of the copied branch


def right_copies(prompt: list[int], answer: list[int], longest: int = max(COPY_LENGTHS)) -> list[int]:
    """At each token of an answer, how many of the tokens that a branch behind it would copy are the answer's own; -1
    where nothing matches. As in CopyBranch.look_up the longest match wins, then the latest.
    """
    text, right = prompt + answer, []
    behind: dict[tuple[int, ...], int] = {}     # n-gram -> the place behind its latest occurrence so far
    for end in range(1, len(text) + 1):
        grams = [tuple(text[end - n:end]) for n in range(N_GRAM, 1, -1) if n <= end]
        place = next((behind[gram] for gram in grams if gram in behind), None)
        behind |= dict.fromkeys(grams, end)
        if end > len(prompt):
            # A copy that goes on in itself repeats the text's own tokens, as long as it is right.
            ahead = text[end:end + longest]
            right.append(-1 if place is None else count_same(text[place:place + longest], ahead))
    return right


def count_same(ours: list[int], theirs: list[int]) -> int:
    """How many tokens two lists have in common before they first differ."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs)))


def search(accept: list[list[float]], answers: list[Answer], costs: dict, max_nodes: int) -> list[Candidate]:
    """For each number of nodes and each length of the branch the tree that promises most, the most promising first.

    accept   a[d][r], by which nodes are ordered
    """
    best: dict[tuple[int, int], Candidate] = {}
    for depth in range(1, len(accept) + 1):
        paths = [path for _, path in best_nodes(accept[:depth], max_nodes)]
        for n in range(1, len(paths) + 1):
            if max(map(len, paths[:n])) < depth:
                continue                                                # a smaller depth has tried this tree
            for pair in foretell(paths[:n], answers, costs, COPY_LENGTHS):
                key = n, pair.n_copy
                if key not in best or pair.rate > best[key].rate:
                    best[key] = pair
    return sorted(best.values(), reverse=True)


def foretell(paths: list[list[int]], answers: list[Answer], costs: dict, lengths: tuple[int, ...]) -> list[Candidate]:
    """What a tree promises beside a copied branch of each of these lengths."""
    rows = sorted(costs["target_by_rows"])
    pass_ms = [costs["target_by_rows"][n] for n in rows]
    target = lambda n: float(np.interp(n, rows, pass_ms))               # linear between the measured numbers of rows
    draft = costs["first_level"] + (max(map(len, paths)) - 1) * costs["draft_level"]
    tree = set(map(tuple, paths))
    depths = [right_depths(tree, answer.ranks) for answer in answers]
    candidates = []
    for n_copy in lengths:
        steps = [step for depth, answer in zip(depths, answers) for step in steps_along(depth, answer.copied, n_copy)]
        n_token, n_beside = sum(n for n, _ in steps), sum(beside for _, beside in steps)
        ms = (len(steps) - n_beside) * (draft + target(1 + len(paths))
                                        + costs["rest_without_match" if n_copy else "rest"])
        if n_beside:
            ms += n_beside * (draft + target(1 + len(paths) + n_copy) + costs["rest_by_copy"][n_copy])
        candidates.append(Candidate(n_token / max(ms, 1e-9), n_token / max(len(steps), 1),
                                    sorted(paths, key=lambda p: (len(p), p)), n_copy))
    return candidates


def accept_lengths(tree: set[tuple[int, ...]], ranks: list[tuple[int, ...]], copied: list[int] | None = None,
                   n_copy: int = 0) -> list[int]:
    """Tokens of each step, the bonus among them, if an answer were decoded with this tree and a branch of n_copy.

    ranks: see train_loss.right_depths. A mean over all positions would promise too much: stretches that are easy to
    draft hold most positions, and take few steps.
    """
    return [n for n, _ in steps_along(right_depths(tree, ranks), copied or [-1] * len(ranks), n_copy)]


def steps_along(depths: list[int], copied: list[int], n_copy: int) -> Iterator[tuple[int, bool]]:
    """Tokens of each step, and whether the branch is beside the tree. The deeper of the two is taken."""
    i = 0
    while i < len(depths):
        n = 1 + max(depths[i], min(copied[i], n_copy))
        yield n, n_copy > 0 and copied[i] >= 0
        i += n


def best_nodes(accept: list[list[float]], count: int) -> list[tuple[float, list[int]]]:
    """The `count` most valuable nodes, best first, from a frontier of the nodes whose parent is taken."""
    frontier = [(-value, [rank]) for rank, value in enumerate(accept[0])]
    heapq.heapify(frontier)
    taken = []
    while frontier and len(taken) < count:
        value, path = heapq.heappop(frontier)
        taken.append((-value, path))
        if len(path) < len(accept):
            for rank, factor in enumerate(accept[len(path)]):
                heapq.heappush(frontier, (value * factor, [*path, rank]))
    return taken


def choose_finalists(candidates: list[Candidate]) -> list[Candidate]:
    """The most promising, at most two with the same number of nodes, and the best trees without a branch."""
    finalists, seen = [], Counter()
    for pair in candidates:
        seen[len(pair.paths)] += 1
        if seen[len(pair.paths)] <= 2 and len(finalists) < FINALISTS:
            finalists.append(pair)
    alone = [pair for pair in candidates if not pair.n_copy][:ALONE]
    return finalists + [pair for pair in alone if pair not in finalists]
