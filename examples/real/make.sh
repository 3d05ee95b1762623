#!/bin/sh
# Sums in several phrasings, as rows for temper: sh examples/real/make.sh [FOLDER] writes
#
#     sft.jsonl      600 rows, prompt and completion: the sum written out
#     prompts.jsonl  600 rows, prompt and answer: for online RL
#     pairs.jsonl    200 rows, prompt, chosen (right) and rejected (a sum that is off)
#     heldout.jsonl  200 rows, prompt and answer, to measure with: none of its pairs of numbers is in the others
#     grpo.jsonl     600 rows, prompt and answer: the question asks for the form that the model takes now and then
#     grpo-heldout.jsonl  200 rows in the same form, to measure with
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
function says(who, text) { return "[{\"role\": \"" who "\", \"content\": \"" text "\"}]" }
function row(file, held, kind,   a, b, sum, out) {
  do { a = 10 + below(90); b = 10 + below(90) } while (((a * 100 + b) % 8 == 0) != held)
  sum = a " + " b " = "
  out = "{\"prompt\": " says("user", ask(a, b, below(6)) (kind == "form" ? " Answer in the form a + b = c." : ""))
  if (kind == "answer" || kind == "form") out = out ", \"answer\": \"" a + b "\"}"
  if (kind == "reply") out = out ", \"completion\": " says("assistant", sum a + b) "}"
  if (kind == "pair") out = out ", \"chosen\": " says("assistant", sum a + b) ", \"rejected\": " says("assistant", sum a + b + 1 + below(9)) "}"
  print out > (folder "/" file)
}
BEGIN {
  state = 20261127
  for (i = 0; i < 600; i++) row("sft.jsonl", 0, "reply")
  for (i = 0; i < 600; i++) row("prompts.jsonl", 0, "answer")
  for (i = 0; i < 200; i++) row("heldout.jsonl", 1, "answer")
  for (i = 0; i < 200; i++) row("pairs.jsonl", 0, "pair")
  for (i = 0; i < 600; i++) row("grpo.jsonl", 0, "form")
  for (i = 0; i < 200; i++) row("grpo-heldout.jsonl", 1, "form")
}'
