"""Sets of questions, in MT-bench's form: a file, or one of the sets that papers measure on, from the hub.

    for question in choose(read_questions("mt_bench"), limit=10):
        print(question["question_id"], question["category"], question["turns"])
"""
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from console import read_records

# name -> hub repository, file, and what makes the first turn of a row
HUB_SETS = {
    "mt_bench": ("HuggingFaceH4/mt_bench_prompts", "raw/question.jsonl", None),
    "humaneval": ("openai/openai_humaneval", "openai_humaneval/test-00000-of-00001.parquet",
                  lambda row: f"Complete the following Python function.\n\n{row['prompt']}"),
    "gsm8k": ("openai/gsm8k", "main/test-00000-of-00001.parquet", lambda row: row["question"]),
    "alpaca": ("tatsu-lab/alpaca", "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",
               lambda row: "\n\n".join(filter(None, (row["instruction"], row["input"])))),
}


def read_questions(name: str) -> list[dict]:
    """{"question_id", "category", "turns", "place"} of a file, or of a set by its name; places count from 0.

    Raises FileNotFoundError or ValueError in one line.
    """
    if name not in HUB_SETS:
        file, first_turn = Path(name), None
        if not file.is_file():
            raise FileNotFoundError(f"--questions {name}: neither a file nor one of {', '.join(HUB_SETS)}")
    else:
        repository, path, first_turn = HUB_SETS[name]
        file = fetch(name, repository, path)
    questions = []
    for n, (line, row) in enumerate(rows_of(file), start=1):
        try:
            turns = row.get("turns") or row.get("prompt") if first_turn is None else [first_turn(row)]
            if not (turns and isinstance(turns, list) and all(isinstance(t, str) and t.strip() for t in turns)):
                raise ValueError
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{file}, line {line}: no question: MT-bench's form is "
                             '{"question_id", "category", "turns": [...]}') from None
        questions.append({"question_id": row.get("question_id", n), "category": str(row.get("category", name)),
                          "turns": turns, "place": n - 1})
    if not questions:
        raise ValueError(f"{file}: it holds no question")
    if len({q["question_id"] for q in questions}) != len(questions):
        raise ValueError(f"{file}: two questions have the same question_id")
    return questions


def fetch(name: str, repository: str, path: str) -> Path:
    from huggingface_hub import hf_hub_download
    try:
        return Path(hf_hub_download(repository, path, repo_type="dataset"))
    except (OSError, ValueError):   # huggingface-hub raises one of these, whatever the network does
        raise FileNotFoundError(f"--questions {name}: {repository} cannot be fetched from the hub; give a file of JSON "
                                'lines {"question_id", "category", "turns": [...]} instead') from None


def rows_of(file: Path) -> Iterator[tuple[int, Any]]:
    """(line, row) of a file of JSON lines or a parquet file."""
    if file.suffix != ".parquet":
        yield from read_records(file)
        return
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("this set is a parquet file: pip install pyarrow, or give --questions a file") from None
    yield from enumerate(pyarrow.parquet.read_table(file).to_pylist(), start=1)


def choose(questions: list[dict], limit: int | None) -> list[dict]:
    """`limit` questions in the set's order: the first of each category, then the second of each, and so on."""
    rank, met = {}, {}
    for question in questions:
        rank[question["place"]] = met[question["category"]] = met.get(question["category"], -1) + 1
    first = sorted(questions, key=lambda q: (rank[q["place"]], q["place"]))[:limit]
    return sorted(first, key=lambda q: q["place"])
