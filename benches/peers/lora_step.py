"""A LoRA step beside the full step, temper's and PyTorch's (transformers' Llama, peft, AdamW), on the same shape and tokens.

Versions: torch 2.11.0, transformers 5.17.0, peft 0.19.1. Rank 16 on all seven projections, no dropout, f32 on a CPU, one optimizer
step over full-length rows with every token scored. All kinds run in turn, round after round, and medians count. CPU seconds are those
of the timed steps on the processes' own threads, so a busy machine changes them little.

    cargo build --release
    python benches/peers/lora_step.py [--shape smollm2-135m] [--batch 2] [--length 256] [--threads 1] [--json benches/results/FILE.json]
"""
import argparse, json, os, statistics, subprocess, time

SHAPES = {  # as `temper bench train --shape` has them: hidden, intermediate, layers, heads, kv heads, head_dim, vocab
    "quickstart": (128, 384, 4, 4, 2, 32, 512),
    "smollm2-135m": (576, 1536, 30, 9, 3, 64, 49152),
}
parser = argparse.ArgumentParser()
parser.add_argument("--temper", default="target/release/temper")
parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
parser.add_argument("--batch", type=int, default=2)
parser.add_argument("--length", type=int, default=256)
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--json")
args = parser.parse_args()

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(args.threads)
torch.manual_seed(0)
hidden, mlp, layers, heads, kv, dim, vocab = SHAPES[args.shape]
config = LlamaConfig(vocab_size=vocab, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
                     num_key_value_heads=kv, head_dim=dim, tie_word_embeddings=True, max_position_embeddings=32768, rms_norm_eps=1e-5)
ids = torch.randint(0, vocab, (args.batch, args.length))


def torch_model(lora):
    model = LlamaForCausalLM(config).float()
    if lora:
        model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, trained, torch.optim.AdamW(trained, lr=2e-5, fused=True)


def torch_round(model, trained, optimizer):
    times = []
    for i in range(args.steps + 1):
        if i == 1:
            cpu = time.process_time()
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]), (time.process_time() - cpu) / args.steps


def temper_round(*more):
    command = [args.temper, "bench", "train", "--shape", args.shape, "--batch", str(args.batch), "--length", str(args.length),
               "--repeat", str(args.steps), "--device", "cpu", "--dtype", "float32", "--json", *more]
    env = dict(os.environ, RAYON_NUM_THREADS=str(args.threads))
    run = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)
    peaks[" ".join(more) or "full"] = run["peak_memory_bytes"]
    return run["seconds_per_step"], run["cpu_seconds_per_step"]


peaks = {}
full, lora, rank = torch_model(False), torch_model(True), str(args.rank)
kinds = {
    "temper full": lambda: temper_round(),
    "temper lora": lambda: temper_round("--lora", rank),
    "temper lora nf4-nested": lambda: temper_round("--lora", rank, "--base", "nf4-nested"),
    "torch full": lambda: torch_round(*full),
    "torch lora (peft)": lambda: torch_round(*lora),
}
rounds = {name: [] for name in kinds}
for _ in range(args.rounds):
    for name, run in kinds.items():
        rounds[name].append(run())
wall, cpu = ({name: statistics.median(r[i] for r in values) for name, values in rounds.items()} for i in (0, 1))
result = {
    "what": f"training step, {args.shape} shape, f32, CPU, LoRA rank {args.rank} on all seven projections", "batch": args.batch,
    "length": args.length, "threads": args.threads, "torch": torch.__version__, "transformers": transformers.__version__,
    "peft": peft.__version__, "wall_seconds_per_step": wall, "cpu_seconds_per_step": cpu,
    "cpu seconds: torch full over temper full": cpu["torch full"] / cpu["temper full"],
    "cpu seconds: torch lora over temper lora": cpu["torch lora (peft)"] / cpu["temper lora"],
    "cpu seconds: temper lora over temper full": cpu["temper lora"] / cpu["temper full"],
    "cpu seconds: torch lora over torch full": cpu["torch lora (peft)"] / cpu["torch full"],
    "temper_peak_memory_bytes": peaks, "rounds": rounds, "load_average": os.getloadavg(),
}
print(json.dumps(result, indent=1))
if args.json:
    with open(args.json, "w") as out:
        json.dump(result, out, indent=1)
        out.write("\n")
