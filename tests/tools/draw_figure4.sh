#!/usr/bin/env bash
# docs/figure4.png: the paper's Figure 4 in its form, of the demo's pictures and five systems of ours.
# After `bash demo.sh`, with chromium and a Chinese font (fonts-noto-cjk) on the machine:
#   bash tests/tools/draw_figure4.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=out/demo TOY=out/demo/toy PORT=8765
# 60 steps of stage 2, and the model before it
[ -d $OUT/early/final ] || python train.py --stage 2 --device cpu --model $OUT/language --projector $OUT/stage1/final/projector.safetensors \
    --data $TOY/instruction.json --images $TOY/images --out $OUT/early --batch-size 16 --lr 1.5e-3 --max-steps 60
[ -d $OUT/before ] || python convert.py $OUT/before --llm $OUT/language --vision $TOY/clip --projector $OUT/stage1/final/projector.safetensors
: > $OUT/serve.log
python serve.py --model $OUT/stage2 --quantize int8 --port $PORT > $OUT/serve.log 2>&1 &
trap "kill $!" EXIT
until grep -q "http://127" $OUT/serve.log; do sleep 1; done
python evaluate.py compare $TOY/heldout.json --images $TOY/images --out out/figure4 --figure --glosses demo/glosses.csv --yes \
    --ids heldout-53-modality,heldout-73-place,heldout-99-count \
    --system "stage 2=$OUT/stage2" --system "the same, int8, served=http://127.0.0.1:$PORT/v1#qilin" --system "60 steps of stage 2=$OUT/early" \
    --system "stage 1 alone=$OUT/before" --system "picture withheld=$OUT/eval/predictions.jsonl#blind"
chromium --headless --no-sandbox --hide-scrollbars --force-device-scale-factor=1.4 --window-size=880,1050 --screenshot=docs/figure4.png "file://$PWD/out/figure4/figure4.html" 2> /dev/null
