"""How often runtime.py compiles a layer. A cold start waits for each graph, so there must be none too many."""
import functools

import torch
from torch import nn

from generate import generate
from model import Transformer
from reference import tiny, tokens_of
from test_eagle_lossless import head_of


def test_layers_are_compiled_once_for_a_row_and_once_for_blocks(monkeypatch, tmp_path):
    """Plain, then with the paper's tree. Attention reads two sizes of the cache, the second up to its end."""
    graphs, compile = [], nn.Module.compile
    run_as_it_is = lambda graph, inputs: graphs.append(graph) or graph      # no compiler's kernels
    monkeypatch.setattr(nn.Module, "compile", lambda self, options: compile(self, backend=run_as_it_is))
    folder, _ = tiny("gqa", tmp_path / "m")
    model = Transformer.from_pretrained(folder, dtype=torch.float32)
    head, prompt = head_of(model), tokens_of(120)
    answer = functools.partial(generate, model, [prompt], 20, max_seq_length=160, tree="static")
    plain = answer().tokens
    head.tell([prompt + plain[0]])
    torch._dynamo.reset()
    # One row of the target's.
    assert answer(compile=True).tokens == plain and len(graphs) == 1
    # A block of the target's; a row and a block of the head's. Levels have 1, 3 or 4 inner nodes, ingestion takes 6
    # pairs.
    result = answer(compile=True, head=head)
    assert result.tokens == plain and len(graphs) == 4
    assert min(result.accept_lengths[0]) == 1 and max(result.accept_lengths[0]) > 1     # the last by plain steps
    torch._dynamo.reset()
