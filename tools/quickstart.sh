#!/usr/bin/env bash
# From a fresh clone to a trained and evaluated small MFuser: set everything up, draw the streets data set, train on its
# day pictures, evaluate there and on three domains that training never saw, and draw what the network sees.
# On a CPU with 2 cores it takes about 10 minutes after the set-up. An interrupted run goes on where it stopped.
#
#   bash tools/quickstart.sh [KEY VALUE ...]     the pairs change the config, e.g. SOLVER.MAX_ITER 50 OUTPUT_DIR output/x
set -euo pipefail
if [[ -n "${DETECTRON2_DATASETS:-}" ]]; then
  mkdir -p "$DETECTRON2_DATASETS"
  DETECTRON2_DATASETS="$(cd "$DETECTRON2_DATASETS" && pwd)"
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_env.sh
export DETECTRON2_DATASETS="${DETECTRON2_DATASETS:-$PWD/datasets}"
# Waiting threads sleep instead of spinning: on a machine with other work a step was measured five times faster.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

"$PYTHON" datasets/prepare_streets.py "$DETECTRON2_DATASETS/streets" </dev/null

if [[ -n "$MFUSER_D2_NO_DETECTRON2" ]]; then
  echo "Detectron2 is absent ($MFUSER_D2_NO_DETECTRON2): training the same network in a plain PyTorch loop instead."
  exec "$PYTHON" tools/plain_train.py </dev/null
fi

config=configs/quickstart/mfuser_tiny_eva02.yaml
output=output/quickstart_eva02
previous=""
for argument in "$@"; do
  [[ "$previous" == OUTPUT_DIR ]] && output="$argument"
  previous="$argument"
done

"$PYTHON" tools/train_net.py --config-file "$config" --resume \
  TEST.MFUSER.SAVE_PREDICTIONS True TEST.MFUSER.SAVE_PER_IMAGE True "$@" </dev/null
"$PYTHON" tools/draw_predictions.py "$output" </dev/null
"$PYTHON" tools/report.py "$output" </dev/null

activate="$(dirname "$PYTHON")/activate"
cat <<EOF

Table:    $output/inference/results.txt (.md, .json, .csv)
Pictures: $output/predictions.jpg, and a page with the best and worst ones: $output/inference/report.html
Network:  $output/model_final.pth

Try next, in this folder:
  $([[ -f "$activate" ]] && echo "source '$activate'" || echo "# (with this environment active)")
  export DETECTRON2_DATASETS='$DETECTRON2_DATASETS'
  python tools/demo.py --config-file $config --output $output/demo \\
    --input '$DETECTRON2_DATASETS/streets/images/fog' --opts MODEL.WEIGHTS $output/model_final.pth
  python tools/train_net.py --config-file $config --eval-only MODEL.WEIGHTS $output/model_final.pth
EOF
