"""train_data.py: what of a data file is learnt, and what is left out under which name.

    python -m pytest tests/test_train_data.py -q
"""
import json

import pytest

from reference import write_checkpoint
from tokenizer import Tokenizer
from train_data import answer_text, chat_of, encode_answers, examples_of, read_dialogues

DIALOGUE = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": " jumps over"},
            {"role": "user", "content": "and then"}, {"role": "assistant", "content": "the dogs sleep"}]

# As reasoning models have it: the last answer begins with its reasoning, empty if need be; earlier ones lose theirs.
REASONER = """{%- set at = namespace(user=0) -%}
{%- for m in messages %}{% if m.role == "user" %}{% set at.user = loop.index0 %}{% endif %}{% endfor -%}
{%- if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif -%}
{%- for m in messages -%}
    {%- set text = m.content.split("</think>")[-1].lstrip("\n") -%}
    {%- set thought = m.reasoning_content or m.content.split("</think>")[0].split("<think>")[-1].strip("\n")
        if m.reasoning_content or "</think>" in m.content else "" -%}
    {{- "<|" + m.role + "|>\n" -}}
    {%- if m.role == "assistant" and loop.index0 > at.user %}{{ "<think>\n" + thought + "\n</think>\n\n" }}{% endif -%}
    {{- text + "<|end|>\n" -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ "<|assistant|>\n" }}{% endif -%}"""

# The prompt opens the block, and what is rendered of an answer has none.
OPENER = """{%- for m in messages -%}
    {{- "<|" + m.role + "|>" + m.content.split("</think>")[-1] + "<|end|>" -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ "<|assistant|><think>\n" }}{% endif -%}"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Not to be written into."""
    return write_checkpoint(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def tokenizers(checkpoint):
    return {name: Tokenizer.from_pretrained(checkpoint, chat_template=template)
            for name, template in (("plain", None), ("reasoner", REASONER), ("opener", OPENER), ("vicuna", "vicuna"))}


@pytest.fixture
def read(tokenizers, tmp_path):
    """read(entries or the file's bytes) -> ([(text of all, text that is learnt)], the report, the dialogues)."""

    def read(content, template="plain", max_length=512):
        file, report = tmp_path / "data.jsonl", []
        if not isinstance(content, bytes):
            content = "".join(json.dumps(entry) + "\n" for entry in content).encode()
        file.write_bytes(content)
        dialogues = read_dialogues(file, tokenizers[template], 10 ** 6, max_length, report.append)
        token = tokenizers["plain"]._backend._tokenizer.id_to_token
        show = lambda ids: "".join(map(token, ids)).replace("\u0120", " ").replace("\u010a", "\n")
        texts = [(show(d.tokens.tolist()), show(d.tokens[d.loss_mask].tolist())) for d in dialogues]
        return texts, report[0], dialogues

    return read


def turns(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


# What is learnt


@pytest.mark.parametrize("template", [None, "vicuna", "llama2", "mixtral"])
def test_the_mask_is_what_the_target_would_say_after_each_prompt(checkpoint, template):
    tokenizer = Tokenizer.from_pretrained(checkpoint, chat_template=template)
    (ids, loss_mask), = examples_of(tokenizer, chat_of({"messages": DIALOGUE}), 512)
    runs, n = [], 0
    while n < len(ids):
        end = next((i for i in range(n, len(ids)) if loss_mask[i] != loss_mask[n]), len(ids))
        runs.append((loss_mask[n], n, end))
        n = end
    answers = [(begin, end) for said, begin, end in runs if said]
    assert len(answers) == 2
    for (begin, end), turn in zip(answers, (1, 3)):
        said = [i for i in ids[begin:end] if i not in tokenizer.stop_ids]
        # this tokenizer has no token for the end that the other templates write
        assert tokenizer.decode(said).removesuffix("</s>").strip() == DIALOGUE[turn]["content"].strip()
        prompt = tokenizer.apply_chat_template(DIALOGUE[:turn])
        assert tokenizer.decode(ids[:begin]).rstrip() == tokenizer.decode(prompt).rstrip()
        if template is None:
            assert ids[:begin] == prompt and ids[end - 1] in tokenizer.stop_ids


def test_a_template_that_words_earlier_turns_anew_gives_an_example_for_each_answer(read):
    system = {"role": "system", "content": "Be brief."}
    entry = {"messages": [system, *turns("the fox", "jumps", "and then", "sleeps", "why", "it is lazy")]}
    texts, report, _ = read([entry, {"messages": turns("the fox", "jumps")}], "reasoner")
    empty = "<think>\n\n</think>\n\n"
    answers = "jumps", "sleeps", "it is lazy", "jumps"
    assert [said for _, said in texts] == [empty + answer + "<|end|>" for answer in answers]
    assert texts[2][0] == (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nthe fox<|end|>\n<|assistant|>\njumps<|end|>\n"
        "<|user|>\nand then<|end|>\n"
        f"<|assistant|>\nsleeps<|end|>\n<|user|>\nwhy<|end|>\n<|assistant|>\n{empty}it is lazy<|end|>")
    assert "2 dialogues (4 examples), " in report and "left out" not in report
    texts, report, _ = read([entry])
    assert len(texts) == 1 and texts[0][1] == "jumps<|end|>sleeps<|end|>it is lazy<|end|>" and "examples" not in report


@pytest.mark.parametrize("template, text, said", [
    ("plain", "seven lamps", "seven lamps"),
    ("plain", "caf\u00e9 \ufffd", "caf\u00c3\u00a9 "),                       # cut inside a character
    ("vicuna", "seven lamps", " seven lamps"),
    ("reasoner", "<think>\nseven lamps", "<think>\nseven lamps"),
    ("reasoner", "<think>\nseven\n</think>\n\nlamps", "<think>\nseven\n</think>\n\nlamps"),
    ("reasoner", "<think>\nseven\n</think>", "<think>\nseven\n</think>"),
    ("opener", "seven lamps", "seven lamps")])
def test_an_answer_cut_at_the_length_limit_is_learnt_as_it_is_and_not_to_end_there(read, tokenizers, template, text,
                                                                                   said):
    entry = {"messages": turns("the fox", "jumps", "q", text), "finish_reason": "length"}
    texts, _, dialogues = read([entry], template)
    prompt = tokenizers[template].apply_chat_template(turns("the fox", "jumps", "q"))
    tokens, loss_mask = dialogues[-1].tokens.tolist(), dialogues[-1].loss_mask.tolist()
    assert tokens[:len(prompt)] == prompt and all(loss_mask[len(prompt):])
    assert texts[-1][1].endswith(said) and tokens[-1] not in tokenizers[template].stop_ids


def test_an_answer_behind_a_prompt_that_opens_its_reasoning_is_learnt_behind_that_prompt(read):
    texts, _, _ = read([{"messages": turns("q", "seven\n</think>\nlamps", "why", "so</think>it is")}], "opener")
    assert [said for _, said in texts] == ["seven\n</think>\nlamps<|end|>", "so</think>it is<|end|>"]
    assert texts[1][0] == ("<|user|>q<|end|><|assistant|>\nlamps<|end|><|user|>why<|end|>"
                           "<|assistant|><think>\nso</think>it is<|end|>")


def test_the_ids_that_the_target_generated_are_learnt_as_they_are(read, tokenizers):
    """A target may spell a text in other tokens than its tokenizer, and leave a character half said."""
    tok = tokenizers["plain"]
    bytewise = [i for letter in "the fox" for i in tok.encode(letter)]
    end, half = tok.encode("<|end|>"), tok.encode("\U0001f600")[:2]
    assert bytewise != tok.encode("the fox")
    entry = {"messages": turns("q", "the fox", "why", "the dog"), "finish_reason": "length",
             "tokens": [bytewise + end, tok.encode("the dog ") + half]}
    for template, n_example in (("plain", 2), ("reasoner", 2)):
        _, report, dialogues = read([entry], template)
        assert len(dialogues) == n_example and "anew" not in report
        for dialogue, n, ids in zip(dialogues, (1, 3), entry["tokens"]):
            prompt = tokenizers[template].apply_chat_template(entry["messages"][:n])
            assert dialogue.tokens.tolist() == prompt + ids
            assert dialogue.loss_mask.tolist() == [False] * len(prompt) + [True] * len(ids)
    entry["tokens"][0] = tok.encode("the fox") + end                    # as the tokenizer spells it: one example
    (_, said), = read([entry])[0]
    assert said.startswith("the fox<|end|>the dog ")
    entry["tokens"][0] = tok.encode("another text") + end               # edited since, or another tokenizer's
    texts, report, _ = read([entry])
    assert texts[0][1].startswith("the fox<|end|>")
    assert "1 answers encoded anew: their ids do not say their text" in report
    for tokens in (123, [[1], [2], [3]], [[], []], ["a", "b"]):         # of somebody else's format
        texts, report, _ = read([{"messages": turns("q", "the fox", "why", "the dog"), "tokens": tokens}])
        assert texts[0][1] == "the fox<|end|>the dog<|end|>" and "anew" not in report


def test_half_a_character_at_the_length_limit_is_left_off(tokenizers):
    tok = tokenizers["plain"]
    ids = tok.encode("hi \U0001f600")
    assert answer_text(tok, ids) == "hi \U0001f600" and answer_text(tok, ids[:-1]) == answer_text(tok, ids[:-3]) == "hi"
    assert answer_text(tok, ids[:-1] + [min(tok.stop_ids)]) == "hi \ufffd"


@pytest.mark.parametrize("template", ["plain", "reasoner", "opener", "vicuna"])
def test_encoding_piece_by_piece_gives_what_encoding_the_whole_gives(tokenizers, template):
    texts = "the fox", " jumps\n", "\n\nand then ", "the dogs  sleep", "x", "caf\u00e9 <|end|> quick"
    chat = chat_of({"messages": turns(*texts)})
    tok = tokenizers[template]
    whole = encode_answers(tok, chat, [1, 3, 5], 512, False, {})
    assert encode_answers(tok, chat, [1, 3, 5], 512, True, {}) == whole


def test_where_tokens_of_two_turns_merge_the_whole_is_encoded(checkpoint):
    glued = Tokenizer.from_pretrained(checkpoint, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    chat = chat_of({"messages": turns("the", " quick ", "brown fox", " jumps")})
    assert glued.encode("the quick ") + glued.encode("brown fox") != glued.encode("the quick brown fox")
    whole = encode_answers(glued, chat, [1, 3], 512, False, {})
    assert encode_answers(glued, chat, [1, 3], 512, True, {}) == whole


def test_work_grows_with_the_length_of_a_dialogue_and_not_with_its_square(tokenizers, monkeypatch):
    tok, encoded = tokenizers["plain"], []
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode",
                        lambda self, text, **k: encoded.append(len(text)) or encode(self, text, **k))
    messages = turns(*["the quick brown fox jumps over the lazy dog"] * 80)
    (tokens, loss_mask), = examples_of(tok, chat_of({"messages": messages}), 10 ** 6)
    whole = tok.render_chat(messages, False)
    assert tokens == encode(tok, whole) and sum(encoded) < 5 * len(whole)
    renders = []
    render = Tokenizer.render_chat
    monkeypatch.setattr(Tokenizer, "render_chat", lambda *a, **k: renders.append(1) or render(*a, **k))
    examples_of(tok, chat_of({"messages": messages}), 100)
    assert len(renders) < 20                                            # what lies beyond the length is not looked at


# What a line may hold


THOUGHT = {"role": "assistant", "reasoning_content": "paper then glass", "content": "stone lamp"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def test_reasoning_tools_and_a_system_message_beside_the_dialogue_reach_the_template(read):
    q = {"role": "user", "content": "q"}
    texts, report, _ = read([{"messages": [q, THOUGHT]}], "reasoner")
    assert texts[0][1] == "<think>\npaper then glass\n</think>\n\nstone lamp<|end|>" and "left out" not in report
    for tools in (TOOLS, json.dumps(TOOLS)):
        texts, report, _ = read([{"messages": turns("q", "a"), "tools": tools}], "reasoner")
        assert texts[0][0].startswith("<|system|>[{") and "weather" in texts[0][0] and "left out" not in report
    for key in ("system", "system_prompt"):
        texts, _, _ = read([{key: "You are a lighthouse keeper.", "conversations": [
            {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}])
        assert texts[0][0] == "<|system|>You are a lighthouse keeper.<|end|><|user|>q<|end|><|assistant|>a<|end|>"
    said_twice = {"system": "S", "messages": [{"role": "system", "content": "S"}, *turns("q", "a")]}
    assert read([said_twice])[0][0][0].count("<|system|>S") == 1


def test_what_the_template_leaves_out_is_never_learnt_as_if_it_were_not_there(read):
    good, q = {"messages": turns("q", "a")}, {"role": "user", "content": "q"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]}
    nothing = {"role": "assistant", "content": "a", "tool_calls": None, "reasoning_content": ""}
    _, report, dialogues = read([good, {"messages": [q, THOUGHT]}, good | {"tools": TOOLS}, {"messages": [q, call]},
                                 good | {"tools": "{"},
                                 {"messages": [q, {"role": "assistant", "thinking": "hm", "content": "a"}]},
                                 {"messages": [q, nothing], "tools": []}])
    assert [d.line for d in dialogues] == [1, 7] and "2 dialogues, " in report
    for name in ("2 with reasoning that the chat template leaves out (line 2; line 6)",
                 "1 with tools that the chat template leaves out (line 3)",
                 "1 with tool calls that the chat template leaves out (line 4)",
                 "1 with tools that are not JSON (line 5: "):
        assert name in report, report


def test_all_ways_to_write_a_dialogue_say_the_same(read):
    part = lambda text: [{"type": "text", "text": text}]
    said = {"user": "q", "assistant": "a"}
    ways = [{"messages": turns("q", "a")}, {"conversations": turns("q", "a")},
            {"conversation": turns("q", "a"), "id": 3},
            {"messages": [{"role": role, "content": part(text)} for role, text in said.items()]},
            {"messages": [{"role": role, "content": [text[:0], text]} for role, text in said.items()]}]
    ways += [{key: [{"from": user, "value": "q"}, {"from": assistant, "value": "a"}]} for key, user, assistant in (
        ("conversations", "human", "gpt"), ("messages", "user", "assistant"), ("conversations", "Human", "chatgpt"),
        ("conversations", "human", "bing"), ("conversations", "user", "bard"))]
    texts, report, _ = read(ways)
    assert texts == [("<|user|>q<|end|><|assistant|>a<|end|>", "a<|end|>")] * len(ways) and "left out" not in report
    lines = "".join(json.dumps(way) + "\n" for way in ways).encode()
    for content in (json.dumps(ways).encode(), json.dumps(ways, indent=2).encode(), b"\xef\xbb\xbf" + lines,
                    b"\xef\xbb\xbf" + json.dumps(ways).encode(), lines.replace(b"\n", b"\r\n")):
        assert read(content)[0] == texts


def test_an_answer_before_the_first_question_is_left_off(read):
    talk = lambda *names: {"conversations": [{"from": name, "value": f"{name} {n}"} for n, name in enumerate(names)]}
    for template in ("plain", "vicuna"):
        texts, report, dialogues = read([talk("gpt", "human", "gpt", "human", "gpt")] * 3, template)
        assert [said.count("gpt 2") + said.count("gpt 4") for _, said in texts] == [2] * 3
        assert "gpt 0" not in texts[0][0] and "; 3 answers before the first question left off" in report
    texts, _, _ = read([talk("system", "gpt", "human", "gpt")])
    assert texts[0][0] == "<|system|>system 0<|end|><|user|>human 2<|end|><|assistant|>gpt 3<|end|>"
    texts, _, _ = read([talk("human", "gpt", "human", "human", "gpt")])                 # the template decides
    assert texts[0][1] == "gpt 1<|end|>gpt 4<|end|>"


def test_empty_answers_are_not_learnt(read):
    texts, report, _ = read([{"messages": turns("q", "", "why", "so")}, {"messages": turns("q", "a", "why", " ")},
                             {"messages": turns("q", "")},
                             {"messages": turns("q", "a", "why", ""), "finish_reason": "length"}])
    assert [said for _, said in texts] == ["so<|end|>", "a<|end|>", "a<|end|>"]
    assert texts[0][0].startswith("<|user|>q<|end|><|assistant|><|end|><|user|>why")
    assert "3 empty answers not learnt" in report and "1 with empty answers only (line 3)" in report


def test_what_is_left_out_is_counted_under_its_name_with_its_lines(read):
    good = json.dumps({"messages": turns("q", "a\u2028b")}, ensure_ascii=False).encode()
    bad = [b'{"messages": [{"role": "user", "content": "caf\xe9"}]}',
           b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', b"{broken",
           b'{"messages": [{"role": "wizard", "content": "q"}]}', b'{"text": "x"}', b"3", b'{"conversations": null}',
           b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', b'{"messages": ["q"]}', b"[" * 3000]
    _, report, dialogues = read(b"\n".join([good, *bad, good]), "vicuna")
    assert [d.line for d in dialogues] == [1, 12]
    for name in ("2 not valid text (line 2: not UTF-8: byte 46 does not fit; "
                 "line 3: half a character (a lone surrogate))",
                 "6 broken lines (line 4: not JSON", ", ...)",
                 'line 6: no list of "messages" or "conversations"; line 7: ',
                 "1 with an unknown speaker (line 5: 'wizard')", "1 with parts that are not text (line 9: image_url)"):
        assert name in report, report
    two = {"messages": [{"role": "user", "content": "q"}, *turns("q", "a")]}
    _, report, dialogues = read([two, {"messages": turns("q", "a")}], "vicuna")
    assert len(dialogues) == 1 and "1 refused by the chat template (line 1: " in report and "must take turns" in report
