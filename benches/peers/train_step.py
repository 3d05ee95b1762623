"""A training step of one model shape: PyTorch eager (transformers' Llama, sdpa, AdamW) beside `temper bench train`.

Versions: torch 2.11.0, transformers 5.17.0. Both use the same cores, the same shape and batch, f32, one optimizer step
of full-length rows with every token scored; they run in turn, five rounds, and the ratio of the medians counts.

    cargo build --release
    python benches/peers/train_step.py --batch 32 --length 128 [--threads 2] [--json benches/results/FILE.json]
"""
import argparse, json, os, statistics, subprocess, time

parser = argparse.ArgumentParser()
parser.add_argument("--temper", default="target/release/temper")
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--json")
args = parser.parse_args()

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(args.threads)
torch.manual_seed(0)
# The shape that `temper bench train --shape quickstart` has.
config = LlamaConfig(vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=32, tie_word_embeddings=True, max_position_embeddings=32768,
                     rms_norm_eps=1e-5)
model = LlamaForCausalLM(config).float()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
ids = torch.randint(0, 512, (args.batch, args.length))


def torch_round():
    times = []
    for _ in range(8):
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return args.batch * args.length / statistics.median(times[2:])


def temper_round():
    command = [args.temper, "bench", "train", "--shape", "quickstart", "--batch", str(args.batch), "--length",
               str(args.length), "--device", "cpu", "--dtype", "float32", "--json"]
    env = dict(os.environ, RAYON_NUM_THREADS=str(args.threads))
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)["tokens_per_second"]


rounds = [(torch_round(), temper_round()) for _ in range(args.rounds)]
theirs, ours = (statistics.median(r[i] for r in rounds) for i in (0, 1))
result = {
    "what": "training step, quickstart shape (0.85 M parameters), f32, CPU", "batch": args.batch, "length": args.length,
    "threads": args.threads, "torch": torch.__version__, "transformers": transformers.__version__,
    "torch_tokens_per_second": theirs, "temper_tokens_per_second": ours, "ratio": ours / theirs,
    "rounds": [{"torch": t, "temper": o} for t, o in rounds],
}
print(json.dumps(result, indent=1))
if args.json:
    with open(args.json, "w") as out:
        json.dump(result, out, indent=1)
        out.write("\n")
