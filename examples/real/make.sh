#!/bin/sh
# Sums in several phrasings, as rows for temper: sh examples/real/make.sh [FOLDER] writes
#
#     sft.jsonl      600 rows, prompt and completion (messages): a short reply that ends in the number
#     prompts.jsonl  600 rows, prompt (messages) and answer: for online RL
#     heldout.jsonl  200 rows, prompt (messages) and answer: to measure with; none of its pairs of numbers is in the others
#
# Only sh and awk. The numbers come from a generator written out below, so every machine makes the same files.
set -eu
folder=${1:-sums}
mkdir -p "$folder"
awk -v folder="$folder" '
# Park and Miller: exact in the doubles of every awk.
function below(n) { state = (state * 16807) % 2147483647; return state % n }
function ask(a, b, way) {
  if (way == 0) return "What is " a " + " b "?"
  if (way == 1) return "Add " a " and " b "."
  if (way == 2) return "Tom has " a " apples and buys " b " more. How many apples does he have now?"
  if (way == 3) return "Compute the sum of " a " and " b "."
  if (way == 4) return "A box holds " a " red balls and " b " blue balls. How many balls are in the box?"
  return "Mia read " a " pages on Monday and " b " pages on Tuesday. How many pages did she read in all?"
}
function row(file, held, reply,   a, b, prompt, out) {
  do { a = 10 + below(90); b = 10 + below(90) } while (((a * 100 + b) % 8 == 0) != held)
  prompt = "{\"prompt\": [{\"role\": \"user\", \"content\": \"" ask(a, b, below(6)) "\"}], "
  if (reply) out = "\"completion\": [{\"role\": \"assistant\", \"content\": \"" a " + " b " = " a + b "\"}]}"
  else out = "\"answer\": \"" a + b "\"}"
  print prompt out > (folder "/" file)
}
BEGIN {
  state = 20261127
  for (i = 0; i < 600; i++) row("sft.jsonl", 0, 1)
  for (i = 0; i < 600; i++) row("prompts.jsonl", 0, 0)
  for (i = 0; i < 200; i++) row("heldout.jsonl", 1, 0)
}'
