"""Greedy decoding of one model shape: transformers.generate beside `temper bench decode`.

Versions: torch 2.11.0, transformers 5.17.0. Both use the same cores, shape, batch, prompt and completion lengths in f32 on
the CPU, with random weights and no end token; they run in turn, five rounds, and the ratio of the medians counts. On a
machine that others use too, compare by --threads 1 and the CPU time, which is that of the generation alone on both sides;
with more threads OpenMP's waiting counts as CPU time.

    cargo build --release
    python benches/peers/decode.py --batch 32 --length 128 [--shape smollm2-135m] [--threads 2] [--json benches/results/FILE.json]
"""
import argparse, json, os, statistics, subprocess, time

SHAPES = {  # as `temper bench decode --shape` has them: hidden, intermediate, layers, heads, kv heads, head_dim, vocab
    "quickstart": (128, 384, 4, 4, 2, 32, 512),
    "smollm2-135m": (576, 1536, 30, 9, 3, 64, 49152),
}
parser = argparse.ArgumentParser()
parser.add_argument("--shape", choices=SHAPES, default="quickstart")
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
# `temper bench decode` splits the length in the same way.
hidden, mlp, layers, heads, kv, dim, vocab = SHAPES[args.shape]
config = LlamaConfig(vocab_size=vocab, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
                     num_key_value_heads=kv, head_dim=dim, tie_word_embeddings=True, max_position_embeddings=32768, rms_norm_eps=1e-5,
                     eos_token_id=None, bos_token_id=None, pad_token_id=0)
model = LlamaForCausalLM(config).float().eval()
prompt = max(args.length // 4, 1)
new = args.length - prompt
ids = torch.randint(0, vocab, (args.batch, prompt))


def torch_round():
    start, cpu = time.perf_counter(), time.process_time()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    assert out.shape[1] == args.length
    return args.batch * new / (time.perf_counter() - start), args.batch * new / (time.process_time() - cpu)


def temper_round():
    command = [args.temper, "bench", "decode", "--shape", args.shape, "--batch", str(args.batch), "--length",
               str(args.length), "--device", "cpu", "--dtype", "float32", "--json"]
    env = dict(os.environ, RAYON_NUM_THREADS=str(args.threads))
    out = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)
    return out["tokens_per_second"], args.batch * new / out["cpu_seconds"]


torch_round()  # warm
rounds = [torch_round() + temper_round() for _ in range(args.rounds)]
theirs, theirs_cpu, ours, ours_cpu = (statistics.median(r[i] for r in rounds) for i in range(4))
names = ["transformers", "transformers_per_cpu_second", "temper", "temper_per_cpu_second"]
result = {
    "what": f"greedy decoding, {args.shape} shape, f32, CPU: tokens a second, and a second of CPU time",
    "batch": args.batch, "prompt": prompt, "new_tokens": new, "threads": args.threads,
    "load_average": os.getloadavg()[0], "torch": torch.__version__, "transformers": transformers.__version__,
    "transformers_tokens_per_second": theirs, "temper_tokens_per_second": ours, "ratio": ours / theirs,
    "ratio_by_cpu_time": ours_cpu / theirs_cpu,
    "rounds": [dict(zip(names, r)) for r in rounds],
    "command": f"python benches/peers/decode.py --shape {args.shape} --batch {args.batch} --length {args.length} --threads {args.threads}",
}
print(json.dumps(result, indent=1))
if args.json:
    with open(args.json, "w") as out:
        json.dump(result, out, indent=1)
        out.write("\n")
