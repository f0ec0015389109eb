#!/usr/bin/env bash
# bash scripts/train_demo_head.sh OUT: the whole recipe of the shipped head, from the writing of its data to its trees.
#
# For a GPU or a CPU, after scripts/demo.sh has installed what it needs. Started again after a stop it goes on where it
# was. Settings:
#   CHECKPOINT   the target (default: the demo model). CHECKPOINT-int8 and CHECKPOINT-int4, where there are, get trees too
#   DIALOGUES    that the target writes (default: 48000, about 6 million answer tokens)
#   WRITERS      processes that write them side by side (default: one for each CPU core, or 1 on a GPU)
#   INIT         the head to begin with (default: the shipped one); "none": random weights
#   EPOCHS       of training (default: 3)
#   DRAFT_VOCAB  tokens that the head can draft (default: 8192)
set -euo pipefail
[ $# = 1 ] || { echo "usage: bash scripts/train_demo_head.sh OUT" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
checkpoint=${CHECKPOINT:-$($python scripts/download.py --demo | tail -n 1)}
init=${INIT:-heads/SmolLM2-135M-Instruct}
if $python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    writers=${WRITERS:-1} threads=
else
    writers=${WRITERS:-$(nproc)} threads=1      # two processes of one thread write more than one process of two
fi

pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
write() {
    ${threads:+env OMP_NUM_THREADS=$threads} $python scripts/generate_data.py --checkpoint "$checkpoint" --max-new-tokens 1000 \
        --temperature 0.7 --temperature-share 0.1 --batch-size 256 "$@" &
    pids+=($!)
}
for n in $(seq "$writers"); do
    write --out "$out/data-$n.jsonl" --seed $((200 + n)) --dialogues $((${DIALOGUES:-48000} / writers)) --max-user-tokens 72 --second-turns 0.3
done
for pid in "${pids[@]}"; do wait "$pid"; done
pids=()
for n in $(seq "$writers"); do      # questions that bring a text
    $python scripts/ask_about.py "$out/data-$n.jsonl" --out "$out/questions-$n.jsonl" --seed "$n"
    write --out "$out/about-$n.jsonl" --seed $((300 + n)) --prompts "$out/questions-$n.jsonl"
done
for pid in "${pids[@]}"; do wait "$pid"; done
$python scripts/join_dialogues.py "$out"/data-*.jsonl "$out"/about-*.jsonl --out "$out/data.jsonl" --share 0.5

[ "$init" = none ] && begin=() || begin=(--init "$init")
${threads:+env OMP_NUM_THREADS=$threads} $python ${threads:+-m torch.distributed.run --nproc-per-node $writers} train_head.py \
    --checkpoint "$checkpoint" --data "$out/data.jsonl" --cache-features "$out/features" --out "$out/head" "${begin[@]}" \
    --draft-vocab "${DRAFT_VOCAB:-8192}" --batch-size 4 --max-length 1024 --epochs "${EPOCHS:-3}" --levels 2 --lr 2e-3 --warmup 30 \
    --cls-weight 0.3 --keep best --seed 1 --resume
for target in "$checkpoint" "$checkpoint-int8" "$checkpoint-int4"; do
    [ ! -d "$target" ] || $python scripts/tune_tree.py --checkpoint "$target" --eagle "$out/head"
done
